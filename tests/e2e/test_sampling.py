"""What is sampled, with real vLLM: pass rates measured before a run."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from command import run
from tiny import make_workspace

from sapo_rl.data.pass_rates import fingerprint

pytestmark = pytest.mark.e2e

REWARDS = """
def lucky(completions, **columns):
    # Never, always or in part, by the answer.
    print("scored", len(completions))
    parities = [sum(map(ord, text)) % 2 for text in completions]
    return [float((0, 1, odd, odd)[int(answer) % 4]) for odd, answer in zip(parities, columns["answer"])]
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return make_workspace(
        tmp_path_factory.mktemp("workspace"),
        tiny_model,
        REWARDS,
        data={"size": 24},
        reward={"functions": {"lucky": {"function": "my_rewards.lucky"}, "odd": {"function": "my_rewards.odd"}}},
        eval={"every": 0, "prompts": 4, "reward": "lucky"},
        checkpoint={"every": 1, "save_final": False},
        logging={"wandb": "off"},
    )


@pytest.fixture(scope="module")
def checked(workspace: Path) -> tuple[Path, str]:
    """The folder of a check of all prompts, and what it printed."""
    code, out, err = run(workspace, "config=tiny.yaml", "check=data", "data.check.samples=6", "run_dir=checked")
    assert code == 0, out + err
    return workspace / "checked", out


def rates_of(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "pass_rates.parquet").to_pylist()


def test_every_prompt_is_measured_and_every_number_is_that_of_its_samples(checked: tuple[Path, str]) -> None:
    folder, out = checked
    rows, samples = rates_of(folder), pq.read_table(folder / "completions/step_00000.parquet").to_pylist()
    assert [row["prompt_index"] for row in rows] == list(range(24)) and len(samples) == 24 * 6
    for row in rows:
        own = [one for one in samples if one["prompt_index"] == row["prompt_index"]]
        assert row["fingerprint"] == fingerprint(row["prompt"]) and row["samples"] == 6
        assert row["pass_rate"] == statistics.fmean(one["rewards/lucky"] >= 1 for one in own)
        assert row["rewards/odd/mean"] == pytest.approx(statistics.fmean(one["rewards/odd"] for one in own))
        assert row["reward/mean"] == pytest.approx(row["rewards/odd/mean"] + row["rewards/lucky/mean"])
        assert row["mean_length"] == statistics.fmean(one["tokens"] for one in own)
    table = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in out.splitlines() if "│" in line}
    rates = [row["pass_rate"] for row in rows]
    assert int(table["always"]) == rates.count(1) > 0
    assert int(table["never"]) == rates.count(0) > 0
    assert (
        0 < sum(int(count) for name, count in table.items() if " to " in name) == 24 - rates.count(0) - rates.count(1)
    )
    assert table["prompts"] == "24 of 24, with 144 samples"
    assert table["mean pass rate"] == f"{statistics.fmean(rates):.3f}"
    assert (folder / "logs/rewards_rank0.log").read_text().count("scored 6\n") == 24
    assert "Traceback" not in out and not list(folder.glob("checkpoints")) and not list(folder.glob("metrics.jsonl"))
