"""Environments in real worker processes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from games import MODULE

from sapo_rl.config import Config, EnvironmentConfig, RewardFunctionConfig
from sapo_rl.environments.runner.pool import EnvironmentPool
from sapo_rl.environments.runner.process import EnvironmentFailed, WorkerLost
from sapo_rl.errors import UserError

T = TypeVar("T")
forked = pytest.mark.usefixtures("forked_workers")
"""Of those whose tools take seconds to describe in a process that begins anew."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_games.py").write_text(MODULE)
    return tmp_path


def config(name: str | None, tools: tuple[str, ...] = (), workers: int = 1, **settings: Any) -> Config:
    found = Config(environment=EnvironmentConfig(name, workers=workers, **settings), tools=[*tools])
    found.reward.functions = {"match": RewardFunctionConfig("exact_match")}
    return found


def run(cfg: Config, work: Callable[[EnvironmentPool], Awaitable[T]], log: Path | None = None) -> T:
    """Do `work` with an open pool, and close it."""

    async def whole() -> T:
        pool = EnvironmentPool(cfg, log=log)
        try:
            await pool.open()
            return await work(pool)
        finally:
            await pool.close()

    return asyncio.run(whole())


async def episode(pool: EnvironmentPool, *replies: str, **row: Any) -> list[Any]:
    """Play an episode with these replies; what was answered, and the reward at its end."""
    async with await pool.seat() as seat:
        opening = await seat.reset(row, seed=7)
        steps = [await seat.step(reply) for reply in replies]
        return [opening, *steps, (await seat.end())[0]]


def processes_left(here: Path) -> list[int]:
    return [pid for file in here.glob("worker.*") if psutil.pid_exists(pid := int(file.suffix[1:]))]


def test_a_gym_answers_replies_rewards_them_and_says_when_it_is_over(here: Path) -> None:
    opening, first, second, reward = run(
        config("my_games.Echo", args={"turns": 2}), lambda pool: episode(pool, "a", "b", word="w")
    )
    assert (opening, reward) == (None, None)
    assert first == ([{"role": "user", "content": "you said a"}], 0.5, False, {"heard": 1, "drawn": 7})
    assert second == ([], 0.5, True, {"heard": 2, "drawn": 7})
    assert (here / "closed").exists() and processes_left(here) == []


def test_coroutines_of_many_episodes_wait_side_by_side(here: Path) -> None:
    async def work(pool: EnvironmentPool) -> list[Any]:
        return await asyncio.gather(*(episode(pool, "a") for _ in range(50)))

    assert len(run(config("my_games.Meeting", workers=1), work)) == 50


@pytest.mark.parametrize(("last", "done"), [("terminated", True), ("truncated", True), ("neither", False)])
def test_a_gymnasium_environment_is_played_as_it_is(here: Path, last: str, done: bool) -> None:
    opening, step, _ = run(config("my_games.Gymnasium", args={"last": last}), lambda pool: episode(pool, "x"))
    assert opening == "begin"
    assert step == ([{"role": "user", "content": "you did x"}], 1.0, done, {"action": "x"})


