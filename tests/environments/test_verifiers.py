"""A taskset written in the public API of the real package verifiers, played by its agent."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from optional import needs
from scripted import config, playing, prompt, trained

from sapo_rl.environments.adapters.verifiers import Verifiers, tasks
from sapo_rl.environments.runner.pool import EnvironmentPool, pools_of
from sapo_rl.errors import UserError
from sapo_rl.rollout.episodes import Episodes
from sapo_rl.types import Stop

pytestmark = needs("verifiers")
CONFIG = config("verifiers", args={"taskset": "my_sums", "settings": {"first": 2}})

TASKSET = """
import verifiers.v1 as vf


class Sum(vf.TaskData):
    answer: str


class SumTask(vf.Task[Sum]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        if trace.last_reply == "0":
            raise ValueError("no mood")
        return float((trace.last_reply or "") == self.data.answer)

    @vf.reward(weight=0.25)
    async def brief(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply or "") <= 2)


class SumsConfig(vf.TasksetConfig):
    first: int = 0


class Sums(vf.Taskset[SumTask, SumsConfig]):
    INFINITE = True

    def load(self):
        number = self.config.first
        while True:
            data = Sum(prompt=f"{number} + {number}?", system_prompt="Add.", answer=str(2 * number))
            yield SumTask(data, self.config.task)
            number += 1


__all__ = ["Sums"]
"""


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("sums")
    (folder / "my_sums.py").write_text(TASKSET)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        yield folder


@pytest.fixture(scope="module")
def pools() -> dict[str, EnvironmentPool]:
    return pools_of(CONFIG)


@pytest.fixture(scope="module")
def episodes(here: Path, pools: dict[str, EnvironmentPool]) -> Iterator[Episodes]:
    """All with the same worker: it takes eight seconds to import the package."""
    with playing(CONFIG, add, pools=pools) as (found, _):
        yield found


def add(said: str) -> str:
    a, b = re.findall(r"(\d+) \+ (\d+)\?", said)[-1]
    return {"3": "I do not know", "4": "0"}.get(a, str(int(a) + int(b)))


def test_a_taskset_is_played_by_verifiers_agent_and_judged_by_its_rewards(episodes: Episodes) -> None:
    asked = [prompt(0, "a", task_index=0), prompt(1, "b", task_index=1)]
    right, wrong = (group.samples[0] for group in episodes.write(asked, step=1).groups)
    assert (right.rewards, wrong.rewards) == ({"environment": 1.25}, {"environment": 0.0})
    assert trained(right.rows[0]) == ["4<|im_end|>"] and right.stop is Stop.ENVIRONMENT
    assert right.rows[0].rollout_logps == [-0.5, -1.5]
    assert right.messages == [{"role": "assistant", "content": "4"}]


def test_a_reward_that_raises_fails_the_episode(episodes: Episodes) -> None:
    with pytest.raises(UserError, match=r"'verifiers' failed on prompt 0: run: RuntimeError: .*no mood"):
        episodes.write([prompt(task_index=2)], step=1)


def test_rows_are_made_of_a_taskset_and_held_out_ones_are_others() -> None:
    train, held_out = tasks("train", "my_sums", count=16), tasks("test", "my_sums", count=16)
    assert [row["task_index"] for row in held_out] == [7, 15]
    assert len(train) == 14 and train[3] == {"prompt": "3 + 3?", "task_index": 3}


def test_what_is_no_taskset_and_a_row_without_a_task_are_told(
    episodes: Episodes, pools: dict[str, EnvironmentPool]
) -> None:
    with pytest.raises(UserError, match=r"environment 'verifiers': taskset 'my_sumz': ModuleNotFoundError"):
        Verifiers("my_sumz")
    with pytest.raises(UserError, match=r"taskset 'my_sums': ValidationError: .*\n.*"):
        Verifiers("my_sums", settings={"second": 2})
    with pytest.raises(UserError, match=r"failed on prompt 0: run: TypeError: the row's task_index is None, must be"):
        episodes.write([prompt(task_index=None)], step=1)
    with pytest.raises(UserError, match=r"'verifiers' needs 'task_index', which is no column of the data"):
        pools[""].check_columns({"answer": ""}, "the data")


def test_without_the_package_the_line_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verifiers.v1", None)
    with pytest.raises(UserError, match=r"pip install 'sapo-train\[verifiers\]'$"):
        Verifiers("another")
