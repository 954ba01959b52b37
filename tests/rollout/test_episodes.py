"""Episodes between an engine that says what the test has it say and environments in real processes."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from games import MODULE
from scripted import ASSISTANT, TOKENIZER, call_of, config, one, play, play_high_low, playing, prompt, trained

from sapo_rl.config import Config, EnvironmentConfig, RewardConfig, RewardFunctionConfig
from sapo_rl.engines.base import Request, Sampling
from sapo_rl.errors import UserError
from sapo_rl.rewards import RewardPool, Scoring, squad_f1
from sapo_rl.rewards.runner.scoring import call_arguments
from sapo_rl.rewards.runner.sheet import Place
from sapo_rl.rollout.collector import Rollouts, greedy_of, sampling_of, seed_of
from sapo_rl.rollout.dispatch import Session
from sapo_rl.rollout.refill import kept, write_refilled
from sapo_rl.telemetry.metrics import sample_metrics
from sapo_rl.telemetry.sinks.completions import rows
from sapo_rl.types import Group, RewardStats, Scores, Stop

pytestmark = pytest.mark.usefixtures("forked_workers")

PARTS = {"environment/read": 1.0, "environment/bonus": 0.25}
"""Of the reward of `Shelf`, one place of which was looked at."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_games.py").write_text(MODULE)
    return tmp_path


def test_a_game_is_played_to_its_end_and_only_what_the_model_wrote_is_trained_on(here: Path) -> None:
    group = play(config("guess", args={"low": 1, "high": 100}), play_high_low, prompt(answer="62"))[0]
    for sample in group.samples:
        (row,) = sample.rows
        assert TOKENIZER.decode(row.prompt_ids) == f"<|im_start|>user\nGo.<|im_end|>\n{ASSISTANT}"
        assert trained(row) == ["50<|im_end|>", "75<|im_end|>", "62<|im_end|>"]
        assert row.rollout_logps == [-0.5, -1.5, -2.5] * 3
        assert [(turn.start, turn.end) for turn in sample.turns] == row.loss_mask
        assert sample.stop is Stop.ENVIRONMENT and sample.rewards == {"environment": 1.0}
        assert sample.info["rewards"] == [0.0, 0.0, 1.0]
        assert sample.text == "assistant: 50\n\nuser: higher\n\nassistant: 75\n\nuser: lower\n\nassistant: 62"
        assert sample.opening == [{"role": "user", "content": "Go."}]
    assert call_arguments([Place(group.prompt, group.samples[1])])["completions"][0][:2] == [
        {"role": "assistant", "content": "50"},
        {"role": "user", "content": "higher"},
    ]


SEEN = '''
class Counter:
    """TRL's shape, with what reward functions look at."""

    def __init__(self):
        self.count, self.names, self._hidden = 0, ["a"], 1
        self.handle, self.long, self.endless = open(__file__), "x" * 70_000, float("nan")

    def reset(self, **row):
        return None

    def add(self, by: int) -> str:
        """Add to the counter.

        Args:
            by: How much.
        """
        self.count += by
        return str(self.count)

    @property
    def twice(self):
        return 2 * self.count

    @property
    def broken(self):
        raise RuntimeError("no")


def counted(environments, **columns):
    return [one.count + one.twice + len(one.names) for one in environments]


async def counted_later(completions, environments=None, **columns):
    return [float(environments[0].count)] * len(completions)


def ranked(completions, environments, answer, **columns):
    counts = [one.count for one in environments]
    assert len(answer) == 2 and [said[1]["content"] for said in completions] == [str(count) for count in counts]
    return [float(sum(other < count for other in counts)) for count in counts]


def looks_too_far(environments):
    return [one.handle for one in environments]
'''


