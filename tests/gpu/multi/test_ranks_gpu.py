"""Several GPUs, with copies of the weights or shards, against one: NCCL, flash attention and compiled layers."""

from __future__ import annotations

from typing import Any, TypeAlias

import pytest
import torch
from policy import rank_cases
from policy.rank_cases import WAYS

pytestmark = [pytest.mark.gpu, pytest.mark.multi]
Found: TypeAlias = dict[str, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found]:
    """What all GPUs (four at most) did together, then one of them; each resumed what they did together."""
    ranks, folder = min(4, torch.cuda.device_count()), tmp_path_factory.mktemp("ranks")
    if ranks < 2:
        pytest.skip("needs two GPUs")
    return rank_cases.launch(ranks, folder, source=ranks), rank_cases.launch(1, folder, source=ranks)


def close(found: dict[str, float], expected: dict[str, float], tolerance: float) -> None:
    for name in ("policy/loss", "policy/grad_norm", "policy/entropy"):
        assert found[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("way", WAYS)
def test_gpus_together_do_what_one_does(way: str, found: tuple[Found, Found]) -> None:
    together, alone = found[0][way], found[1]["ddp"]
    close(together["updates"][0], alone["updates"][0], 1e-5)
    close(together["updates"][1], alone["updates"][1], 1e-3)
    close(together["half"], found[1][way]["half"], 1e-3)
    # ZeRO-3 rounds in other places, with one rank as well.
    close(together["half"], alone["half"], 3e-3 if way == "zero3" else 1e-3)
    close(together["lora"], alone["lora"], 1e-5)
    assert together["weights"].keys() == alone["weights"].keys()
    for name, weight in alone["weights"].items():
        assert together["weights"][name] == pytest.approx(weight, abs=1e-3), name


@pytest.mark.parametrize("way", WAYS)
def test_checkpoint_of_several_gpus_continues_on_one(way: str, found: tuple[Found, Found]) -> None:
    together, alone = found
    for updates in (together[way]["resumed"], alone[way]["resumed"], alone[way].get("resumed_by_fsdp2")):
        for own, wanted in zip(updates or (), together[way]["updates"][2:], strict=bool(updates)):
            close(own, wanted, 1e-3)
