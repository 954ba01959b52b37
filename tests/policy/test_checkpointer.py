"""Which checkpoints a run keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny import make_tokenizer, small_llama

from sapo_rl.config import CheckpointConfig, Config
from sapo_rl.errors import SharedError
from sapo_rl.policy.checkpointer import Checkpointer
from sapo_rl.policy.manifest import read_record
from sapo_rl.policy.model import Policy
from sapo_rl.policy.trainer import PolicyTrainer
from sapo_rl.run.api import Run
from sapo_rl.run.subjects import subject_at, subjects_of

METRIC = "eval/hard/pass@4"


@pytest.fixture(scope="module")
def trainer() -> PolicyTrainer:
    return PolicyTrainer(Policy(small_llama(17), torch.float32), None, Config(), Accelerator(cpu=True))


def opened(folder: Path, trainer: PolicyTrainer, state: Any = None, **settings: Any) -> Checkpointer:
    settings = {"every": 2, "keep_last": 1, "keep_best": METRIC, "save_final": False} | settings
    tokenizer: Any = None  # goes with the final model alone
    return Checkpointer(folder, trainer, tokenizer, CheckpointConfig(**settings), state)


def go_on(checkpoints: Checkpointer, values: dict[int, float], until: int) -> None:
    """Make the steps up to one, as the loop does: an evaluation after those that have a value."""
    for step in range(min(values, default=until), until + 1):
        best = step in values and checkpoints.is_best(step, {METRIC: values[step], "eval/reward": -step})
        if best or step % 2 == 0:
            checkpoints.save(step, {"config": "model: {path: x}"}, {})


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_best_is_kept_beside_the_newest_and_of_equal_ones_the_first(tmp_path: Path, trainer: PolicyTrainer) -> None:
    values = {0: 0.9, 1: 0.2, 3: 0.5, 5: 0.5, 7: float("nan"), 9: 0.4}  # before the first step nothing is saved
    seen = {}
    for until in (1, 2, 3, 8, 9):
        checkpoints = opened(tmp_path / str(until), trainer)
        (tmp_path / str(until)).mkdir()
        go_on(checkpoints, values, until)
        link = (tmp_path / str(until) / "checkpoints/best").readlink().name
        seen[until] = (link, [name for name in kept(tmp_path / str(until)) if name != "best"])
    assert seen == {
        1: ("step_000001", ["step_000001"]),
        2: ("step_000001", ["step_000001", "step_000002"]),
        3: ("step_000003", ["step_000003"]),
        8: ("step_000003", ["step_000003", "step_000008"]),
        9: ("step_000003", ["step_000003", "step_000008"]),
    }
    best = subject_at(str(tmp_path / "9/checkpoints/best"))
    assert (best.step, best.path) == (3, str(tmp_path / "9/checkpoints/step_000003"))
    assert Run(tmp_path / "9").best == tmp_path / "9/checkpoints/step_000003"
    assert [one.step for one in subjects_of([f"{tmp_path}/9/checkpoints/*"])] == [3, 8]


def test_a_resumed_run_knows_the_best_so_far_by_the_same_metric_alone(tmp_path: Path, trainer: PolicyTrainer) -> None:
    go_on(opened(tmp_path, trainer), {1: 0.5, 3: 0.4}, until=4)
    state = read_record(tmp_path / "checkpoints/step_000004")["state"]
    assert state["best"] == {"metric": METRIC, "step": 1, "value": 0.5}
    assert opened(tmp_path, trainer, state, keep_best="eval/reward").is_best(5, {"eval/reward": 0.1})
    again = opened(tmp_path, trainer, state)
    assert not again.is_best(5, {METRIC: 0.5})
    go_on(again, {6: 0.1}, until=6)
    assert kept(tmp_path) == ["best", "step_000001", "step_000006"]
    go_on(again, {7: 0.6}, until=8)
    assert kept(tmp_path) == ["best", "step_000007", "step_000008"]
    go_on(opened(tmp_path, trainer, state, keep_best=None), {}, until=10)
    assert kept(tmp_path) == ["step_000010"]  # with what was the best by then, the link to it has gone
    state["best"]["step"] = 5  # a fork has not taken it along
    assert opened(tmp_path, trainer, state).is_best(9, {METRIC: 0.1})


def test_without_regular_checkpoints_the_best_alone_is_kept(tmp_path: Path, trainer: PolicyTrainer) -> None:
    checkpoints = opened(tmp_path, trainer, every=0)
    for step, value in enumerate((0.1, 0.3, 0.2), start=1):
        if checkpoints.is_best(step, {METRIC: value}):
            checkpoints.save(step, {}, {})
    checkpoints.finish(3, {}, {}, complete=True)
    assert kept(tmp_path) == ["best", "step_000002"]


def test_the_trained_model_has_its_card_and_anybody_may_read_it(tmp_path: Path, trainer: PolicyTrainer) -> None:
    settings = CheckpointConfig(every=0)
    checkpoints = Checkpointer(tmp_path, trainer, make_tokenizer(), settings, card=lambda step: f"# after {step}\n")
    checkpoints.finish(7, {}, {}, complete=False)
    assert not (tmp_path / "final").exists()
    checkpoints.finish(7, {}, {}, complete=True)
    assert (tmp_path / "final/README.md").read_text() == "# after 7\n"
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in (tmp_path / "final").iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_a_step_is_saved_once_at_the_end_of_a_run(tmp_path: Path, trainer: PolicyTrainer) -> None:
    checkpoints = opened(tmp_path, trainer)
    go_on(checkpoints, {1: 0.5, 3: 0.6}, until=3)
    before = (tmp_path / "checkpoints/step_000003").stat().st_ino
    checkpoints.finish(3, {}, {}, complete=True)
    assert (tmp_path / "checkpoints/step_000003").stat().st_ino == before
    checkpoints.finish(5, {}, {}, complete=False)
    assert kept(tmp_path) == ["best", "step_000003", "step_000005"]


def test_a_number_that_no_evaluation_has_is_refused_and_one_that_is_missing_now_and_then_is_not(
    tmp_path: Path, trainer: PolicyTrainer
) -> None:
    checkpoints = opened(tmp_path, trainer)
    with pytest.raises(SharedError, match=r"keep_best: no evaluation has 'eval/hard/pass@4'.*eval/hard/pass@8"):
        checkpoints.is_best(0, {"eval/hard/pass@8": 0.5})
    assert not checkpoints.is_best(0, {METRIC: 0.5})
    assert not checkpoints.is_best(1, {"eval/hard/pass@8": 0.5})
    assert checkpoints.is_best(1, {METRIC: 0.0})
    assert not checkpoints.is_best(2, {"eval/hard/pass@8": 0.5})
    assert not opened(tmp_path, trainer, keep_best=None).is_best(1, {})