def test_reward_functions_see_the_environments_that_were_played_where_they_ask(here: Path) -> None:
    (here / "my_counter.py").write_text(SEEN)
    cfg = config("my_counter.Counter")

    def script(said: str) -> str:
        return "5" if "tool" in said else call_of("add", by=5)

    with playing(cfg, script, states=True) as (episodes, engine):
        engine.seeded[seed_of(cfg.seed, 2, 0, 1, 1)] = call_of("add", by=7)
        group, other = (episodes.write([prompt(answer="5")], step).groups[0] for step in (1, 2))
    assert [sample.info["state"] for sample in group.samples] == [{"count": 5, "names": ["a"], "twice": 10}] * 2
    functions = {name: RewardFunctionConfig(f"my_counter.{name}") for name in ("counted", "counted_later")}
    functions["ranked"] = RewardFunctionConfig("my_counter.ranked", scope="group")
    with RewardPool(RewardConfig(functions=functions)) as pool:
        assert pool.sees_environments(has_environment=True)
        with pytest.raises(
            UserError, match=r"'counted' \(my_counter.counted\) asks for 'environments', and the run has"
        ):
            pool.sees_environments(has_environment=False)
        pool.check_columns(["answer"], "the data")
        scored, compared = (pool.submit(one).result().groups[0].samples for one in (group, other))
        assert [(one.rewards["counted"], one.rewards["counted_later"]) for one in scored] == [(16.0, 5.0)] * 2
        assert [one.rewards["ranked"] for one in (*scored, *compared)] == [0, 0, 0, 1]
    far = RewardPool(RewardConfig(functions={"far": RewardFunctionConfig("my_counter.looks_too_far")}))
    with far, pytest.raises(UserError, match=r"AttributeError: no 'handle' of the environment is kept"):
        far.submit(group).result()
    with playing(cfg, script) as (episodes, _):
        assert episodes.write([prompt(answer="5")], step=1).groups[0].samples[0].info["state"] is None
    with RewardPool(RewardConfig(functions={"match": RewardFunctionConfig("exact_match")})) as pool:
        assert not pool.sees_environments(has_environment=False)


def test_a_prompt_that_ends_in_the_models_words_is_gone_on_with(here: Path) -> None:
    asked = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "My guess: "}]
    with playing(config("guess", max_turns=2), lambda said: "50") as (episodes, _):
        (group,) = episodes.write([prompt(content=asked, answer="62")], step=1, n=1).groups
    (row,) = group.samples[0].rows
    assert TOKENIZER.decode(row.prompt_ids) == f"<|im_start|>user\nGo.<|im_end|>\n{ASSISTANT}My guess: "
    assert trained(row) == ["50<|im_end|>"] * 2
    assert group.samples[0].opening == asked[:1]
    assert [message["content"] for message in group.samples[0].messages or []] == [
        "My guess: 50",
        *("higher", "50", "higher"),
    ]


def test_each_turn_begins_with_all_that_was_sent_and_sampled_before(here: Path) -> None:
    with playing(config("guess"), play_high_low) as (episodes, engine):
        (group,) = episodes.write([prompt(answer="33")], step=1, n=1).groups
    (row,) = group.samples[0].rows
    whole = row.prompt_ids + row.token_ids
    assert len(engine.requests) == len(group.samples[0].turns) > 3
    for (request, _), turn in zip(engine.requests, group.samples[0].turns, strict=True):
        assert request.token_ids == whole[: len(row.prompt_ids) + turn.start]


@pytest.mark.parametrize(
    ("limits", "stop", "turns", "last"),
    [
        ({"max_turns": 2}, Stop.TURNS, 2, "75<|im_end|>"),
        ({"max_tokens": 3}, Stop.LENGTH, 1, "50<|im_end|>"),  # what was said to it has no room
        ({"max_tokens": 31}, Stop.LENGTH, 2, "75"),  # cut in the middle
    ],
)
def test_limits_on_turns_and_tokens_end_an_episode(
    here: Path, limits: dict[str, int], stop: Stop, turns: int, last: str
) -> None:
    sample = one(config("guess", **limits), play_high_low, answer="62")
    assert (sample.stop, len(sample.turns)) == (stop, turns)
    assert trained(sample.rows[0])[-1] == last
    assert len(sample.token_ids) <= limits.get("max_tokens", 10**9)
    assert sample.rewards == {"environment": 0.0}


