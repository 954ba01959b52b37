"""A taskset written in the public API of the real package verifiers, played by its agent."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import pytest
from optional import needs
from scripted import config, one, play, prompt, trained

from sapo_rl.environments.adapters.verifiers import Verifiers, tasks
from sapo_rl.environments.runner.pool import EnvironmentPool
from sapo_rl.errors import UserError
from sapo_rl.types import Stop

pytestmark = needs("verifiers")

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


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_sums.py").write_text(TASKSET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def add(said: str) -> str:
    found = re.findall(r"(\d+) \+ (\d+)\?", said)
    return str(sum(map(int, found[-1]))) if found[-1] != ("3", "3") else "I do not know"


def test_a_taskset_is_played_by_verifiers_agent_and_judged_by_its_rewards() -> None:
    cfg = config("verifiers", args={"taskset": "my_sums", "settings": {"first": 2}})
    groups = play(cfg, add, prompt(0, "a", task_index=0), prompt(1, "b", task_index=1))
    right, wrong = (group.samples[0] for group in groups)
    assert (right.rewards, wrong.rewards) == ({"environment": 1.25}, {"environment": 0.0})
    assert trained(right.rows[0]) == ["4<|im_end|>"] and right.stop is Stop.ENVIRONMENT
    assert right.rows[0].rollout_logps == [-0.5, -1.5]
    assert right.messages == [{"role": "assistant", "content": "4"}]


def test_a_reward_that_raises_fails_the_episode() -> None:
    with pytest.raises(UserError, match=r"'verifiers' failed on prompt 0: run: RuntimeError: .*no mood"):
        one(config("verifiers", args={"taskset": "my_sums"}), add, task_index=0)


def test_rows_are_made_of_a_taskset_and_held_out_ones_are_others() -> None:
    train, held_out = tasks("train", "my_sums", count=16), tasks("test", "my_sums", count=16)
    assert [row["task_index"] for row in held_out] == [7, 15]
    assert len(train) == 14 and train[3] == {"prompt": "3 + 3?", "task_index": 3}


def test_what_is_no_taskset_and_a_row_without_a_task_are_told() -> None:
    with pytest.raises(UserError, match=r"environment 'verifiers': taskset 'my_sumz': ModuleNotFoundError"):
        Verifiers("my_sumz")
    with pytest.raises(UserError, match=r"taskset 'my_sums': ValidationError: .*\n.*"):
        Verifiers("my_sums", settings={"second": 2})
    cfg = config("verifiers", args={"taskset": "my_sums"})
    with pytest.raises(UserError, match=r"failed on prompt 0: run: TypeError: the row's task_index is None, must be"):
        one(cfg, add, task_index=None)

    async def check() -> None:
        pool = EnvironmentPool(cfg)
        try:
            await pool.open()
            pool.check_columns({"answer": ""}, "the data")
        finally:
            await pool.close()

    with pytest.raises(UserError, match=r"'verifiers' needs 'task_index', which is no column of the data"):
        asyncio.run(check())


def test_without_the_package_the_line_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verifiers.v1", None)
    with pytest.raises(UserError, match=r"pip install 'sapo-train\[verifiers\]'$"):
        Verifiers("another")
