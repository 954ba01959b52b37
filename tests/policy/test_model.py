"""Loading the policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from policy.rank_cases import make_policy

from sapo_rl.config import ModelConfig
from sapo_rl.policy.model import Policy, load_policy
from sapo_rl.policy.parallel import loads_weights, take_from_rank_0


def shapes(policy: Policy) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, parameter.shape, parameter.dtype) for name, parameter in policy.named_parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_policy_is_the_model_without_its_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    make_policy(dtype).model.save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path))
    empty, loaded = load_policy(config, empty=True), load_policy(config)
    assert shapes(empty) == shapes(loaded)  # a tied head once
    assert all(parameter.is_meta for parameter in empty.parameters())
    for (name, own), (other, expected) in zip(empty.named_buffers(), loaded.named_buffers(), strict=True):
        assert name == other
        torch.testing.assert_close(own, expected)
    take_from_rank_0(list(empty.parameters()), torch.device("cpu"))
    head, embedding = empty.model.get_output_embeddings(), empty.model.get_input_embeddings()
    assert (head.weight is embedding.weight) == (dtype == torch.float32)
    assert shapes(empty) == shapes(loaded)


def test_one_rank_reads_the_weights_but_with_deepspeed_all_do(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    assert loads_weights(accelerator)
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    assert not loads_weights(accelerator)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert loads_weights(accelerator)