def test_a_reply_that_is_cut_at_its_own_limit_is_heard_and_the_episode_goes_on(here: Path) -> None:
    cfg = config("guess")
    cfg.rollout.max_completion_tokens = 2
    sample = one(cfg, lambda said: "62" if "higher" in said else "5000", answer="62")
    assert sample.stop is Stop.ENVIRONMENT and trained(sample.rows[0]) == ["50", "62"]
    assert "50<|im_end|>\n<|im_start|>user\nhigher" in TOKENIZER.decode(sample.token_ids)


def test_tools_are_called_until_a_reply_calls_none(here: Path) -> None:
    def script(said: str) -> str:
        replies = [call_of("look", place=2), call_of("find"), '{"name": "look", "arguments": 3}', "abab"]
        return replies[said.count(ASSISTANT) - 1]

    cfg = config("my_games.Shelf", tools=("my_games.double",))
    (group,) = play(cfg, script, prompt(word="ab"))
    sample = group.samples[0]
    assert sample.stop is Stop.STOP and len(sample.turns) == 4
    assert (sample.info["tool_calls"], sample.info["tool_failures"]) == (3, 2)
    assert sample.rewards == {"environment": 1.25, **PARTS}
    told = sample_metrics([rows(1, replace(group, samples=[replace(one, reward=0.0) for one in group.samples]))])
    assert (told["rewards/environment/mean"], told["rewards/environment/read/mean"]) == (1.25, 1.0)
    assert (told["rewards/environment/bonus/mean"], told["rewards/environment/bonus/std"]) == (0.25, 0.0)
    assert sample.messages is not None
    assert [message["role"] for message in sample.messages] == ["assistant", "tool"] * 3 + ["assistant"]
    assert sample.messages[0]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"place": 2}}
    assert sample.messages[1]["content"] == "abab"
    assert "Go. There is a shelf." in TOKENIZER.decode(sample.rows[0].prompt_ids)


def test_a_tool_that_ends_the_episode_and_tools_without_an_environment(here: Path) -> None:
    sample = one(config("my_games.Shelf"), lambda said: call_of("finish"), word="ab")
    assert sample.stop is Stop.ENVIRONMENT and len(sample.turns) == 1
    sample = one(
        config(None, tools=("my_games.double",)),
        lambda said: "8" if said.count(ASSISTANT) > 1 else call_of("double", number=4),
    )
    assert sample.rewards == {} and sample.stop is Stop.STOP
    assert sample.messages is not None and sample.messages[1]["content"] == "8"


@pytest.mark.parametrize(("turns", "stop", "earned"), [(3, Stop.STOP, 2 / 3), (2, Stop.TURNS, 0.0)])
def test_a_question_is_searched_read_and_answered_and_what_a_tool_said_last_earns_nothing(
    here: Path, turns: int, stop: Stop, earned: float
) -> None:
    def script(said: str) -> str:
        replies = [call_of("search", query="river of Ulm"), call_of("read", title="Ulm"), "the Danube river"]
        return replies[said.count(ASSISTANT) - 1]

    documents = [
        {"title": "Ulm", "sentences": ["It lies on the", " Danube."]},
        {"title": "Bonn", "text": "On the Rhine."},
    ]
    sample = one(config("search", max_turns=turns), script, documents=documents)
    assert sample.stop is stop and sample.messages is not None
    told = [message["content"] for message in sample.messages if message["role"] == "tool"]
    assert told == ["Ulm: It lies on the Danube.", "It lies on the Danube."]
    assert squad_f1([sample.messages], ["Danube"]) == [pytest.approx(earned)]


