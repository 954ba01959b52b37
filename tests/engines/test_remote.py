"""An engine over HTTP, against servers that fail in every way."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from sapo_rl.engines import remote as server_module
from sapo_rl.engines.base import Completion, IndexedRequest, Request, Sampling
from sapo_rl.engines.remote import RemoteEngine, RemoteSettings
from sapo_rl.errors import EngineError, EngineLost, UserError

SAMPLING = Sampling(0.7, 0.9, 5, 0.1, 1.1, 8, True)
INFO = {"weight_id": "run/3", "dtype": "float32", "max_model_len": 64}


class Fake(ThreadingHTTPServer):
    """Answers each prompt with its own tokens, until `fault` says otherwise for the prompt's first token."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.info: dict[str, Any] = dict(INFO)
        self.status = 200
        self.fault: dict[int, str] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.keys: set[str | None] = set()
        self.release = threading.Event()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients go away here on purpose."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Fake  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        method = self.path.removeprefix("/sapo/")
        self.server.asked.append((method, body))
        self.server.keys.add(self.headers["Authorization"])
        if self.server.status != 200:
            return self.say(self.server.status, {"error": "so it is"})
        if method == "info":
            return self.say(200, self.server.info)
        fault = self.server.fault.get(body["token_ids"][0], "")
        if fault == "hang":
            self.server.release.wait(30)
        if fault in ("drop", "hang"):
            self.close_connection = True
            return None
        if fault:
            return self.say(int(fault), {"error": "so it is"})
        one = {"token_ids": body["token_ids"], "truncated": False, "logps": [-0.5]}
        return self.say(200, {"completions": [one] * body["n"]})

    def say(self, status: int, content: object) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def fake() -> Iterator[Fake]:
    made = Fake()
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    yield made
    made.release.set()
    made.shutdown()
    made.server_close()


@pytest.fixture
def engine(fake: Fake) -> Iterator[RemoteEngine]:
    made = RemoteEngine(RemoteSettings(fake.address, "secret", "float32", 64, [2], start_timeout=0.1, timeout=20.0))
    made.expect("run/3", 3)
    yield made
    made.close()


def ask(engine: RemoteEngine, count: int, window: int = 6) -> Iterator[tuple[int, list[Completion]]]:
    left: deque[IndexedRequest] = deque((i, Request([10 + i], 2, seed=i)) for i in range(count))
    return engine.stream(lambda: left.popleft() if left else None, window, SAMPLING)


def test_tokens_go_in_and_out_under_the_label_and_the_key(fake: Fake, engine: RemoteEngine) -> None:
    answers = dict(ask(engine, 8))
    assert answers == {i: [Completion([10 + i], False, [-0.5])] * 2 for i in range(8)}
    assert fake.keys == {"Bearer secret"}
    bodies = {body["token_ids"][0]: body for method, body in fake.asked if method == "generate"}
    assert bodies[12] == {
        "weight_id": "run/3",
        "token_ids": [12],
        "n": 2,
        "seed": 2,
        "sampling": {
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "max_tokens": 8,
            "logprobs": True,
        },
        "stop_token_ids": [2],
    }
    assert len(bodies) == 8
    assert engine.weight_version == 3


@pytest.mark.parametrize("fault", ["drop", "409", "503"])
def test_a_server_that_goes_away_gives_back_what_it_did_not_answer(
    fake: Fake, engine: RemoteEngine, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    fake.fault = {14: fault}
    for _ in range(2):
        answered: list[int] = []
        with pytest.raises(EngineLost) as lost:
            for number, _ in ask(engine, 5):
                answered.append(number)
        assert sorted([*answered, *(number for number, _ in lost.value.unfinished)]) == [0, 1, 2, 3, 4]
        assert 4 not in answered
        engine.tell("told once")
    assert len(caplog.records) == 2  # once each time, as it was back in between
    fake.fault = {}
    assert len(dict(ask(engine, 5))) == 5


def test_a_server_with_other_weights_takes_nothing(fake: Fake, engine: RemoteEngine) -> None:
    fake.info["weight_id"] = "other/3"
    taken = []
    with pytest.raises(EngineLost, match=r"does not have the current weights yet \(it has other/3\)") as lost:
        list(engine.stream(lambda: taken.append(1), 4, SAMPLING))
    assert not taken
    assert not lost.value.unfinished


def test_a_server_that_falls_silent_is_asked_and_given_up(
    fake: Fake, engine: RemoteEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "QUIET_SECONDS", 0.2)
    fake.fault = {10: "hang"}
    stream = ask(engine, 1)
    change = threading.Timer(0.5, lambda: fake.info.update(weight_id=None))
    change.start()
    with pytest.raises(EngineLost) as lost:
        list(stream)
    assert [number for number, _ in lost.value.unfinished] == [0]
    assert sum(method == "info" for method, _ in fake.asked) >= 2


def test_what_vllm_refuses_ends_the_run_with_its_words(fake: Fake, engine: RemoteEngine) -> None:
    fake.fault = {11: "500"}
    with pytest.raises(EngineError, match=r"refused the call:\nso it is"):
        list(ask(engine, 3))


@pytest.mark.parametrize(("status", "words"), [(401, "refuses the API key"), (404, "not started by sapo-serve")])
def test_a_wrong_key_or_a_wrong_server_is_the_users_mistake(
    fake: Fake, engine: RemoteEngine, status: int, words: str
) -> None:
    fake.status = status
    with pytest.raises(UserError, match=rf"rollout.servers: {fake.address}.*{words}"):
        engine.wait_ready()


def test_a_run_starts_only_on_a_server_of_its_recipe(fake: Fake, engine: RemoteEngine) -> None:
    engine.wait_ready()
    fake.info |= {"max_model_len": 63}
    with pytest.raises(UserError, match=r"takes 63 tokens, the run needs 64"):
        engine.wait_ready()
    fake.info |= {"dtype": "bfloat16"}
    with pytest.raises(UserError, match=r"computes in bfloat16, model.dtype is float32"):
        engine.wait_ready()
    fake.status = 503
    with pytest.raises(UserError, match=r"sapo-serve config="):
        engine.wait_ready()
