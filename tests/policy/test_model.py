"""Loading the policy, from folders that are damaged in every way too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from policy.rank_cases import make_policy
from safetensors.torch import load_file, save_file

from sapo_rl.config import ModelConfig
from sapo_rl.errors import UserError
from sapo_rl.policy.model import Policy, check_shapes, load_policy, load_tokenizer, stop_tokens
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


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


def change(file: Path, **keys: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def test_a_model_that_lacks_weights_is_refused_and_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights .*: model\.layers\.1\.mlp\.up_proj\.weight$"):
        load_policy(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(folder: Path, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"no finite numbers: model\.layers\.1\.mlp\.up_proj\.weight$"):
        load_policy(ModelConfig(path=str(folder)))


def test_large_weights_are_numbers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:] = 3e38
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    load_policy(ModelConfig(path=str(folder)))


def test_weights_of_another_shape_than_the_config_makes_are_told_before_they_are_loaded(folder: Path) -> None:
    config = ModelConfig(path=str(folder))
    check_shapes(config)
    change(folder / "config.json", intermediate_size=96)
    told = r"model\.layers\.0\.mlp\.gate_proj\.weight in '.*' has the shape \[128, 64\], .* \[96, 64\]$"
    with pytest.raises(UserError, match=told):
        check_shapes(config)
    with pytest.raises(UserError, match="cannot load") as refused:
        load_policy(config)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("keys", "empty"),
    [
        ({"model_type": "nope"}, True),
        ({"hidden_act": "nope"}, False),
        ({"rope_parameters": {"rope_type": "nope"}}, False),
        ({"num_attention_heads": 0}, True),
        ({"hidden_size": "x"}, True),
    ],
)
def test_a_config_that_makes_no_model_is_the_users_mistake(folder: Path, keys: dict[str, object], empty: bool) -> None:
    change(folder / "config.json", **keys)
    with pytest.raises(UserError, match=r"^model\.path: cannot load '.*': \w+Error: .") as refused:
        load_policy(ModelConfig(path=str(folder)), empty=empty)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["{}", "[]", "", "{", '{"version": "1.0", "model": {"type": "nope"}}'])
def test_a_tokenizer_that_cannot_be_read_is_the_users_mistake(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"^model\.path: no tokenizer at"):
        load_tokenizer(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("text", ["[]", "7"])
def test_a_generation_config_that_is_none_is_the_users_mistake(folder: Path, text: str) -> None:
    config = ModelConfig(path=str(folder))
    tokenizer = load_tokenizer(config)
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=r"^model\.path: .*generation config"):
        stop_tokens(config, tokenizer)
    (folder / "generation_config.json").unlink()
    assert stop_tokens(config, tokenizer) == [tokenizer.eos_token_id]
