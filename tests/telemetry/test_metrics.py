"""metrics.jsonl and the numbers made from samples."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import one_row

from sapo_rl.errors import UserError
from sapo_rl.telemetry import rows
from sapo_rl.telemetry.metrics import MetricsLog, read_metrics, sample_metrics
from sapo_rl.types import Group, Prompt, Row, Sample, Stop, Turn


def test_a_record_is_in_the_file_at_once_and_exact(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(3, {"policy/loss": 0.1 + 0.2, "completions/max_length": 7})
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["step"] == 3
    assert record["policy/loss"] == 0.1 + 0.2
    assert record["completions/max_length"] == 7
    assert record["time"] >= 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_what_is_not_finite_is_null(tmp_path: Path, value: float | None) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, {"policy/loss": value})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["policy/loss"] is None


def test_tensors_become_numbers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, {"policy/loss": torch.tensor(0.5)})
    assert read_metrics(log.path)[0]["policy/loss"] == 0.5


def test_keep_until_drops_later_steps_and_a_torn_line_and_goes_on_with_the_clock(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "time": 100.0 + step, "reward/mean": step / 7}) for step in range(5)]
    path.write_text("\n".join(lines) + '\n{"step": 5, "ti')
    log = MetricsLog(path)
    kept = log.keep_until(2)
    log.append(3, {"reward/mean": 0.9})
    records = read_metrics(path)
    assert records[:3] == kept == [json.loads(line) for line in lines[:3]]
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert records[3]["time"] >= 102.0


def test_read_passes_over_a_torn_last_line_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step"')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step"\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        read_metrics(path)


def test_read_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        read_metrics(tmp_path / "metrics.jsonl")


def test_sample_metrics_of_known_groups(make_group) -> None:
    groups = [make_group(0, [1.0, 0.0, 1.0, 0.0]), make_group(1, [1.0, 1.0, None, 1.0])]
    found = sample_metrics(groups)
    assert found["reward/mean"] == pytest.approx(5 / 7)
    assert found["reward/std"] == pytest.approx(math.sqrt((5 * (2 / 7) ** 2 + 2 * (5 / 7) ** 2) / 6))
    assert found["rewards/match/mean"] == found["reward/mean"]
    assert found["group/zero_spread_fraction"] == 0.5
    assert found["completions/mean_length"] == 2.5
    assert (found["completions/min_length"], found["completions/max_length"]) == (1, 4)
    assert found["completions/clipped_ratio"] == 0.25


def test_lengths_of_an_episode_count_what_is_trained_on_and_all_that_follows() -> None:
    rows_of = [Row([1], [2, 3, 9, 9, 4], [(0, 2), (4, 5)]), Row([1, 2], [5, 6])]
    turns = [Turn(0, 2), Turn(4, 5), Turn(0, 2, row=1)]
    long = Sample(rows_of, Stop.TURNS, (2, 4), turns, rewards={"f": 1.0}, reward=1.0)
    told = rows(5, Group(Prompt(0, [1], "p", {}), [long, one_row([1], stop=Stop.LENGTH)]))
    assert [told[0][name] for name in ("tokens", "length", "turns", "rows", "stop")] == [5, 7, 3, 2, "turns"]
    assert (told[0]["weight_version"], told[0]["last_weight_version"]) == (2, 4)
    found = sample_metrics([told])
    assert (found["completions/mean_length"], found["completions/max_length"]) == (3.0, 5.0)
    assert (found["episode/length"], found["completions/clipped_ratio"]) == (4.0, 0.5)


def test_rewards_are_told_apart_by_name_and_missing_ones_left_out(make_group) -> None:
    groups = [make_group(0, [1.0, 3.0], name="a"), make_group(1, [None, None], name="b")]
    found = sample_metrics(groups)
    assert found["rewards/a/mean"] == 2.0
    assert not any(name.startswith("rewards/b/") for name in found)
    assert sample_metrics([]) == {}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=5), min_size=1, max_size=5))
def test_sample_metrics_do_not_depend_on_the_order_of_groups(rewards_P_G: list[list[float]]) -> None:
    groups = [
        rows(
            1,
            Group(Prompt(index, [1], "p", {}), [one_row([1], rewards={"f": r}, reward=r) for r in rewards_G]),
        )
        for index, rewards_G in enumerate(rewards_P_G)
    ]
    found = sample_metrics(groups)
    assert found == pytest.approx(sample_metrics(groups[::-1]))
    flat = [reward for rewards_G in rewards_P_G for reward in rewards_G]
    assert found["reward/std"] == pytest.approx(statistics.stdev(flat), abs=1e-9)
    assert 0 <= found["group/zero_spread_fraction"] <= 1
