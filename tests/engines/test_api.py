"""Whom a rollout server works for, what it refuses, and how it says that its engine hangs."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest

from sapo_rl.engines.base import Completion
from sapo_rl.engines.key import VARIABLE
from sapo_rl.engines.vllm import api, pulse
from sapo_rl.engines.vllm.api import OWNED_SECONDS, TrainerApi
from sapo_rl.engines.vllm.bodies import SamplingBody
from sapo_rl.weights.rendezvous import Rendezvous

KEY = "a_key_for_tests_alone"
MEETING = Rendezvous("127.0.0.1", 1, "", 2, 1.0)


class Engine:
    """Says of itself what `info` asks for; its workers do nothing."""

    vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(world_size=1),
        device_config=SimpleNamespace(device_type="cpu"),
        model_config=SimpleNamespace(model="m", dtype="torch.float32", max_model_len=8, get_vocab_size=lambda: 100),
    )
    answers = True

    async def is_sleeping(self) -> bool:
        while not self.answers:
            await asyncio.sleep(0.01)
        return False

    def generate(self, *arguments: Any) -> AsyncIterator[Any]:
        raise AssertionError("nothing that is wrong reaches vLLM")

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(api.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> TrainerApi:
    """In front of a vLLM that answers every path of its own with 200 and the body's size."""
    monkeypatch.setenv(VARIABLE, KEY)
    stub = ModuleType("vllm.v1.engine.exceptions")
    stub.EngineDeadError = type("EngineDeadError", (Exception,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, stub.__name__, stub)  # vLLM takes long to import

    async def vllm(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            return
        message = await receive()
        assert not message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(len(message["body"])).encode()})

    made = TrainerApi(vllm)
    made.held.weight_id = "run/1"
    return made


