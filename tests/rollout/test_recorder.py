"""Episodes of agents that no run starts, by the real package openai; the engine says what the test has it say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import openai
import pytest
from scripted import ADD, ASSISTANT, TOKENIZER, Scripted, call_of

from sapo_rl.config import Config, EnvironmentConfig
from sapo_rl.engines.asgi import gather
from sapo_rl.engines.base import Request, Sampling
from sapo_rl.environments.chat import ChatTemplate
from sapo_rl.rollout.agents import recorder
from sapo_rl.rollout.agents.recorder import Recorder, Write, Written
from sapo_rl.rollout.agents.wire import Refusal


class Server:
    """A recorder before a scripted engine, and clients of it that need no network."""

    def __init__(self, script: Callable[[str], str], write: Write | None = None, **limits: Any) -> None:
        config = Config(environment=EnvironmentConfig("endpoint", **limits))
        self.recorder = Recorder(config, config.environment, "environment", ChatTemplate(TOKENIZER))
        self.engine = Scripted(script)
        self.versions = iter(range(100))
        self.answers = asyncio.Event()
        """Replies wait for it."""
        self.answers.set()
        self._write = write or self.write
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://server")

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        body = await gather(receive, 10**6)
        assert body is not None and self.recorder.takes(scope["path"])
        await self.recorder.answer(scope, body, receive, send, self._write)

    async def write(self, token_ids: list[int], sampling: Sampling) -> Written:
        await self.answers.wait()
        request = Request(token_ids, 1)
        self.engine.requests.append((request, sampling))
        (completion,) = self.engine.answer(request, sampling)
        return Written(completion, (f"run/{next(self.versions)}", "run/9"))

    def client(self, session: str | None = None) -> openai.AsyncOpenAI:
        headers = {"X-Session-Id": session} if session else {}
        return openai.AsyncOpenAI(
            base_url="http://server/v1", api_key="k", default_headers=headers, http_client=self.http, max_retries=0
        )

    async def ask(self, session: str | None, *said: Any, **settings: Any) -> Any:
        messages: Any = [one if not isinstance(one, str) else {"role": "user", "content": one} for one in said]
        return await self.client(session).chat.completions.create(model="m", messages=messages, **settings)

    async def read(self, session: str, method: str = "GET") -> Any:
        answer = await self.http.request(method, f"/episodes/{session}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def names(self) -> list[str]:
        return [one["session"] for one in (await self.http.get("/episodes")).json()["episodes"]]


def echo(said: str) -> str:
    return said.rpartition("user\n")[2].partition("<|im_end|>")[0] + "?"


def run(test: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test

    asyncio.run(bounded())


def spoken(episode: Any) -> list[str]:
    """What the model wrote, by turns."""
    rows = episode["rows"]
    return [str(TOKENIZER.decode(rows[one["row"]]["token_ids"][one["start"] : one["end"]])) for one in episode["turns"]]


def test_an_episode_is_read_back_as_the_tokens_that_were_sent_and_sampled() -> None:
    def script(said: str) -> str:
        return [call_of("add", a=2, b=3), "5"][said.count(ASSISTANT) - 1]

    async def check() -> None:
        server = Server(script)
        messages: list[Any] = [{"role": "user", "content": "2 + 3?"}]
        first = await server.ask("mine", *messages, tools=[ADD])
        call = first.choices[0].message.tool_calls[0]
        assert json.loads(call.function.arguments) == {"a": 2, "b": 3}
        messages += [first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "5"}]
        second = await server.ask("mine", *messages, tools=[ADD])
        assert second.choices[0].message.content == "5" and {first.id, second.id}.isdisjoint(await server.names())

        episode = await server.read("mine")
        (row,) = episode["rows"]
        (one, _), (two, sampling) = server.engine.requests
        stream = row["prompt_ids"] + row["token_ids"]
        assert row["prompt_ids"] == one.token_ids and stream[: len(two.token_ids)] == two.token_ids
        assert spoken(episode) == [f"{call_of('add', a=2, b=3)}<|im_end|>", "5<|im_end|>"]
        assert row["loss_mask"] == [[turn["start"], turn["end"]] for turn in episode["turns"]]
        lengths = [turn["end"] - turn["start"] for turn in episode["turns"]]
        assert row["rollout_logps"] == [-0.5 - place for length in lengths for place in range(length)]
        assert sampling.logprobs and episode["temperature"] == 1.0 and episode["stop"] is None
        assert [turn["finish_reason"] for turn in episode["turns"]] == ["tool_calls", "stop"]
        assert [turn["weights"] for turn in episode["turns"]] == [["run/0", "run/9"], ["run/1", "run/9"]]
        (conversation,) = episode["conversations"]
        assert [message["role"] for message in conversation["messages"]] == ["assistant", "tool", "assistant"]
        assert conversation["opening"] == [{"role": "user", "content": "2 + 3?"}]
        assert (episode["tool_calls"], episode["tool_failures"]) == (1, 0)
        assert episode["tokens"] == len(stream) and episode["replies"] == 2 and episode["under_way"] == 0

    run(check())


def test_sessions_at_once_are_kept_apart_and_requests_at_once_of_one_are_rows() -> None:
    async def check() -> None:
        server = Server(echo)
        server.answers.clear()
        asked = [server.ask(name, word) for name, word in (("a", "left"), ("b", "right"), ("a", "more"))]
        asked = [asyncio.ensure_future(one) for one in asked]
        while len(await server.names()) < 2 or (await server.read("a"))["under_way"] < 2:
            await asyncio.sleep(0)
        assert (await server.read("b"))["rows"] == (await server.read("b"))["conversations"] == []
        server.answers.set()
        await asyncio.gather(*asked)
        assert sorted(spoken(await server.read("a"))) == ["left?<|im_end|>", "more?<|im_end|>"]
        assert len((await server.read("a"))["rows"]) == 2
        assert spoken(await server.read("b")) == ["right?<|im_end|>"]

    run(check())


def test_a_request_without_a_session_is_an_episode_under_the_id_of_its_answer() -> None:
    async def check() -> None:
        server = Server(echo)
        said = [await server.ask(None, word) for word in ("a", "b")]
        assert await server.names() == [one.id for one in said]
        assert [spoken(await server.read(one.id)) for one in said] == [["a?<|im_end|>"], ["b?<|im_end|>"]]
        stream = await server.client().chat.completions.create(
            model="m", messages=[{"role": "user", "content": "c"}], stream=True
        )
        ids = {chunk.id async for chunk in stream}
        assert len(ids) == 1 and spoken(await server.read(ids.pop())) == ["c?<|im_end|>"]

    run(check())


def test_what_cannot_be_is_refused_in_a_sentence_and_leaves_no_episode() -> None:
    async def check() -> None:
        server = Server(echo)
        wrong: list[tuple[str, dict[str, Any], str]] = [
            ("a", {"temperature": 0.2}, "temperature: is 0.2, must be 1 as rollout.temperature is"),
            ("a", {"logprobs": True}, "logprobs: is not possible"),
            ("a/b", {}, "X-Session-Id: must be 1 to 128 letters, digits or any of"),
            ("..", {}, "the first a letter or digit"),
            ("a" * 129, {}, "X-Session-Id: "),
        ]
        for session, settings, told in wrong:
            with pytest.raises(openai.BadRequestError) as refused:
                await server.ask(session, "a", **settings)
            assert told in str(refused.value)
        with pytest.raises(openai.BadRequestError, match="has no room for a reply"):
            await server.ask("a", "a" * 3000)
        assert await server.names() == []
        for method, path, status in (
            ("GET", "/episodes/a", 404),
            ("DELETE", "/episodes/a", 404),
            ("PUT", "/episodes/a", 405),
            ("DELETE", "/episodes", 405),
            ("GET", "/v1/chat/completions", 405),
        ):
            answer = await server.http.request(method, path)
            assert answer.status_code == status and len(answer.json()["error"]["message"].splitlines()) == 1

    run(check())


def test_the_limits_of_an_episode_are_those_of_the_recipe() -> None:
    async def check() -> None:
        server = Server(echo, max_turns=1)
        said = (await server.ask("a", "b")).choices[0].message
        with pytest.raises(openai.BadRequestError, match=r"has had its 1 replies \(environment.max_turns\)"):
            await server.ask("a", "b", said, "c")
        episode = await server.read("a")
        assert episode["stop"] == "turns" and spoken(episode) == ["b?<|im_end|>"]

    run(check())


def test_a_request_that_failed_and_is_asked_again_goes_on_in_its_row() -> None:
    async def check() -> None:
        failures = [Refusal("the engine is away", 503)]

        async def write(token_ids: list[int], sampling: Sampling) -> Written:
            if len(token_ids) > 40 and failures:
                raise failures.pop()
            return await server.write(token_ids, sampling)

        server = Server(echo, write, max_turns=2)
        said = (await server.ask("a", "b")).choices[0].message
        with pytest.raises(openai.InternalServerError, match="the engine is away"):
            await server.ask("a", "b", said, "long enough to fail the first time")
        await server.ask("a", "b", said, "long enough to fail the first time")
        episode = await server.read("a")
        assert len(episode["rows"]) == 1 and episode["stop"] is None
        assert spoken(episode) == ["b?<|im_end|>", "long enough to fail the first time?<|im_end|>"]

    run(check())


def test_the_oldest_episodes_make_room_and_are_not_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "MOST_EPISODES", 2)

    async def check() -> None:
        released = asyncio.Event()

        async def write(token_ids: list[int], sampling: Sampling) -> Written:
            if "slow" in TOKENIZER.decode(token_ids):
                await released.wait()
            return await server.write(token_ids, sampling)

        server = Server(echo, write)
        slow = asyncio.ensure_future(server.ask("busy", "slow"))
        while await server.names() != ["busy"]:
            await asyncio.sleep(0)
        await server.ask("a", "x")
        said = (await server.ask("b", "x")).choices[0].message
        assert await server.names() == ["busy", "b"]
        for answer in (await server.http.get("/episodes/a"), await server.http.delete("/episodes/a")):
            assert answer.status_code == 410 and "the last 2 are kept" in answer.json()["error"]["message"]
        with pytest.raises(openai.APIStatusError) as gone:
            await server.ask("a", "x")
        assert gone.value.status_code == 410
        released.set()
        await slow
        await server.ask("b", "x", said, "y")  # now the last
        monkeypatch.setattr(recorder, "MOST_TOKENS", (await server.read("b"))["tokens"])
        await server.ask("c", "x")
        assert await server.names() == ["c"]

    run(check())


def test_the_names_of_dropped_episodes_are_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "MOST_EPISODES", 1)
    monkeypatch.setattr(recorder, "MOST_NAMES", 1)

    async def check() -> None:
        server = Server(echo)
        for name in ("a", "b", "c"):
            await server.ask(name, "x")
        found = [(await server.http.get(f"/episodes/{name}")).status_code for name in ("a", "b", "c")]
        assert found == [404, 410, 200]

    run(check())


def test_a_reply_that_comes_while_a_slow_client_deletes_is_told_as_over() -> None:
    async def check() -> None:
        async def slow(_: Any) -> None:
            server.answers.set()
            await asyncio.wait([waiting])

        server = Server(echo)
        server.answers.clear()
        waiting = asyncio.ensure_future(server.ask("a", "x"))
        while await server.names() != ["a"]:
            await asyncio.sleep(0)
        scope: Any = {"method": "DELETE", "path": "/episodes/a"}
        await server.recorder.answer(scope, b"", lambda: asyncio.Future(), slow, server.write)
        with pytest.raises(openai.APIStatusError, match="the episode is over"):
            await waiting

    run(check())


def test_an_episode_that_is_deleted_is_told_once_more_and_gives_up_what_is_under_way() -> None:
    async def check() -> None:
        async def write(token_ids: list[int], sampling: Sampling) -> Written:
            if "never" in TOKENIZER.decode(token_ids):
                await asyncio.Event().wait()
            return await server.write(token_ids, sampling)

        server = Server(echo, write)
        await server.ask("a", "x")
        waiting = asyncio.ensure_future(server.ask("a", "never"))
        while not (await server.read("a"))["under_way"]:
            await asyncio.sleep(0)
        assert spoken(await server.read("a", "DELETE")) == ["x?<|im_end|>"]
        with pytest.raises(openai.APIStatusError, match="the episode is over"):
            await waiting
        assert (await server.http.get("/episodes/a")).status_code == 404
        await server.ask("a", "y")
        assert spoken(await server.read("a")) == ["y?<|im_end|>"]

    run(check())