def test_each_prompt_is_played_in_the_environment_that_its_row_names(here: Path) -> None:
    def script(said: str) -> str:
        if "shelf" in said:
            return "abab" if said.count(ASSISTANT) > 1 else call_of("look", place=2)
        return "8"

    cfg = config(None)
    cfg.environments = {
        "shelf": EnvironmentConfig("my_games.Shelf", workers=1),
        "echo": EnvironmentConfig("my_games.Echo", args={"turns": 4}, max_turns=2, workers=1),
        "plain": EnvironmentConfig(workers=1),
    }
    rows = [prompt(place, environment=name, word="ab") for place, name in enumerate(("plain", "echo", "shelf"))]
    plain, echo, shelf = (group.samples[0] for group in play(cfg, script, *rows))
    assert (plain.stop, len(plain.turns), plain.rewards) == (Stop.STOP, 1, {"environment": None})
    assert (echo.stop, len(echo.turns), echo.rewards) == (Stop.TURNS, 2, {"environment": 1.0})
    assert (shelf.stop, len(shelf.turns), shelf.rewards) == (Stop.STOP, 2, {"environment": 1.25, **PARTS})
    assert [one.info["environment"] for one in (plain, echo, shelf)] == ["plain", "echo", "shelf"]
    cfg.environments["echo"].args = {"turns": 1}
    told = (
        r"^environment 'my_games\.Echo' failed on prompt 1: step: ValueError: no mood .*; environments\.echo\.on_error"
    )
    with pytest.raises(UserError, match=told):
        play(cfg, lambda said: "do fail", rows[1])


def test_a_method_done_is_a_tool_like_any_other(here: Path) -> None:
    sample = one(config("my_games.Finisher"), lambda said: "ok" if said.count(ASSISTANT) > 2 else call_of("done"))
    assert (sample.stop, len(sample.turns), sample.rewards) == (Stop.STOP, 3, {"environment": 2.0})


def test_a_failed_environment_ends_the_run_or_leaves_its_group(here: Path) -> None:
    def script(said: str) -> str:
        return "do fail" if "Bad" in said else "hm"

    prompts = [prompt(3, "Good."), prompt(4, "Bad.")]
    told = (
        r"^environment 'my_games\.Echo' failed on prompt 4: step: ValueError: no mood \(.*my_games\.py:\d+\); "
        r"environment\.on_error=drop leaves such episodes out$"
    )
    with pytest.raises(UserError, match=told):
        play(config("my_games.Echo"), script, *prompts)
    with playing(config("my_games.Echo", on_error="drop"), script) as (episodes, _):
        finished: list[Group] = []
        result = episodes.write(prompts, step=1, on_group=finished.append)
        assert [len(group.samples) for group in result.groups] == [2, 0]
        assert len(result.dropped) == 2 and "no mood" in result.dropped[0]
        assert sorted(group.prompt.index for group in finished) == [3, 4]
        with pytest.raises(UserError, match=r"^no episode is left; environment 'my_games\.Echo' failed on prompt 4"):
            episodes.write(prompts[1:], step=1).checked()


@pytest.mark.parametrize(
    ("does", "told"),
    [("hang", r"took longer than 1 s \(environment\.turn_timeout\)"), ("die", r"its process ended by signal 9")],
)
def test_an_episode_that_hangs_or_ends_its_process_leaves_its_group_and_the_others_keep_their_numbers(
    here: Path, does: str, told: str
) -> None:
    cfg = config("my_games.Echo", on_error="drop", turn_timeout=1.0 if does == "hang" else 60.0)
    cfg.rollout.group_size = 3

    def played(second: str) -> tuple[list[list[tuple[Any, ...]]], Sequence[str]]:
        """The second of three episodes of prompt 3 says something at its second turn."""
        with playing(cfg, lambda said: f"a{len(said)}") as (episodes, engine):
            for number, reply in enumerate(("first", "second", "third")):
                engine.seeded[seed_of(cfg.seed, 1, 3, number, 1)] = reply
            engine.seeded[seed_of(cfg.seed, 1, 3, 1, 2)] = second
            result = episodes.write([prompt(3), prompt(4)], step=1).checked()
        return [
            [(one.rows, one.turns, one.stop, one.text, one.rewards, one.info["rewards"]) for one in group.samples]
            for group in result.groups
        ], result.dropped

    (first, second), dropped = played("well")
    assert (len(first), len(second), dropped) == (3, 3, [])
    assert [sample[3].split()[1] for sample in first] == ["first", "second", "third"]
    (left, others), (cause,) = played(f"do {does}")
    assert left == [first[0], first[2]] and others == second
    assert re.match(rf"environment 'my_games\.Echo' failed on prompt 3: {told}", cause)
    assert [file for file in here.glob("worker.*") if psutil.pid_exists(int(file.suffix[1:]))] == []