async def post(server: TrainerApi, path: str, content: Any, method: str = "POST", key: str = KEY) -> httpx.Response:
    """One request over HTTP, without a network."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await server(scope | {"app": SimpleNamespace(state=SimpleNamespace(engine_client=Engine()))}, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        return await client.request(method, path, content=content, headers={"Authorization": f"Bearer {key}"})


def ask(server: TrainerApi, method: str, *arguments: Any) -> tuple[int, str]:
    async def call() -> None:
        await getattr(server, method)(Engine(), *arguments)

    try:
        asyncio.run(call())
    except Exception as error:
        return 0, str(error)
    return 1, ""


def test_a_run_keeps_the_server_as_long_as_it_is_heard_of(clock: list[float], server: TrainerApi) -> None:
    assert ask(server, "join", "first/1", MEETING) == (1, "")
    for _ in range(5):
        clock[0] += OWNED_SECONDS - 1
        assert ask(server, "join", "second/1", MEETING) == (0, "is in use by another run")
        assert ask(server, "info", "first") == (1, "")
        assert ask(server, "info", "second") == (1, "")
    assert ask(server, "join", "first/2", MEETING) == (1, "")  # a new meeting of the same run
    clock[0] += OWNED_SECONDS
    assert ask(server, "join", "second/1", MEETING) == (1, "")
    assert ask(server, "join", "first/3", MEETING) == (0, "is in use by another run")


def test_a_run_that_leaves_makes_room_at_once_and_nobody_else_can_do_so(clock: list[float], server: TrainerApi) -> None:
    ask(server, "join", "first/1", MEETING)
    ask(server, "leave", "second")
    assert ask(server, "join", "second/1", MEETING)[0] == 0
    ask(server, "leave", "first")
    assert ask(server, "join", "second/1", MEETING) == (1, "")


def test_a_server_without_a_key_lets_nobody_in(server: TrainerApi) -> None:
    assert asyncio.run(post(server, "/sapo/info", '{"run": ""}')).status_code == 200
    server.key = b""
    for key in ("", KEY):
        assert asyncio.run(post(server, "/sapo/info", '{"run": ""}', key=key)).status_code == 401


SAMPLING = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 4,
    "logprobs": True,
}  # fmt: skip
GENERATE = {
    "weight_id": "run/1", "token_ids": [1, 2], "n": 1, "seed": None, "sampling": SAMPLING, "stop_token_ids": [3]
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"token_ids": [1, 1.5]}, "token_ids.1: Input should be a valid integer, not 1.5"),
        ({"token_ids": [1.0]}, "token_ids.0"),
        ({"token_ids": ["1"]}, "token_ids.0"),
        ({"token_ids": [True]}, "token_ids.0"),
        ({"token_ids": [-1]}, "token_ids.0"),
        ({"token_ids": [2**80]}, "token_ids.0"),
        ({"token_ids": [1, 100]}, "token_ids: 100 is no token of this model, they are below 100"),
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": [1] * 8}, "token_ids: has 8 tokens, must have fewer than 8"),
        ({"token_ids": {"0": 1}}, "token_ids"),
        ({"n": 0}, "n: "),
        ({"n": 10**9}, "n: Input should be less than or equal to 16384"),
        ({"n": 1.5}, "n: "),
        ({"seed": -1}, "seed: "),
        ({"seed": 2**63}, "seed: "),
        ({"seed": "7"}, "seed: "),
        ({"seed": 0.5}, "seed: "),
        ({"stop_token_ids": list(range(99)) * 50}, "stop_token_ids: List should have at most 128 items"),
        ({"stop_token_ids": [100]}, "stop_token_ids: 100 is no token"),
        ({"stop_token_ids": [None]}, "stop_token_ids.0"),
        ({"weight_id": None}, "weight_id: "),
        ({"weight_id": "run/4x"}, "weight_id: String should match pattern"),
        ({"weight_id": "4"}, "weight_id: String should match pattern"),
        ({"bogus": 1}, "bogus: Extra inputs are not permitted"),
        ({"sampling": {}}, "sampling.temperature: Field required"),
        ({"sampling": SAMPLING | {"temperature": 1e-30}}, "sampling.temperature: Input should be 0, or at least 0.01"),
        ({"sampling": SAMPLING | {"temperature": 2.5}}, "sampling.temperature: "),
        ({"sampling": SAMPLING | {"temperature": float("nan")}}, "sampling.temperature: "),
        ({"sampling": SAMPLING | {"temperature": float("inf")}}, "sampling.temperature: "),
        ({"sampling": SAMPLING | {"top_p": 0.0}}, "sampling.top_p: "),
        ({"sampling": SAMPLING | {"top_k": -1}}, "sampling.top_k: "),
        ({"sampling": SAMPLING | {"top_k": 2**40}}, "sampling.top_k: "),
        ({"sampling": SAMPLING | {"min_p": 1.5}}, "sampling.min_p: "),
        ({"sampling": SAMPLING | {"repetition_penalty": 0.0}}, "sampling.repetition_penalty: "),
        ({"sampling": SAMPLING | {"repetition_penalty": 1e300}}, "sampling.repetition_penalty: "),
        ({"sampling": SAMPLING | {"max_tokens": 0}}, "sampling.max_tokens: "),
        ({"sampling": SAMPLING | {"logprobs": 5}}, "sampling.logprobs: "),
        ({"sampling": SAMPLING | {"stop": ["x"]}}, "sampling.stop: Extra"),
        ({"sampling": 1}, "sampling: Input should be an object"),
    ],
)
def test_what_vllm_could_not_answer_is_refused_in_a_sentence(
    server: TrainerApi, changes: dict[str, Any], named: str
) -> None:
    answer = asyncio.run(post(server, "/sapo/generate", json.dumps(GENERATE | changes)))
    assert answer.status_code == 400
    told = answer.json()["error"]
    assert told.startswith(named) and len(told.splitlines()) == 1 and len(told) < 250


@pytest.mark.parametrize("body", [b"{", b"[]", b"null", b"\xff", b"[" * 10**5, b'{"run": "\\ud800"}', b"{}", b""])
def test_a_body_that_is_no_json_of_the_right_shape_is_the_clients_mistake(server: TrainerApi, body: bytes) -> None:
    answer = asyncio.run(post(server, "/sapo/info", body))
    assert answer.status_code == 400
    assert "Traceback" not in answer.text and len(answer.json()["error"]) < 200


def test_a_meeting_is_looked_at_before_the_workers_get_it(server: TrainerApi) -> None:
    for text in ("", "[]", "{}", MEETING.to_json().replace("2", '"two"')):
        answer = asyncio.run(post(server, "/sapo/join", json.dumps({"name": "run/1", "meeting": text})))
        assert answer.status_code == 400 and answer.json()["error"].startswith("meeting")
    body = json.dumps({"name": "run/1", "meeting": MEETING.to_json()})
    assert asyncio.run(post(server, "/sapo/join", body)).status_code == 200


def test_only_the_methods_are_answered_and_only_when_posted(server: TrainerApi) -> None:
    for path in ("/sapo/_run", "/sapo/", "/sapo/info/", "/sapo/__init__"):
        assert asyncio.run(post(server, path, "{}")).status_code == 404
    assert asyncio.run(post(server, "/sapo/info", "{}", method="GET")).status_code == 405


@pytest.mark.parametrize("path", ["/sapo/info", "/v1/completions"])
def test_bodies_have_a_limit_and_small_ones_reach_vllm_whole(
    server: TrainerApi, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "MOST_BYTES", 1000)
    sent = 0

    async def parts(count: int) -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(count):
            sent += 100
            yield b" " * 100

    answer = asyncio.run(post(server, path, parts(10**6)))
    assert answer.status_code == 413
    assert "1000 bytes" in answer.json()["error"]
    assert sent <= 1200
    if path.startswith("/v1"):
        assert asyncio.run(post(server, path, parts(10))).text == "1000"


def test_an_engine_that_hangs_is_no_healthy_server(server: TrainerApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(pulse, "SILENT_SECONDS", 0.5)
    engine = Engine()
    scope = {"type": "lifespan", "app": SimpleNamespace(state=SimpleNamespace(engine_client=engine))}

    async def healthy() -> bool:
        statuses = {
            (await post(server, "/health", "", method="GET")).status_code,
            (await post(server, "/sapo/info", '{"run": ""}')).status_code,
        }
        assert statuses in ({200}, {503})
        return statuses == {200}

    async def until(expected: bool) -> None:
        async with asyncio.timeout(30):
            while await healthy() != expected:
                await asyncio.sleep(0.05)

    async def life() -> None:
        ended = asyncio.Event()

        async def receive() -> dict[str, str]:
            await ended.wait()
            return {"type": "lifespan.shutdown"}

        serving = asyncio.ensure_future(server(scope, receive, None))  # type: ignore[arg-type]
        await until(True)
        engine.answers = False
        await until(False)
        with server.pulse.occupied():  # weights are on their way: the core has to wait for the trainer
            await until(True)
        await until(False)
        engine.answers = True
        await until(True)
        ended.set()
        await serving

    asyncio.run(life())


class Writing(Engine):
    """Answers a prompt when the test releases it; weights arrive when they are released."""

    def __init__(self) -> None:
        self.prompts: list[dict[str, Any]] = []
        self.release = asyncio.Event()
        self.arrived = asyncio.Event()
        self.ended = 0
        self.resets = 0
        self.failure = ""

    async def generate(self, prompt: dict[str, Any], params: object, name: str) -> AsyncIterator[Any]:
        self.prompts.append(prompt)
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.ended += 1
            raise
        yield prompt["prompt_token_ids"]

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> None:
        if method == "receive_broadcast":
            await self.arrived.wait()
            if self.failure:
                raise RuntimeError(self.failure)

    async def reset_prefix_cache(self, reset_running_requests: bool) -> bool:
        self.resets += 1
        return reset_running_requests


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "sampling_params", lambda *_: None)
    monkeypatch.setattr(api, "completions_of", lambda token_ids: [Completion(token_ids, False)])


def generate(server: TrainerApi, engine: Writing, weight_id: str, first: int = 1) -> asyncio.Future[dict[str, Any]]:
    return asyncio.ensure_future(server.generate(engine, weight_id, [first, 2], 1, None, SamplingBody(**SAMPLING), []))


def load(server: TrainerApi, engine: Writing, weight_id: str) -> asyncio.Future[dict[str, Any]]:
    return asyncio.ensure_future(server.load(engine, server.meeting or "", weight_id, "{}"))


async def settled() -> None:
    """Let everything that can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.usefixtures("written")
