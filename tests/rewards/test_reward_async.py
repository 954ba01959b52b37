"""The pool with coroutine functions: many calls under way in one worker, and those that misbehave there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rewards.groups import group, rewards

from sapo_rl.config import RewardConfig, RewardFunctionConfig
from sapo_rl.errors import UserError
from sapo_rl.rewards import RewardPool, check_function

pytestmark = pytest.mark.usefixtures("forked_workers")

MODULE = """
import asyncio, os, signal, time
from pathlib import Path

begun, at_once, loops = 0, 0, set()

async def meets(completions, *, count, **columns):
    \"\"\"Ends only once `count` calls have begun.\"\"\"
    global begun
    begun += 1
    while begun % count:
        await asyncio.sleep(0.01)
    return [float(len(completions)) for _ in completions]

async def counts(completions, **columns):
    \"\"\"The calls under way, this one included.\"\"\"
    global at_once
    at_once += 1
    found = at_once
    for _ in range(20):
        await asyncio.sleep(0.01)
        found = max(found, at_once)
    at_once -= 1
    return [float(found) for _ in completions]

class Judge:
    async def __call__(self, completions, **columns):
        loops.add(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return [float(len(loops)) for _ in completions]

judge = Judge()

async def inner(count):
    await asyncio.sleep(0.001)
    return float(count)

def plain(completions, **columns):
    return [asyncio.run(inner(len(completions))) for _ in completions]

async def blocks(completions, **columns):
    time.sleep(0.3)
    return [1.0 for _ in completions]

async def moody(completions, **columns):
    Path(f"worker.{os.getpid()}").touch()
    await asyncio.sleep(0.2)
    for text in completions:
        if text == "raise":
            raise ValueError("no mood")
        if text == "hang":
            await asyncio.sleep(1000)
        if text == "go on":
            while True:
                try:
                    await asyncio.sleep(1000)
                except asyncio.CancelledError:
                    pass
        if text == "block":
            time.sleep(1000)
        if text == "die":
            os._exit(76)
        if text == "once" and not Path("once").exists():
            Path("once").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(completions)) for _ in completions]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "async_rewards.py").write_text(MODULE)
    return tmp_path


def config(workers: int = 1, **functions: Any) -> RewardConfig:
    chosen = {name: RewardFunctionConfig(f"async_rewards.{name}", **settings) for name, settings in functions.items()}
    return RewardConfig(chosen, workers)


@pytest.mark.parametrize(("count", "size"), [(8, 4), (32, 1)])
def test_one_worker_has_many_calls_of_a_coroutine_function_under_way(here: Path, count: int, size: int) -> None:
    groups = [group(index, ["a"] * size) for index in range(count)]
    with RewardPool(config(meets={"args": {"count": count}, "timeout": 60})) as pool:
        groups, stats = pool.score(groups)
        assert stats.errors == {"meets": 0}
    assert rewards(groups, "meets") == [[float(size)] * size] * count


@pytest.mark.parametrize("limit", [1, 3])
def test_concurrency_bounds_the_calls_under_way(here: Path, limit: int) -> None:
    groups = [group(index, ["a"]) for index in range(7)]
    with RewardPool(config(counts={"concurrency": limit})) as pool:
        groups, _ = pool.score(groups)
    assert max(found for (found,) in rewards(groups, "counts") if found is not None) == limit


def test_coroutine_functions_share_a_worker_with_plain_ones_and_keep_their_event_loop(here: Path) -> None:
    groups = [group(index, ["a", "b"]) for index in range(6)]
    with RewardPool(config(judge={}, plain={}, meets={"args": {"count": 3}, "timeout": 60})) as pool:
        groups = [*pool.score(groups[:3]).groups, *pool.score(groups[3:]).groups]
    assert rewards(groups, "judge") == [[1.0, 1.0]] * 6
    assert rewards(groups, "plain") == rewards(groups, "meets") == [[2.0, 2.0]] * 6


def test_a_call_that_is_late_is_cancelled_and_takes_no_other_down(here: Path) -> None:
    groups = [group(0, ["a", "b"]), group(1, ["a", "hang"]), group(2, ["raise"]), group(3, ["a"])]
    with RewardPool(config(moody={"timeout": 1.0, "on_error": "zero"})) as pool:
        groups, stats = pool.score(groups)
    assert rewards(groups, "moody") == [[2.0, 2.0], [1.0, 0.0], [0.0], [1.0]]
    assert stats.errors == {"moody": 2}
    assert len([*here.glob("worker.*")]) == 1


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("die", "its process ended with exit code 76"),
        ("block", "took longer than 1 s"),
        ("go on", "took longer than 1 s"),
    ],
)
def test_of_the_calls_in_a_worker_that_had_to_die_only_the_culprit_is_blamed(here: Path, text: str, cause: str) -> None:
    groups = [group(0, ["a", "b"]), group(1, [text]), group(2, ["a", "b", "c"]), group(3, ["a"])]
    with RewardPool(config(moody={"timeout": 1.0, "on_error": "zero"})) as pool:
        groups, stats = pool.score(groups)
    assert rewards(groups, "moody") == [[2.0, 2.0], [0.0], [3.0, 3.0, 3.0], [1.0]]
    assert stats.errors == {"moody": 1}
    assert f"prompt 1: {cause}" in stats.failures["moody"]


def test_a_worker_that_dies_once_with_many_calls_under_way_is_nobodys_fault(here: Path) -> None:
    groups = [group(0, ["a", "b"]), group(1, ["a", "once", "b"]), group(2, ["a"])]
    with RewardPool(config(moody={})) as pool:
        groups, stats = pool.score(groups)
        assert stats.errors == {"moody": 0}
    assert (here / "once").exists()
    assert rewards(groups, "moody") == [[2.0, 2.0], [3.0, 3.0, 3.0], [1.0]]


def test_a_coroutine_function_that_never_waits_has_its_time_limit_for_each_call(here: Path) -> None:
    groups = [group(index, ["a"]) for index in range(8)]  # longer than the limit, all together
    with RewardPool(config(blocks={"timeout": 1.5})) as pool:
        groups, stats = pool.score(groups)
        assert stats.errors == {"blocks": 0}
    assert rewards(groups, "blocks") == [[1.0]] * 8


def test_more_than_one_call_at_once_of_a_plain_function_is_refused(here: Path) -> None:
    message = r"reward\.functions\.plain\.concurrency: is 2, but 'async_rewards\.plain' is no `async def`"
    with pytest.raises(UserError, match=message), RewardPool(config(plain={"concurrency": 2})):
        pass
    with pytest.raises(UserError, match=r"reward\.functions\.f\.concurrency: is 2, but 'exact_match' is no"):
        check_function("f", RewardFunctionConfig("exact_match", concurrency=2))
    with RewardPool(config(plain={"concurrency": 1})):
        pass