def test_tools_of_an_object_and_of_functions_are_described_and_called(here: Path) -> None:
    async def work(pool: EnvironmentPool) -> tuple[list[Any], list[Any]]:
        async with await pool.seat() as seat:
            opening = await seat.reset({"word": "ab"}, seed=0)
            calls = [("look", {"place": 2}), ("double", {"number": 4}), ("look", {"place": 0}), ("find", {})]
            used = [await seat.use(name, arguments) for name, arguments in [*calls, ("finish", {})]]
            return [opening, *used, await seat.end()], pool.schemas

    (opening, look, double, wrong, unknown, finish, end), schemas = run(
        config("my_games.Shelf", tools=("my_games.double",)), work
    )
    assert opening == " There is a shelf."
    assert (look.text, look.failed, double.text) == ("abab", False, "8")
    assert wrong.failed and "places begin at 1" in wrong.text
    assert unknown.failed and "there is no tool 'find'" in unknown.text
    assert finish.done and not look.done
    assert (end.reward, end.parts) == (2.25, {"read": 2.0, "bonus": 0.25})
    assert {schema["function"]["name"] for schema in schemas} == {"look", "finish", "double"}
    assert schemas[-1]["function"]["description"]


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        ("my_games.Mute", {}, r"^environment 'my_games\.Mute' has neither a method step nor one that is a tool$"),
        ("my_games.double", {"number": 3}, r"^environment 'my_games\.double' has no method reset$"),
        (
            "my_games.Echo",
            {"turn": 3},
            r"^environment\.args\.turn: unknown argument; did you mean 'turns'\?",
        ),
        ("my_games.Echo", {"turns": "3"}, r"^environment\.args\.turns: '3' is a str, must be int$"),
        ("my_games.make_echo", {}, r"^environment\.args: 'turns' is missing$"),
        (
            "my_games.Nothing",
            {},
            r"^environment 'my_games\.Nothing': 'my_games' has no 'Nothing'; did you mean 'Meeting'",
        ),
        ("guess", {"low": 5, "high": 2}, r"^environment 'guess': ValueError: low is 5, must be below high = 2$"),
    ],
)
def test_what_is_no_environment_is_refused_at_the_start(here: Path, name: str, args: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        run(config(name, args=args), lambda pool: episode(pool))


@forked
def test_an_environment_without_any_reward_is_refused(here: Path) -> None:
    cfg = config("calculator")
    cfg.reward.functions = {}
    with pytest.raises(UserError, match=r"'calculator' gives no reward; name one, e\.g\. with reward=numeric$"):
        run(cfg, lambda pool: episode(pool))


@forked
def test_columns_that_reset_cannot_do_without_are_refused(here: Path) -> None:
    async def work(pool: EnvironmentPool) -> None:
        pool.check_columns({"word": "a", "answer": ""}, "the data")
        with pytest.raises(UserError, match=r"'my_games\.Shelf' needs 'word', which is no column of the data"):
            pool.check_columns({"answer": ""}, "the data")

    run(config("my_games.Shelf"), work)


@forked
@pytest.mark.parametrize(
    ("documents", "told"),
    [
        ("a text", r"documents is a str, must be a list of \{title, text\} or \{title, sentences\}"),
        ([{"title": "A", "text": "a"}, {"title": "B"}], r"documents\[1\] must have a title, and a text or sentences"),
    ],
)
def test_a_row_with_which_a_built_in_cannot_begin_is_refused_at_the_start(
    here: Path, documents: Any, told: str
) -> None:
    async def work(pool: EnvironmentPool) -> None:
        pool.check_columns({"documents": [{"title": "A", "sentences": ["a"]}]}, "the data")
        pool.check_columns({"documents": None}, "the data")  # of another environment
        with pytest.raises(UserError, match=rf"'search' cannot begin with the first row of the data: {told}"):
            pool.check_columns({"documents": documents}, "the data")

    run(config("search"), work)


@forked
def test_a_row_that_is_too_long_fails_its_episode_alone(here: Path) -> None:
    async def work(pool: EnvironmentPool) -> None:
        async with await pool.seat() as one:
            with pytest.raises(
                EnvironmentFailed, match=r"reset: its row has 1\d,\d{3},\d{3} bytes, more than 16,777,216"
            ):
                await one.reset({"word": "a" * (1 << 24)}, 0)
        async with await pool.seat() as other:
            await other.reset({"word": "a"}, 0)

    run(config("my_games.Shelf"), work)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ("'hello'", r"^step returned 'hello'; must return \(observation, reward, done\) or .* \(.*games\.py:\d+\)$"),
        ("('a', 1.0)", r"^step returned \('a', 1\.0\); must return \(observation, reward, done\)"),
        ("('a', 'b', False)", r"^step returned 'b'; must return a finite number as its reward"),
        ("('a', float('nan'), False)", r"^step returned nan; must return a finite number"),
        ("(3, 1.0, False)", r"^step returned 3; must be text, or messages with the texts role and content$"),
        ("(None, 1.0, False)", r"^step returned no observation and not done"),
        ("([], 1.0, False)", r"^step returned no observation and not done"),
        ("('a' * 2**24, 1.0, False)", r"^step: its answer has 16,777,\d+ bytes, more than 16,777,216$"),
        ("('a', 1.0, False, {'x': {1}})", r"^info holds what JSON does not: Object of type set"),
    ],
)
def test_a_step_that_returns_garbage_fails_by_name(here: Path, found: str, told: str) -> None:
    with pytest.raises(EnvironmentFailed, match=told):
        run(config("my_games.Answers", args={"found": found}), lambda pool: episode(pool, "a"))


def test_one_whose_reward_fails_is_closed_all_the_same(here: Path) -> None:
    with pytest.raises(EnvironmentFailed, match=r"^get_reward: ValueError: no verdict \(.*games\.py:\d+\)$"):
        run(config("my_games.Undecided"), lambda pool: episode(pool, "a"))
    assert (here / "closed").exists()


