"""What a server that records answers while its weights come and go; with real weights in e2e/test_servers.py."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest

from sapo_rl.config import Config, EnvironmentConfig, ModelConfig
from sapo_rl.engines.base import Completion
from sapo_rl.engines.key import VARIABLE as KEY_VARIABLE
from sapo_rl.engines.vllm import api
from sapo_rl.errors import UserError
from sapo_rl.run import recording
from sapo_rl.run.recording import EpisodesApi, for_agents, recorder_of

KEY = "a_key_for_tests_alone"
ASK = json.dumps({"messages": [{"role": "user", "content": "a"}]})
SESSION = {"X-Session-Id": "one"}


class Engine:
    """Writes one token, when the test releases it."""

    vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=4096, get_vocab_size=lambda: 1000))

    def __init__(self) -> None:
        self.release, self.asked = asyncio.Event(), list[str]()
        self.error: Exception | None = None

    async def generate(self, prompt: dict[str, Any], params: object, name: str) -> AsyncIterator[Any]:
        self.asked.append(prompt["cache_salt"])
        await self.release.wait()
        if self.error:
            raise self.error
        yield prompt["prompt_token_ids"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> EpisodesApi:
    """In front of a vLLM that answers every path of its own with 204."""
    stub = ModuleType("vllm.v1.engine.exceptions")
    stub.EngineDeadError = type("EngineDeadError", (Exception,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, stub.__name__, stub)  # vLLM takes long to import
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setenv(recording.VARIABLE, f"{{model: {{path: '{tiny_model}'}}, data: {{source: arithmetic}}}}")
    monkeypatch.setattr(api, "sampling_params", lambda *_: None)
    monkeypatch.setattr(api, "completions_of", lambda _: [Completion([30, 3], False, [-1.0, -2.0])])

    async def vllm(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return EpisodesApi(vllm)


class Caller:
    """Asks over HTTP, without a network."""

    def __init__(self, server: EpisodesApi) -> None:
        self.server, self.engine = server, Engine()
        headers = {"Authorization": f"Bearer {KEY}"}
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://s", headers=headers)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        await self.server(
            scope | {"app": SimpleNamespace(state=SimpleNamespace(engine_client=self.engine))}, receive, send
        )

    async def ask(self, **headers: str) -> httpx.Response:
        return await self.http.post("/v1/chat/completions", content=ASK, headers=SESSION | headers)

    async def begun(self, count: int) -> None:
        async with asyncio.timeout(30):
            while len(self.engine.asked) < count:
                await asyncio.sleep(0)

    async def weights(self) -> list[list[str]]:
        return [turn["weights"] for turn in (await self.http.get("/episodes/one")).json()["turns"]]


def test_a_reply_whose_weights_go_away_is_written_anew_by_those_that_come(server: EpisodesApi) -> None:
    async def check() -> None:
        caller = Caller(server)
        asked = asyncio.ensure_future(caller.ask())
        await caller.begun(1)
        await server.held.give_up()  # a run has joined, or broke off in the middle of its weights
        late = asyncio.ensure_future(caller.ask())
        async with server.held.arriving("run/4"):
            pass
        await caller.begun(3)
        async with server.held.arriving("run/5"):  # what is being written goes on
            pass
        caller.engine.release.set()
        assert [(await one).status_code for one in (asked, late)] == [200, 200]
        assert caller.engine.asked == ["folder/0 0", "run/4 1", "run/4 1"]
        assert await caller.weights() == [["run/4", "run/5"]] * 2

    asyncio.run(check())


def test_what_one_run_has_gone_on_with_is_not_read_from_the_cache_once_the_folders_weights_are_back(
    server: EpisodesApi,
) -> None:
    async def check() -> None:
        caller = Caller(server)
        asked = asyncio.ensure_future(caller.ask())
        await caller.begun(1)
        async with server.held.arriving("run/1"):
            pass
        caller.engine.release.set()
        await asked
        await server.held.give_up()
        await server.held.restored()
        await caller.ask()
        assert await caller.weights() == [["folder/0", "run/1"], ["folder/0", "folder/0"]]
        assert len(set(caller.engine.asked)) == 2

    asyncio.run(check())


def test_half_loaded_weights_that_nobody_sends_again_are_told(
    server: EpisodesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "WEIGHTS_SECONDS", 0.05)

    async def check() -> None:
        caller = Caller(server)
        await server.held.give_up()
        answer = await caller.ask()
        assert answer.status_code == 503 and answer.json()["error"]["message"] == recording.NO_WEIGHTS
        await server.held.restored()
        caller.engine.release.set()
        assert (await caller.ask()).status_code == 200
        assert await caller.weights() == [["folder/0", "folder/0"]]

    asyncio.run(check())


def test_the_key_is_asked_for_an_engines_error_is_told_and_other_paths_are_vllms(server: EpisodesApi) -> None:
    async def check() -> None:
        caller = Caller(server)
        caller.engine.release.set()
        assert (await caller.ask(Authorization="Bearer other")).status_code == 401
        assert (await caller.http.get("/episodes", headers={"Authorization": ""})).status_code == 401
        assert (await caller.http.get("/v1/models")).status_code == 204 and not server.others
        caller.engine.error = RuntimeError("out of memory")
        answer = await caller.ask()
        assert answer.status_code == 500 and "out of memory" in answer.json()["error"]["message"]
        assert (await caller.http.get("/episodes")).json() == {"episodes": []}
        await caller.http.post("/v1/completions", content=ASK)
        assert server.others

    asyncio.run(check())


def test_the_limits_are_those_of_the_agent_that_the_recipe_names(tiny_model: Path) -> None:
    config = Config(model=ModelConfig(path=str(tiny_model)))
    assert for_agents(config).max_sequence_tokens == config.data.max_prompt_tokens + config.environment.max_tokens
    config.environments = {
        "game": EnvironmentConfig("guess", max_turns=3),
        "agent": EnvironmentConfig("endpoint", max_turns=5),
    }
    assert for_agents(config) is config
    made, stops = recorder_of(config)
    assert (made.limits.max_turns, made.key) == (5, "environments.agent") and stops == [3]


def test_a_model_without_a_chat_template_cannot_be_asked_by_agents(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    with pytest.raises(UserError, match="its tokenizer has no chat template"):
        recorder_of(for_agents(Config(model=ModelConfig(path=str(tmp_path)))))