def test_an_episode_has_the_versions_of_the_weights_of_its_first_turn_and_its_last(here: Path) -> None:
    with playing(config("my_games.Echo"), lambda said: "a") as (episodes, engine):

        def versions(script: Callable[[str], str]) -> tuple[int, int]:
            engine.script, engine.weight_version = script, 5
            (group,) = episodes.write([prompt()], step=1, n=1).groups
            (row,) = group.samples[0].rows
            assert len(group.samples[0].turns) == 3 and row.rollout_logps is not None
            return group.samples[0].versions

        def comes_in_the_turn(*turns: int) -> Callable[[str], str]:
            def script(said: str) -> str:
                engine.weight_version += said.count(ASSISTANT) in turns
                return "a"

            return script

        found = [versions(comes_in_the_turn(*turns)) for turns in ((), (2,), (3,), (1, 2, 3))]
        assert found == [(5, 5), (5, 6), (5, 6), (5, 8)]

        def dies_before(said: str) -> str:
            engine.weight_version += "died" not in {file.name for file in here.iterdir()}
            return "do die_once"

        assert versions(dies_before) == (6, 6)  # what was lost with the process is not the episode's


def test_a_group_that_is_lost_is_replaced_and_so_is_one_that_replaces_it(here: Path) -> None:
    def submit(groups: Sequence[Group]) -> Future[Scores]:
        future: Future[Scores] = Future()
        future.set_result(Scores([*groups], RewardStats({}, {}, {})))
        return future

    def keeps(group: Group) -> bool:
        return bool(group.samples)

    bad, good = [prompt(3, "Bad."), prompt(4, "Bad.")], prompt(5, "Good.")
    script = lambda said: "do fail" if "Bad" in said else "hm"  # noqa: E731
    with (
        playing(config("my_games.Echo", on_error="drop"), script) as (episodes, _),
        Scoring(lambda group: submit([group]), submit, []) as scoring,
    ):
        result = write_refilled(episodes, bad[:1], [bad[1], good], 1, scoring, keeps).checked()
    assert [(group.prompt.index, len(group.samples)) for group in result.groups] == [(3, 0), (4, 0), (5, 2)]
    assert len(result.dropped) == 4
    assert [group.prompt.index for group in kept(result.groups, 2, lambda group: False)] == [3, 5]


def test_an_episode_is_played_anew_where_its_process_is_lost_and_fails_the_second_time(here: Path) -> None:
    sample = one(config("my_games.Echo", args={"turns": 2}), lambda said: "do die_once")
    assert len(sample.turns) == 2 and sample.info["told"]["heard"] == 2
    sample = one(config("my_games.Echo", args={"turns": 1}, turn_timeout=1.0), lambda said: "do hang_once")
    assert len(sample.turns) == 1
    with pytest.raises(UserError, match=r"failed on prompt 0: took longer than 1 s \(environment\.turn_timeout\)"):
        one(config("my_games.Echo", turn_timeout=1.0), lambda said: "do hang")
    assert [file for file in here.glob("worker.*") if psutil.pid_exists(int(file.suffix[1:]))] == []


CROWD = """
import asyncio, os
from pathlib import Path

class Crowd:
    waiting = 0

    def reset(self): pass

    async def step(self, reply):
        died = lambda: len([*Path().glob("died.*")])
        if reply == "wait":
            Crowd.waiting += 1
            while died() < 2:
                await asyncio.sleep(0.01)
            return None, 1.0, True
        while Crowd.waiting < 3 and died() < 2:
            await asyncio.sleep(0.01)
        Path(f"died.{os.getpid()}").touch()
        os._exit(3)
"""


def test_episodes_that_were_under_way_beside_one_that_ends_its_process_are_played_to_their_end(here: Path) -> None:
    (here / "crowd_game.py").write_text(CROWD)
    cfg = config("crowd_game.Crowd", on_error="drop", workers=1)
    cfg.rollout.group_size = 1
    prompts = [prompt(0, "Bad."), *(prompt(number, "Good.") for number in (1, 2, 3))]
    with playing(cfg, lambda said: "die" if "Bad" in said else "wait") as (episodes, _):
        result = episodes.write(prompts, step=1)
    assert [[sample.rewards for sample in group.samples] for group in result.groups] == [[]] + 3 * [
        [{"environment": 1.0}]
    ]
    assert len(result.dropped) == 1 and "prompt 0: its process ended with exit code 3" in result.dropped[0]
    assert len([*here.glob("died.*")]) == 3  # the last time by itself


