"""One, two and four ranks, with copies of the weights or shards: the same updates, and each other's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from accelerate import Accelerator
from policy import rank_cases
from policy.rank_cases import WAYS, make_policy
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.multi
Found: TypeAlias = dict[str, Any]

RANKS = [4, 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, Found]:
    """What four and two ranks did, by number of ranks and way of sharding."""
    return {ranks: rank_cases.launch(ranks, folder, source=4) for ranks in RANKS}


@pytest.fixture(scope="module")
def alone(folder: Path) -> Found:
    """The same by one process."""
    return rank_cases.run(Accelerator(cpu=True), "ddp", folder / "1")


def close(found: dict[str, float], expected: dict[str, float], tolerance: float) -> None:
    for name in ("policy/loss", "policy/grad_norm", "policy/entropy", "policy/ratio_max", "policy/learning_rate"):
        assert found[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_together_do_what_one_process_does(ranks: int, way: str, found: dict[int, Found], alone: Found) -> None:
    case = found[ranks][way]
    close(case["updates"][0], alone["updates"][0], 1e-6)
    for own, expected in zip(case["updates"][1:], alone["updates"][1:], strict=True):
        close(own, expected, 1e-4)
    close(case["half"], alone["half"], 1e-4)
    assert case["half"]["policy/kl_ref"] == pytest.approx(alone["half"]["policy/kl_ref"], rel=1e-4)
    assert case["half"]["policy/kl_ref"] > 0.01
    assert case["updates"][0]["perf/rank_imbalance"] >= 1
    close(case["lora"], alone["lora"], 1e-6)
    for kind in ("weights", "lora_weights"):
        assert case[kind].keys() == alone[kind].keys()
        for name, weight in alone[kind].items():
            assert case[kind][name] == pytest.approx(weight, abs=2e-5), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", RANKS)
def test_metrics_are_those_of_all_ranks_tokens_together(
    ranks: int, way: str, found: dict[int, Found], alone: Found
) -> None:
    own, expected = found[ranks][way]["often"], alone["often"]
    assert expected["policy/ratio_min"] < expected["policy/ratio_p99"] < expected["policy/ratio_max"]
    for name, value in expected.items():
        assert own[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", RANKS)
def test_a_mask_over_the_batch_is_one_over_all_ranks(
    ranks: int, way: str, found: dict[int, Found], alone: Found
) -> None:
    own, expected = found[ranks][way]["m2po"], alone["m2po"]
    assert 0 < expected["policy/weight_below_half"] < 1
    for name in ("policy/weight_below_half", "policy/weight_mean_with", "policy/loss", "policy/grad_norm"):
        assert own[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name
    assert own["policy/weight_mean_against"] == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", RANKS)
def test_temperatures_that_set_themselves_are_the_same_on_all_ranks(
    ranks: int, way: str, found: dict[int, Found], alone: Found
) -> None:
    case = found[ranks][way]
    assert len(case["scales"]) == ranks and len(set(case["scales"])) == 1
    assert case["scales"][0] == pytest.approx(alone["scales"][0], rel=1e-3)
    for own, expected in zip(case["auto"], alone["auto"], strict=True):
        for name in ("policy/tau_pos", "policy/tau_neg", "policy/kl_gated"):
            assert own[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-7), name
    assert case["auto"][1]["policy/tau_pos"] > case["auto"][0]["policy/tau_pos"] == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", RANKS)
def test_the_values_of_each_sample_are_told_by_one_rank(
    ranks: int, way: str, found: dict[int, Found], alone: Found
) -> None:
    def ordered(tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(tokens, key=lambda one: one["place"])

    expected = ordered(alone["tokens"])
    assert [one["place"] for one in expected] == [[group, sample] for group in (5, 6, 7) for sample in range(4)]
    for one, other in zip(ordered(found[ranks][way]["tokens"]), expected, strict=True):
        assert (one["place"], one["ids"]) == (other["place"], other["ids"])
        assert one["ratio"] == pytest.approx(other["ratio"], rel=1e-3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", RANKS)
def test_weights_for_vllm_and_the_export_are_the_whole_model(
    ranks: int, way: str, found: dict[int, Found], folder: Path
) -> None:
    case = found[ranks][way]
    assert case["fresh"] == {name: p.flatten().tolist() for name, p in make_policy().model.named_parameters()}
    model = AutoModelForCausalLM.from_pretrained(folder / str(ranks) / way / "final", dtype=torch.float32)
    assert case["weights"] == {name: parameter.flatten().tolist() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("way", WAYS)
def test_checkpoint_of_four_ranks_continues_on_any_number(way: str, found: dict[int, Found], folder: Path) -> None:
    """The fourth update knows whether the moments came back as well: they are in the third's step."""
    expected = found[4][way]["updates"][2:]
    resumed = {
        "on four": found[4][way]["resumed"],
        "on two": found[2][way]["resumed"],
        "on two, by FSDP2": found[2][way].get("resumed_by_fsdp2", expected),
        "alone": rank_cases.resume(Accelerator(cpu=True), "ddp", folder / "4" / way),
    }
    for updates in resumed.values():
        for own, wanted in zip(updates, expected, strict=True):
            close(own, wanted, 1e-5)
    assert expected[1]["policy/learning_rate"] < expected[0]["policy/learning_rate"]