def test_what_an_environment_raises_is_told_with_its_line(here: Path) -> None:
    with pytest.raises(EnvironmentFailed, match=r"^step: ValueError: no mood \(.*games\.py:\d+\)$"):
        run(config("my_games.Echo"), lambda pool: episode(pool, "do fail"))
    with pytest.raises(EnvironmentFailed, match=r"^reset: ValueError: no game today"):
        run(config("my_games.Echo"), lambda pool: episode(pool, word="reset"))


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        ("do hang", r"^took longer than 1 s \(environment\.turn_timeout\)$"),
        ("do die", r"^its process ended by signal 9 \(Killed\); what it printed: .*log$"),
        ("do exit", r"^its process ended with exit code 3"),
        ("do scribble", r"^it wrote to a file descriptor that is not its own"),
    ],
)
def test_a_process_that_is_lost_is_replaced_and_its_episode_suspected(here: Path, reply: str, told: str) -> None:
    async def work(pool: EnvironmentPool) -> list[Any]:
        async with await pool.seat() as other:
            await other.reset({}, seed=0)
            with pytest.raises(WorkerLost, match=told) as lost:
                await episode(pool, reply)
            assert lost.value.suspect
            with pytest.raises(WorkerLost, match=told) as lost:
                await other.step("a")
            assert not lost.value.suspect
        return await episode(pool, "a")

    found = run(config("my_games.Echo", turn_timeout=1.0), work, here / "log")
    assert found[1].messages[0]["content"] == "you said a"
    assert processes_left(here) == []


QUEUE = """
import asyncio, contextlib, os
from sapo_rl.environments.turns import in_turn

@contextlib.asynccontextmanager
async def room():
    while not os.path.exists("free"):
        await asyncio.sleep(0.01)
    yield

class Queue:
    def reset(self): pass
    async def step(self, reply):
        if reply == "enter":
            async with in_turn(room()):
                return "served", 0.0, False
        if reply == "in turns":
            for _ in range(100):
                await asyncio.sleep(0.1)
                async with in_turn(contextlib.nullcontext()):
                    pass
        return "heard", 0.0, False
"""


def test_a_call_that_waits_for_its_turn_is_not_late(here: Path) -> None:
    (here / "queue_game.py").write_text(QUEUE)

    async def work(pool: EnvironmentPool) -> str:
        async with await pool.seat() as waiting, await pool.seat() as other:
            await waiting.reset({}, seed=0)
            await other.reset({}, seed=0)
            entering = asyncio.create_task(waiting.step("enter"))
            end = time.monotonic() + 3.0
            while time.monotonic() < end:
                await other.step("a")
                await asyncio.sleep(0.05)
            (here / "free").touch()
            return (await entering).messages[0]["content"]

    assert run(config("queue_game.Queue", turn_timeout=2.0), work) == "served"


def test_what_a_call_took_before_it_waited_for_its_turn_counts(here: Path) -> None:
    (here / "queue_game.py").write_text(QUEUE)

    async def work(pool: EnvironmentPool) -> bool:
        async with await pool.seat() as seat:
            await seat.reset({}, seed=0)
            with pytest.raises(WorkerLost, match=r"took longer than 1 s \(environment\.turn_timeout\)") as lost:
                await seat.step("in turns")
            return lost.value.suspect

    assert run(config("queue_game.Queue", turn_timeout=1.0), work)


def test_one_that_is_killed_from_outside_blames_nobody(here: Path) -> None:
    async def work(pool: EnvironmentPool) -> bool:
        async with await pool.seat() as seat:
            await seat.reset({}, seed=0)
            (file,) = here.glob("worker.*")
            os.kill(int(file.suffix[1:]), signal.SIGKILL)
            with pytest.raises(WorkerLost) as lost:
                while True:
                    await seat.step("a")
            return lost.value.suspect

    assert run(config("my_games.Echo", args={"turns": 10**9}), work) is False


def test_a_fork_that_returns_answers_once(here: Path) -> None:
    found = run(config("my_games.Echo"), lambda pool: episode(pool, "do fork", "b"))
    assert [step.info["heard"] for step in found[1:-1]] == [1, 2]
    assert processes_left(here) == []


def test_what_is_printed_goes_to_the_log_which_is_bounded(here: Path) -> None:
    run(config("my_games.Echo"), lambda pool: episode(pool, "do shout", "b"), here / "logs/environments.log")
    assert (here / "logs/environments.log").stat().st_size <= 2**26


def test_what_an_environment_has_started_ends_with_the_pool(here: Path) -> None:
    run(config("my_games.Echo"), lambda pool: episode(pool, "do leave"))
    assert len([*here.glob("worker.*")]) == 3 and processes_left(here) == []


def test_secrets_are_hidden_but_for_those_that_are_allowed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCH_API_KEY", "value")
    (here / "keys.py").write_text(
        "import os\nclass Key:\n    def reset(self): return os.environ['SEARCH_API_KEY']\n"
        "    def step(self, reply): return None, 0, True\n"
    )
    cfg = config("keys.Key")
    with pytest.raises(EnvironmentFailed, match=r"KeyError.*reward\.env=\[SEARCH_API_KEY\] lets"):
        run(cfg, lambda pool: episode(pool))
    cfg.reward.env = ["SEARCH_API_KEY"]
    assert run(cfg, lambda pool: episode(pool))[0] == "value"