def test_processes_that_something_else_ends_again_and_again_fail_the_episode(here: Path) -> None:
    def script(said: str) -> str:
        for file in here.glob("worker.*"):
            os.kill(int(file.suffix[1:]), signal.SIGKILL)
            file.unlink()
        return "a"

    told = r"failed on prompt 0: its process ended by signal 9 .*; 5 times with no call under way: is something else"
    cfg = config("my_games.Echo")
    cfg.rollout.group_size = 1  # another episode may have a call under way, which would be to blame
    with pytest.raises(UserError, match=told):
        play(cfg, script, prompt())


def test_the_same_run_plays_the_same_episodes_and_a_group_has_one_task_and_so_have_evaluations(here: Path) -> None:
    def seeds(cfg: Config) -> tuple[list[int | None], list[int]]:
        with playing(cfg, lambda said: "a") as (episodes, engine):
            groups = episodes.write([prompt(0), prompt(1)], step=1).groups
            drawn = [sample.info["told"]["drawn"] for group in groups for sample in group.samples]
            return sorted((request.seed for request, _ in engine.requests), key=str), drawn

    cfg = config("my_games.Echo", args={"turns": 2})
    first, drawn = seeds(cfg)
    assert (first, drawn) == seeds(cfg)
    assert len(set(first)) == len(first) == 8 and None not in first
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]
    cfg.reproducible = False
    assert set(seeds(cfg)[0]) == {None}
    with playing(cfg, lambda said: "a") as (episodes, _):
        evaluated = (episodes.write([prompt(0)], -step, n=1).groups[0].samples[0] for step in (0, 1, 8))
        tasks = {sample.info["told"]["drawn"] for sample in evaluated}
    assert len(tasks) == 1 and drawn[0] not in tasks  # what is held out stays the same, whatever is trained on


def test_greedy_episodes_take_the_likeliest_replies_and_go_before_others(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurries, submit = list[bool](), Rollouts.submit

    def watched(self: Rollouts, request: Request, sampling: Sampling, session: Session, urgent: bool) -> Any:
        hurries.append(urgent)
        return submit(self, request, sampling, session, urgent)

    monkeypatch.setattr(Rollouts, "submit", watched)
    cfg = config("my_games.Echo")
    with playing(cfg, lambda said: "abc") as (episodes, engine):
        own = greedy_of(sampling_of(cfg.rollout), most=2)
        (group,) = episodes.write([prompt()], 1, 1, sampling=own).groups
        assert {(sampling.temperature, sampling.logprobs, sampling.max_tokens) for _, sampling in engine.requests} == {
            (0.0, False, 2)
        }
        assert set(hurries) == {True}
        episodes.write([prompt()], step=1)
        assert set(hurries[3:]) == {False}
    assert len(group.samples) == 1 and group.samples[0].rows[0].rollout_logps is None


def test_a_prompt_that_the_environment_makes_too_long_is_refused(here: Path) -> None:
    cfg = config("my_games.Shelf")
    cfg.data.max_prompt_tokens = 39
    with pytest.raises(UserError, match=r"^data\.max_prompt_tokens: prompt 0 has \d+ tokens with its tools and what"):
        one(cfg, lambda said: "", word="ab")


def test_the_end_does_not_wait_for_episodes_under_way(here: Path) -> None:
    heard = threading.Event()

    def script(said: str) -> str:
        heard.set()
        return "do hang"

    with ThreadPoolExecutor(1) as other:
        with playing(config("my_games.Echo"), script) as (episodes, _):
            writing = other.submit(episodes.write, [prompt()], 1)
            assert heard.wait(30)
        with pytest.raises(CancelledError):
            writing.result(timeout=10)
    assert [file for file in here.glob("worker.*") if psutil.pid_exists(int(file.suffix[1:]))] == []
