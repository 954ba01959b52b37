"""An engine over HTTP, against servers that fail in every way."""

from __future__ import annotations

import json
import select
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from sapo_rl.engines import remote as server_module
from sapo_rl.engines.base import Completion, Request, Sampling
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
        self.gone = threading.Event()
        """A client has gone away."""

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
            while not self.server.release.wait(0.02):
                if select.select([self.connection], [], [], 0)[0]:  # closed by the client
                    self.server.gone.set()
                    break
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


def ask(engine: RemoteEngine, count: int) -> list[Future[list[Completion]]]:
    return engine.submit([Request([10 + i], 2, seed=i) for i in range(count)], SAMPLING)


def test_tokens_go_in_and_out_under_the_label_and_the_key(fake: Fake, engine: RemoteEngine) -> None:
    answers = [future.result(20) for future in ask(engine, 8)]
    assert answers == [[Completion([10 + i], False, [-0.5])] * 2 for i in range(8)]
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
def test_a_server_that_goes_away_loses_what_it_did_not_answer(
    fake: Fake, engine: RemoteEngine, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    fake.fault = {14: fault, 15: fault}
    for _ in range(2):
        *answered, one, two = ask(engine, 6)
        for future in (one, two):
            with pytest.raises(EngineLost):
                future.result(20)
        assert [len(future.result(20)) for future in answered] == [2, 2, 2, 2]
        engine.tell("told once")
        engine.recover()
    told = [record.message for record in caplog.records if record.name.startswith("sapo_rl")]
    assert len(told) == 2  # once each time, as it was back in between
    assert "what it has not answered waits for another server" in told[0]
    fake.fault = {}
    assert len([future.result(20) for future in ask(engine, 6)]) == 6


def test_a_server_is_back_when_it_has_the_weights_that_are_expected(fake: Fake, engine: RemoteEngine) -> None:
    fake.info["weight_id"] = "other/3"
    with pytest.raises(EngineLost, match=r"does not have the current weights yet \(it has other/3\)"):
        engine.recover()
    fake.status = 503
    with pytest.raises(EngineLost, match="so it is"):
        engine.recover()
    fake.status = 200
    for weight_id in ("run/3", "run/10"):  # newer ones will do
        fake.info["weight_id"] = weight_id
        engine.recover()
    fake.info["weight_id"] = "run/2"
    with pytest.raises(EngineLost, match=r"it has run/2"):
        engine.recover()


def test_a_server_that_falls_silent_is_asked_and_given_up(
    fake: Fake, engine: RemoteEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "QUIET_SECONDS", 0.2)
    fake.fault = {10: "hang", 11: "hang"}
    first, second = ask(engine, 2)
    time.sleep(1.0)
    assert sum(method == "info" for method, _ in fake.asked) >= 2
    assert not first.done() and not second.done()
    fake.info.update(weight_id=None)
    for future in (first, second):
        with pytest.raises(EngineLost, match="does not have the current weights"):
            future.result(20)
    fake.info.update(INFO)
    (later,) = engine.submit([Request([12], 1)], SAMPLING)
    assert len(later.result(20)) == 1


def test_a_cancelled_request_closes_its_connection_and_leaves_the_others(fake: Fake, engine: RemoteEngine) -> None:
    fake.fault = {10: "hang"}
    given_up, *others = ask(engine, 3)
    assert [len(future.result(20)) for future in others] == [2, 2]
    assert given_up.cancel()
    assert given_up.cancelled()
    assert fake.gone.wait(20)


def test_closing_gives_up_what_is_under_way_and_takes_nothing_more(fake: Fake, engine: RemoteEngine) -> None:
    fake.fault = {10: "hang"}
    (waiting,) = ask(engine, 1)
    engine.close()
    engine.close()
    assert waiting.cancelled()
    with pytest.raises(EngineError, match="closed"):
        ask(engine, 1)[0].result(20)
    engine.info()  # the transport has still to say good-bye


def test_what_vllm_refuses_fails_with_its_words(fake: Fake, engine: RemoteEngine) -> None:
    fake.fault = {11: "500"}
    good, bad, other = ask(engine, 3)
    with pytest.raises(EngineError, match=r"refused the call:\nso it is"):
        bad.result(20)
    assert len(good.result(20)) == len(other.result(20)) == 2


def test_an_answer_without_end_is_not_read(fake: Fake, engine: RemoteEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "ANSWER_BYTES", 1000)
    assert engine.submit([Request([5], n=2)], SAMPLING)[0].result(60)
    fake.info["more"] = "x" * 2000
    with pytest.raises(EngineError, match=r"answers with more than 1,000 bytes; is it a sapo-serve\?"):
        engine.info()
    monkeypatch.setattr(server_module, "ANSWER_BYTES", 0)
    with pytest.raises(EngineError, match=r"answers with more than 1,024 bytes"):
        engine.submit([Request([5] * 600, n=2)], SAMPLING)[0].result(60)


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