def test_what_is_being_written_goes_on_over_newer_weights(server: TrainerApi) -> None:
    async def check() -> None:
        engine, server.held.weight_id, server.meeting = Writing(), "run/4", "m"
        before = generate(server, engine, "run/4")
        await settled()
        loading = load(server, engine, "run/5")
        await settled()
        meanwhile = generate(server, engine, "run/4", first=3)
        early = generate(server, engine, "run/5", first=4)
        await settled()
        assert [prompt["prompt_token_ids"][0] for prompt in engine.prompts] == [1, 3]  # newer ones wait for the load
        engine.arrived.set()
        await loading
        after = generate(server, engine, "run/5", first=5)
        late = generate(server, engine, "run/4", first=6)  # of a rank that has not heard of the newer ones
        await settled()
        assert not before.done()
        engine.release.set()
        for asked, first in ((before, 1), (meanwhile, 3), (early, 4), (after, 5), (late, 6)):
            assert (await asked)["completions"][0]["token_ids"] == [first, 2]
        salts = {prompt["prompt_token_ids"][0]: prompt["cache_salt"] for prompt in engine.prompts}
        assert salts == {
            1: "run/4 0",
            3: "run/4 0",
            4: "run/5 0",
            5: "run/5 0",
            6: "run/5 0",
        }  # cached under what wrote it
        assert engine.resets == 0

    asyncio.run(check())


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize("asked", ["run/5", "run/10", "other/4", "other/3"])
def test_weights_that_are_newer_or_another_runs_are_not_given(server: TrainerApi, asked: str) -> None:
    async def check() -> None:
        engine, server.held.weight_id = Writing(), "run/4"
        with pytest.raises(Exception, match=f"holds the weights run/4, not {asked}"):
            await generate(server, engine, asked)
        server.held.weight_id = None
        with pytest.raises(Exception, match="holds the weights None, not run/4"):
            await generate(server, engine, "run/4")
        assert not engine.prompts

    asyncio.run(check())


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize("how", ["half loaded", "given up", "joined anew"])
def test_what_loses_its_weights_is_ended_and_refused(server: TrainerApi, how: str) -> None:
    async def check() -> None:
        engine, server.held.weight_id, server.meeting = Writing(), "run/4", "m"
        running = generate(server, engine, "run/4")
        await settled()
        if how == "joined anew":
            await server.join(engine, "run/2", MEETING)
        else:
            engine.failure = "the trainer is gone"
            loading = load(server, engine, "run/5")
            waiting = generate(server, engine, "run/5")
            await settled()
            if how == "given up":  # the trainer closed its connection
                loading.cancel()
            engine.arrived.set()
            with pytest.raises((RuntimeError, asyncio.CancelledError)):
                await loading
            with pytest.raises(Exception, match="holds the weights None, not run/5"):
                await waiting
        with pytest.raises(Exception, match="lost the weights run/4 meanwhile"):
            await running
        left = "folder/0" if how == "joined anew" else None
        with pytest.raises(Exception, match=f"holds the weights {left}, not run/4"):
            await generate(server, engine, "run/4")
        assert server.held.coming is None
        assert engine.ended == 1

    asyncio.run(check())


def test_the_cache_is_emptied_only_of_what_came_by_vllms_own_paths(server: TrainerApi) -> None:
    async def check() -> None:
        engine, server.meeting = Writing(), "m"
        engine.arrived.set()
        resets = []
        for version, path, method in ((1, "", ""), (2, "/health", "GET"), (3, "/v1/completions", "POST"), (4, "", "")):
            if path:
                await post(server, path, "{}", method=method)
            await load(server, engine, f"run/{version}")
            resets.append(engine.resets)
        assert resets == [0, 0, 1, 1]

    asyncio.run(check())
