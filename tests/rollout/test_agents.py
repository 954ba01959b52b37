"""Agents that ask by the real package openai, in real worker processes; the engine says what the test has it say."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import psutil
import pytest
from scripted import ADD, ASSISTANT, TOKENIZER, call_of, config, one, play, playing, prompt, trained
from waiting import until

from sapo_rl.config import Config, EnvironmentConfig
from sapo_rl.errors import EngineError, UserError
from sapo_rl.types import Row, Stop

pytestmark = pytest.mark.usefixtures("forked_workers")

AGENTS = (
    f"ADD = {ADD!r}\n"
    + '''
import asyncio, os, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def ask(client, messages, **settings):
    return client.chat.completions.create(model="policy", messages=messages, **settings).choices[0]


def tools(client, row):
    """Lets the model add until it answers; its answer is compared."""
    import json

    messages, used = [{"role": "user", "content": row["prompt"]}], 0
    while True:
        choice = ask(client, messages, tools=[ADD], parallel_tool_calls=False)
        messages.append(choice.message)
        if not choice.message.tool_calls:
            assert choice.finish_reason == "stop"
            client.close()
            return used + (choice.message.content == row["answer"])
        assert choice.finish_reason == "tool_calls"
        for call in choice.message.tool_calls:
            given, used = json.loads(call.function.arguments), used + 10
            messages.append({"role": "tool", "tool_call_id": call.id, "content": str(given["a"] + given["b"])})


async def two_at_once(client, row):
    async def talk(word):
        messages = [{"role": "user", "content": word}]
        for _ in range(2):
            choice = (await client.chat.completions.create(model="m", messages=messages)).choices[0]
            messages += [choice.message, {"role": "user", "content": "more"}]

    await asyncio.gather(talk("left"), talk("right"))
    return 1


def two_threads(client, row):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda word: ask(client, [{"role": "user", "content": word}]), ("left", "right"))
    return (first.message.content, second.message.content) == ("left?", "right?")


def forgets(client, row):
    """Rewrites what was said."""
    ask(client, [{"role": "user", "content": "long ago"}])
    roles = ("user", "assistant", "user")
    ask(client, [{"role": role, "content": word} for role, word in zip(roles, ("in short", "x", "b"))])
    return 2.5


def streams(client, row):
    said = client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "a"}], stream=True, stream_options={"include_usage": True}
    )
    chunks = list(said)
    assert chunks[-1].usage.completion_tokens == 3
    return float("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "a?")


def settings(client, row):
    """Asks with what the row holds, and returns 1 where that is refused by these words."""
    import openai

    ask(client, [{"role": "user", "content": "a"}])
    try:
        ask(client, **{"messages": [{"role": "user", "content": "a"}], **row["settings"]})
    except openai.BadRequestError as error:
        return float(row["told"] in error.body["message"])
    return 0.0


def without_key(client, row):
    import openai

    ask(client, [{"role": "user", "content": "a"}])
    try:
        ask(client.with_options(api_key="mine"), [{"role": "user", "content": "a"}])
    except openai.AuthenticationError:
        return [model.id for model in client.models.list()] == ["policy"]


def endless(client, row):
    messages = [{"role": "user", "content": "a"}]
    while True:
        messages += [ask(client, messages).message, {"role": "user", "content": "b"}]


def silent(client, row):
    return 1.0


def raises(client, row):
    ask(client, [{"role": "user", "content": "a"}])
    raise ValueError("no mood")


def wrong(client, row):
    ask(client, [{"role": "user", "content": "a"}])
    return "good"


def hangs(client, row):
    Path(f"worker.{os.getpid()}").touch()
    ask(client, [{"role": "user", "content": "a"}])
    time.sleep(1000)


class Runner:
    async def __call__(self, client, row):
        await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "a"}])
        return 0.25


runner = Runner()


kept = []


def keeps(client, row):
    """Leaves a request under way at its end, and asks by the client of the episode before."""
    import openai, threading

    ask(client, [{"role": "user", "content": "a"}])
    refused = 0
    for other in kept:
        try:
            ask(other, [{"role": "user", "content": "late"}])
        except openai.AuthenticationError:
            refused += 1
    kept.append(client)

    def wait():
        try:
            ask(client, [{"role": "user", "content": "slow"}])
        except openai.APIStatusError as error:
            Path("told").write_text(f"{error.status_code} {error.body['message']}")

    threading.Thread(target=wait, daemon=True).start()
    while not Path("slow").exists():
        time.sleep(0.01)
    return refused


def own_client(client, row):
    from openai import OpenAI

    return ask(OpenAI(base_url=client.base_url, api_key=client.api_key), [{"role": "user", "content": "a"}]) is not None


def lonely(client):
    return 1.0


def patient(client, row):
    """Works for a while between two requests, each time for less than the limit."""
    for _ in range(3):
        ask(client, [{"role": "user", "content": "a"}])
        time.sleep(1.2)
    return 1.0
'''
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_agents.py").write_text(AGENTS)
    return tmp_path


def agent(name: str, **settings: Any) -> Config:
    return config("endpoint", args={"run": f"my_agents.{name}"}, **settings)


def echo(said: str) -> str:
    """The last word of the user with a question mark."""
    return said.rpartition("user\n")[2].partition("<|im_end|>")[0] + "?"


def whole(row: Row) -> str:
    return TOKENIZER.decode([*row.prompt_ids, *row.token_ids])


def test_a_loop_with_a_tool_is_one_row_of_the_tokens_that_were_sampled(here: Path) -> None:
    def script(said: str) -> str:
        return [call_of("add", a=2, b=3), call_of("add", a=5, b=1), "6"][said.count(ASSISTANT) - 1]

    with playing(agent("tools"), script) as (episodes, engine):
        (group,) = episodes.write([prompt(content="What is 2 + 3 + 1?", answer="6")], step=1).groups
    for sample in group.samples:
        (row,) = sample.rows
        assert trained(row) == [
            f"{call_of('add', a=2, b=3)}<|im_end|>",
            f"{call_of('add', a=5, b=1)}<|im_end|>",
            "6<|im_end|>",
        ]
        assert row.rollout_logps is not None and len(row.rollout_logps) == row.num_trained
        assert row.rollout_logps[:2] == [-0.5, -1.5] and row.rollout_logps[-1] == -0.5 - len("6")
        assert sample.stop is Stop.ENVIRONMENT and sample.rewards == {"environment": 21.0}
        assert [message["role"] for message in sample.messages or []] == ["assistant", "tool"] * 2 + ["assistant"]
        assert (sample.info["tool_calls"], sample.info["tool_failures"]) == (2, 0) and sample.conversations == []
        assert [turn.row for turn in sample.turns] == [0, 0, 0]
    sent = sorted({tuple(request.token_ids) for request, _ in engine.requests}, key=len)
    assert len(engine.requests) == 6 and len(sent) == 3
    stream = [*group.samples[0].rows[0].prompt_ids, *group.samples[0].rows[0].token_ids]
    assert all(stream[: len(ids)] == list(ids) for ids in sent)


@pytest.mark.parametrize(("name", "turns"), [("two_at_once", 4), ("two_threads", 2)])
def test_requests_beside_each_other_are_rows_of_their_own(here: Path, name: str, turns: int) -> None:
    sample = one(agent(name), echo)
    assert sample.rewards == {"environment": 1.0} and len(sample.turns) == turns
    assert sorted(whole(row).split("\n")[1] for row in sample.rows) == ["left<|im_end|>", "right<|im_end|>"]
    for turn in sample.turns:
        assert TOKENIZER.decode(sample.rows[turn.row].token_ids[turn.start : turn.end]).endswith("?<|im_end|>")
    assert sorted(opening[0]["content"] for opening, _ in sample.conversations) == ["left", "right"]
    assert sample.conversations[-1] == (sample.opening, sample.messages)
    assert all(said[0]["role"] == "assistant" for _, said in sample.conversations)
    assert sum(row.num_trained for row in sample.rows) == sum(turn.end - turn.start for turn in sample.turns)


def test_a_history_that_the_agent_rewrites_goes_on_in_a_further_row(here: Path) -> None:
    sample = one(agent("forgets"), echo)
    first, second = sample.rows
    assert (trained(first), trained(second)) == (["long ago?<|im_end|>"], ["b?<|im_end|>"])
    assert "assistant\nx<|im_end|>" in TOKENIZER.decode(second.prompt_ids)
    assert [turn.row for turn in sample.turns] == [0, 1] and sample.rewards == {"environment": 2.5}
    assert sample.text.split("\n\n---\n\n") == ["assistant: long ago?", "assistant: b?"]


def test_a_stream_is_the_whole_reply_in_one(here: Path) -> None:
    assert one(agent("streams"), echo).rewards == {"environment": 1.0}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"temperature": 0.2}, "temperature: is 0.2, must be 1 as rollout.temperature is; leave it out"),
        ({"stop": ["x"]}, "stop: is not possible in a rollout"),
        ({"n": 2}, "n: Input should be 1, not 2"),
        ({"tool_choice": "required"}, "tool_choice: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "nothing to reply to"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0"),
    ],
)
def test_what_a_rollout_cannot_do_is_refused_in_words(here: Path, settings: dict[str, Any], told: str) -> None:
    assert one(agent("settings"), echo, settings=settings, told=told).rewards == {"environment": 1.0}


def test_what_changes_nothing_is_taken(here: Path) -> None:
    settings = {"temperature": 1.0, "max_tokens": 2, "user": "me", "seed": 3, "stop": None}
    sample = one(agent("settings"), echo, settings=settings, told="")
    assert sample.rewards == {"environment": 0.0} and trained(sample.rows[1]) == ["a?"]
    assert sample.stop is Stop.LENGTH


def test_only_the_key_of_the_episode_opens_the_server(here: Path) -> None:
    assert one(agent("without_key"), echo).rewards == {"environment": 1.0}


@pytest.mark.parametrize(("limits", "stop"), [({"max_turns": 2}, Stop.TURNS), ({"max_tokens": 5}, Stop.LENGTH)])
def test_an_agent_that_a_limit_ends_has_earned_nothing(here: Path, limits: dict[str, int], stop: Stop) -> None:
    sample = one(agent("endless", **limits), echo)
    assert sample.stop is stop and sample.rewards == {"environment": 0.0}
    assert len(sample.turns) == limits.get("max_turns", 1)
    assert sum(len(row.token_ids) for row in sample.rows) <= limits.get("max_tokens", 10**9)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "raises",
            r"^environment 'endpoint' failed on prompt 0: run: ValueError: no mood \(.*my_agents\.py:\d+\);",
        ),
        ("silent", r"failed on prompt 0: run has not asked the model anything by the client that it got; environment"),
        ("wrong", r"failed on prompt 0: run returned 'good'; must return a finite number as its reward"),
        ("hangs", r"failed on prompt 0: took longer than 1 s \(environment\.turn_timeout\)"),
    ],
)
def test_an_agent_that_fails_is_told_by_name_or_dropped(here: Path, name: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        play(agent(name, turn_timeout=1.0 if name == "hangs" else 60.0), echo, prompt())
    assert [file for file in here.glob("worker.*") if psutil.pid_exists(int(file.suffix[1:]))] == []


def test_what_is_asked_after_the_end_is_refused_and_what_is_under_way_then_is_given_up(here: Path) -> None:
    given_up: SimpleQueue[str] = SimpleQueue()

    def script(said: str) -> str:
        if "slow" in said:
            (here / "slow").touch()
            given_up.put(until(lambda: (here / "told").exists() and (here / "told").read_text()))
        return echo(said)

    with playing(agent("keeps"), script) as (episodes, _):
        for number in range(2):
            (group,) = episodes.write([prompt(number)], step=1, n=1).groups
            (sample,) = group.samples
            assert [trained(row) for row in sample.rows] == [["a?<|im_end|>"]]
            assert sample.rewards == {"environment": float(number)}
            assert given_up.get(timeout=60) == "410 the episode is over"
            for name in ("slow", "told"):  # of this episode
                (here / name).unlink()


def test_a_client_that_the_agent_makes_goes_around_a_proxy(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert one(agent("own_client"), echo).rewards == {"environment": 1.0}


def test_an_object_whose_call_is_a_coroutine_is_awaited(here: Path) -> None:
    assert one(agent("runner"), echo).rewards == {"environment": 0.25}


def test_a_function_that_does_not_take_client_and_row_is_told_at_the_start(here: Path) -> None:
    with pytest.raises(UserError, match=r"agent 'my_agents.lonely' must be callable as run\(client, row\): too many"):
        play(agent("lonely"), echo, prompt())


def test_the_time_of_the_model_and_of_work_between_requests_is_not_the_limit(here: Path) -> None:
    sample = one(agent("patient", turn_timeout=3.0), echo)
    assert len(sample.rows) == 3 and sample.rewards == {"environment": 1.0}


@pytest.fixture
def few_files() -> Iterator[int]:
    """Has this process have 256 files open at most, until it asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    yield 256
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_agents_than_a_shell_lets_files_be_open_ask_at_once(here: Path, few_files: int) -> None:
    most = 0

    def script(said: str) -> str:
        nonlocal most
        deadline = time.monotonic() + 20
        while most < few_files + 40 and time.monotonic() < deadline:  # nobody is answered until all have asked
            most = max(most, psutil.Process().num_fds())
            time.sleep(0.01)
        return "a"

    cfg = agent("runner")
    found = play(cfg, script, *(prompt(number) for number in range(150)))
    assert most >= few_files + 40 and sum(len(group.samples) for group in found) == 300


def test_an_engine_that_fails_ends_the_run_and_not_the_agent(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(said: str) -> str:
        raise EngineError("out of memory")

    with pytest.raises(EngineError, match="out of memory"):
        play(agent("endless", on_error="drop"), script, prompt())


def test_an_agent_beside_a_game(here: Path) -> None:
    cfg = config(None)
    cfg.environments = {
        "agent": EnvironmentConfig("endpoint", args={"run": "my_agents.two_threads"}, workers=1),
        "guess": EnvironmentConfig("guess", workers=1, max_turns=2),
    }
    found = play(cfg, echo, prompt(0, environment="agent"), prompt(1, environment="guess"))
    assert [len(group.samples[0].rows) for group in found] == [2, 1]
    assert all(isinstance(sample.text, str) and json.dumps(sample.info) for group in found for sample in group.samples)
