"""Training from Python, in processes of its own: callbacks, functions of this process, a stop and a resume."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
from tiny import PLAIN, make_workspace

from sapo_rl.errors import UserError
from sapo_rl.run import start
from sapo_rl.run.api import Run, train

pytestmark = pytest.mark.e2e


def digits(completions: list[str], **columns: Any) -> list[float]:
    return [float(sum(character.isdigit() for character in text)) for text in completions]


class Recorder:
    """Keeps what it is told, and ends the run after a step."""

    def __init__(self, last: int) -> None:
        self.last, self.steps, self.evals = last, list[int](), list[tuple[int, float]]()

    def on_step(self, step: int, metrics: dict[str, Any]) -> bool:
        self.steps.append(step)
        return step == self.last

    def on_eval(self, step: int, metrics: dict[str, Any]) -> None:
        self.evals.append((step, metrics["eval/reward"]))


@pytest.fixture(autouse=True)
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": forked.Popen}))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    return make_workspace(folder, tiny_model, eval={"every": 2, "prompts": 8}, logging={"wandb": "off"})


def test_a_callback_stops_a_run_that_goes_on_with_the_functions_it_had(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    local = lambda completions, **columns: digits(completions)  # noqa: E731  # no worker can import it
    first = Recorder(last=2)
    run = train("tiny.yaml", ["trainer.steps=400", PLAIN], rewards={"digits": local}, callbacks=[first])
    done = run.metrics.index[-1]
    assert first.steps == list(range(1, done + 1)) and 2 <= done < 400
    assert first.evals[0][0] == 0 and run.final is None
    assert run.metrics.loc[1:, "reward/mean"].notna().all()
    words = run.completions(1)
    assert words["rewards/digits"].to_list() == digits(words["completion"].to_list())

    with pytest.raises(UserError, match=r"reward.functions.digits: is a function of the Python session"):
        train(resume=run)
    second = Recorder(last=0)
    again = train(resume=run, overrides=[f"trainer.steps={done + 2}"], rewards={"digits": local}, callbacks=[second])
    assert again.folder == run.folder and again.final is not None
    assert second.steps == [done + 1, done + 2]
    assert list(again.metrics.index) == list(range(done + 3))


def test_what_fails_in_the_training_is_raised_here(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workspace)

    def fails(completions: list[str], **columns: Any) -> list[float]:
        raise ValueError("out of ideas")

    with pytest.raises(UserError, match=r"reward function 'fails' .*\n?.*ValueError: out of ideas"):
        train("tiny.yaml", ["eval.every=0", PLAIN], rewards=[fails])
    assert "out of ideas" not in capsys.readouterr().err

    class Fails:
        def on_step(self, step: int, metrics: dict[str, Any]) -> None:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train("tiny.yaml", ["trainer.steps=400", "run_dir=stopped", PLAIN], callbacks=[Fails()])
    assert list((workspace / "stopped/checkpoints").glob("step_*"))
    assert Run(workspace / "stopped").metrics.index[-1] < 400
