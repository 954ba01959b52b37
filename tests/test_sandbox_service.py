"""Programs in the sandbox of a service: one that really runs them, and ones that are busy, broken, lying or gone."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rewards.groups import group, rewards

from sapo_rl.config import RewardConfig, RewardFunctionConfig
from sapo_rl.environments import Python
from sapo_rl.errors import UserError
from sapo_rl.processes.posting import ServerError
from sapo_rl.processes.sandbox import Job, Limits, Result, SandboxMissing, Service, check, reach, run
from sapo_rl.rewards import RewardPool, check_function, code

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
TIGHT = Limits(1, 3)
DOUBLE = "def double(x):\n    return 2 * x"

Answer = Callable[[dict[str, Any], int], Any]
"""What a service says to a request and its number: JSON, a status, text, or None to hang up."""


class Handler(BaseHTTPRequestHandler):
    """Answers as SandboxFusion does, or as `answer` says."""

    protocol_version = "HTTP/1.1"  # connections are kept

    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.append((self.path, self.headers["Authorization"], body))
        server.connections.add(self.client_address)
        said = server.answer(body, len(server.asked))
        if said is None:
            self.close_connection = True
            return
        written = (said if isinstance(said, str) else json.dumps(said)).encode()
        self.send_response(said if isinstance(said, int) else 200)
        self.send_header("Retry-After", "0.05")
        self.send_header("Content-Length", str(len(written)))
        self.end_headers()
        self.wfile.write(written)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(answer: Answer) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answer, server.asked, server.daemon_threads = answer, [], True
    server.connections = set()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def really(body: dict[str, Any], number: int) -> dict[str, Any]:
    """Run the program in a sandbox of this machine."""
    limits = Limits(10, body["run_timeout"], body["memory_limit_MB"], output_bytes=1 << 20)
    found = asyncio.run(run(Job(body["code"], stdin=body["stdin"]), limits))
    late = found.stopped == "seconds"
    ran = {"stdout": found.stdout, "stderr": found.stderr, "execution_time": found.seconds}
    ran |= {"status": "TimeLimitExceeded"} if late else {"status": "Finished", "return_code": found.exit_code}
    return {"status": "Failed" if late or found.exit_code else "Success", "message": "", "run_result": ran}


@pytest.fixture(scope="module")
def service() -> Iterator[Any]:
    """A service that runs what it gets."""
    with serving(really) as server:
        yield server


def result(server: Any, program: str, limits: Limits = TIGHT, **job: Any) -> Result:
    return asyncio.run(run(Job(program, **job), limits, Service(server.url, retries=1)))


def test_a_program_is_sent_and_its_result_is_as_here(service: Any) -> None:
    program = (
        "import sys\nprint('it is', end=' ')\nprint(int(input()) + 1)\nprint('\u00e9', file=sys.stderr)\nsys.exit(3)"
    )
    found = result(service, program, stdin="41\n")
    assert found == asyncio.run(run(Job(program, stdin="41\n"), TIGHT))
    assert (found.exit_code, found.stdout, found.stderr) == (3, "it is 42\n", "\u00e9\n")
    path, _, body = service.asked[-1]
    assert path == "/run_code" and body["language"] == "python"
    assert (body["run_timeout"], body["memory_limit_MB"]) == (3, 512)


def test_checks_and_calls_are_reported_and_taken_out_of_what_is_printed(service: Any) -> None:
    program = "print('a')\ndef pair(x):\n    print('b', end='')\n    return (x, x + 1)"
    job: dict[str, Any] = {"checks": ["assert pair(1) == (1, 2)", "assert 0, 'no'"], "function": "pair", "calls": [[1]]}
    found = result(service, program, **job)
    assert found.reports == asyncio.run(run(Job(program, **job), Limits())).reports
    assert found.reports == [{"passed": True}, {"passed": False, "error": "AssertionError: no"}, {"value": [1, 2]}]
    assert found.stdout == "a\nbb"


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("while True: pass", (137, "")),
        ("import time\ntime.sleep(100)", (137, "seconds")),
        ("x = bytearray(30 << 30)", (1, "")),
        ("import os\nos.kill(os.getpid(), 9)", (1, "")),  # refused by the sandbox of the service
        ("print('x' * 99999)", (0, "output")),
        ("(", (1, "")),
        ('import os\nos.write(1, b\'{"key": "x", "passed": true}\\n\')', (0, "")),
    ],
)
def test_what_a_program_does_wrong_is_its_own_fault(service: Any, program: str, expected: tuple[int, str]) -> None:
    asked = len(service.asked)
    limits = Limits(1, 2 if "sleep" in program else 20)  # on the clock: a busy machine gives a loop less than half
    found = result(service, program, limits, checks=["assert False"] if "key" in program else [])
    assert (found.exit_code, found.stopped) == expected
    assert not any(report.get("passed") for report in found.reports) and len(found.stdout) <= 1 << 16
    assert len(service.asked) == asked + 1  # it is not sent again


@pytest.mark.parametrize(
    ("answer", "told", "times"),
    [
        (lambda *_: 503, "the server answered 503", 2),
        (lambda *_: 404, "the server answered 404", 1),
        (lambda *_: None, "no connection to the server", 2),
        (
            lambda *_: {"status": "SandboxError", "message": "no room", "run_result": None},
            "its sandbox failed.*no room",
            2,
        ),
        (lambda *_: {"status": "Success", "run_result": {"status": "Finished", "return_code": 0}}, "did not run", 2),
        (
            lambda *_: {"status": "Failed", "run_result": {"status": "TimeLimitExceeded", "stdout": ""}},
            "did not run the program",
            2,
        ),
        (lambda *_: {"status": "Success", "run_result": {"status": "Error"}}, "its sandbox failed", 2),
        (lambda *_: {"status": "Success", "run_result": 7}, "its sandbox failed", 2),
        (lambda *_: "<html>", "none of SandboxFusion's: <html>", 1),
        (lambda *_: [1], "none of SandboxFusion's", 1),
        (lambda *_: "[" * 99999, "none of SandboxFusion's", 1),
    ],
)
def test_what_a_service_does_wrong_is_no_result(answer: Answer, told: str, times: int) -> None:
    with serving(answer) as server, pytest.raises(ServerError, match=told):
        result(server, "print(1)")
    assert len(server.asked) == times


def test_a_service_that_has_a_bad_moment_is_asked_again() -> None:
    bad: dict[int, Any] = {1: 429, 2: None, 3: {"status": "SandboxError", "message": "", "run_result": None}}
    with serving(lambda body, number: bad[number] if number in bad else really(body, number)) as server:
        found = asyncio.run(run(Job("print(1)"), Limits(), Service(f"{server.url}/run_code")))
    assert found.stdout == "1\n" and len(server.asked) == 4


def test_the_time_that_a_program_waited_is_not_its_own() -> None:
    waited = {"status": "Failed", "run_result": {"status": "TimeLimitExceeded", "stdout": "", "execution_time": 3.0}}
    with serving(lambda body, number: waited if number == 1 else really(body, number)) as server:
        found = result(server, "print(1)")
    assert (found.stdout, found.stopped, len(server.asked)) == ("1\n", "", 2)


def test_connections_are_kept_for_the_programs_that_follow(service: Any) -> None:
    async def use(rounds: int, at_once: int) -> None:
        for _ in range(rounds):
            jobs = [run(Job("print(1)"), TIGHT, Service(service.url)) for _ in range(at_once)]
            assert [found.stdout for found in await asyncio.gather(*jobs)] == ["1\n"] * at_once

    service.connections.clear()
    asyncio.run(use(3, 1))
    assert len(service.connections) == 1
    asyncio.run(use(2, 3))
    assert len(service.connections) <= 1 + 3


def test_of_a_program_that_prints_without_end_no_more_is_read_than_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sapo_rl.processes.posting._LONGEST", 1 << 20)
    ran = {"status": "Finished", "return_code": 0, "stdout": "x" * (1 << 22), "stderr": ""}
    with serving(lambda *_: {"status": "Success", "run_result": ran}) as server:
        found = result(server, "print('x' * (1 << 22))")
    assert (found.exit_code, found.stopped, found.stdout, len(server.asked)) == (137, "output", "", 1)


def test_a_service_that_is_too_slow_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr("sapo_rl.processes.sandbox.service._WAIT_SECONDS", 0.1)
    with serving(lambda *_: release.wait(60) and None) as server:
        with pytest.raises(ServerError, match=r"the server gave no answer in 0\.2 s"):
            result(server, "print(1)", Limits(1, 0.1))
        release.set()


def test_the_reward_is_that_of_the_programs_and_a_failure_is_no_zero(service: Any, tmp_path: Path) -> None:
    texts = [DOUBLE, "def double(x): return 3 * x", "while True: pass"]
    groups = [group(index, texts, answer=["assert double(2) == 4"]) for index in range(2)]

    def pool(url: str, **how: Any) -> RewardPool:
        args = {"cpu_seconds": 1, "sandbox": {"url": url, "retries": 0}}
        return RewardPool(
            RewardConfig(functions={"passed": RewardFunctionConfig("code", args=args, **how)}), tmp_path / "log"
        )

    with pool(service.url) as one:
        assert rewards(one.score(groups).groups, "passed") == [[1, 0, 0]] * 2
    with serving(lambda body, number: 503 if "3 * x" in body["code"] else really(body, number)) as server:
        with pool(server.url, on_error="none") as one:
            scores = one.score(groups)
        assert rewards(scores.groups, "passed") == [[1, 0]] * 2 and scores.stats.errors == {"passed": 2}
        with pool(server.url) as one, pytest.raises(UserError, match="ServerError: the server answered 503"):
            one.score(groups)


def test_inputs_and_outputs_are_compared_elsewhere_too(service: Any) -> None:
    tests = {"inputs": ["3", "4"], "outputs": ["6", "8"]}
    assert asyncio.run(code(["print(2 * int(input()))"], [tests], sandbox={"url": service.url})) == [1.0]


def test_the_tool_python_runs_elsewhere_too(service: Any) -> None:
    async def use() -> str:
        return await Python(sandbox={"url": service.url}).python("print(6 * 7)")

    assert asyncio.run(use()) == "42\n"


def test_a_service_that_runs_nothing_is_told_before_a_run_begins() -> None:
    with serving(lambda *_: 503) as server:
        said = r"code: the sandbox's service runs no program: the server answered 503.*/run_code\)"
        config = RewardFunctionConfig("code", args={"sandbox": {"url": server.url, "retries": 0}})
        with pytest.raises(UserError, match=said):
            RewardPool(RewardConfig(functions={"passed": config})).__enter__()
        with pytest.raises(SandboxMissing, match="runs no program"):
            Python(sandbox={"url": server.url, "retries": 0})

    def wrong(body: dict[str, Any], number: int) -> dict[str, Any]:
        return really({**body, "code": body["code"].replace("6 * 7", "6 * 8")}, number)

    with serving(wrong) as server, pytest.raises(SandboxMissing, match=r"ran print\(6 \* 7\) and answered: '48'"):
        reach(Service(server.url))


def test_the_key_comes_from_the_environment_alone(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANDBOX_KEY", "secret")
    asyncio.run(run(Job("print(1)"), Limits(), Service(service.url, key="SANDBOX_KEY")))
    assert service.asked[-1][1] == "Bearer secret"
    with pytest.raises(SandboxMissing, match=r"no environment variable 'OTHER_KEY'; name it in reward\.env too"):
        asyncio.run(run(Job("print(1)"), Limits(), Service(service.url, key="OTHER_KEY")))


@pytest.mark.parametrize(
    ("sandbox", "said"),
    [
        ({}, "code: sandbox.url is '', must begin with http"),
        ({"url": "localhost:8080"}, "code: sandbox.url is 'localhost:8080', must begin with http"),
        ({"url": "http://[::1"}, r"code: sandbox.url is 'http://\[::1', which has no usable host and port"),
        ({"url": "http://me:secret@a"}, "code: sandbox.url holds a user or password"),
        ({"url": "http://a", "keys": "A"}, "code: sandbox.keys: unknown; valid: url, key, retries"),
        ({"url": "http://a", "key": "sk-1"}, "code: sandbox.key must be the name of an environment variable"),
        ({"url": "http://a", "retries": -1}, "code: sandbox.retries is -1, must be a whole number of at least 0"),
        ("docker", r"code: sandbox is 'docker'; valid: bubblewrap, none, or \{url: \.\.\.\}"),
    ],
)
def test_settings_of_a_service_are_checked_before_anything_runs(sandbox: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as found:
        check_function("passed", RewardFunctionConfig("code", args={"sandbox": sandbox}))
    assert "secret" not in str(found.value)
    if isinstance(sandbox, dict) and "url" in sandbox:
        with pytest.raises(SandboxMissing):
            check(sandbox)
