"""A server of the real package openenv on the loopback, in an environment of its own: it does not go with vLLM's."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import free_port
from scripted import config, one, play, prompt

from sapo_rl.environments.adapters.openenv import OpenEnv
from sapo_rl.environments.lookup import build
from sapo_rl.errors import UserError
from sapo_rl.types import Stop

PYTHON = os.environ.get("OPENENV_PYTHON")
"""The interpreter of a virtual environment with `pip install openenv`; scripts/test.sh makes one."""
needs_server = pytest.mark.skipif(PYTHON is None, reason="OPENENV_PYTHON names no interpreter with openenv")

SERVER = """
import sys
import uvicorn
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class Guess(Action):
    number: str


class Hint(Observation):
    text: str = ""


class Game(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, low=1, **more):
        self.number, self.count = low + seed % 9, 0
        return Hint(text=f"From {low} to {low + 8}.", done=False, reward=0.0)

    def step(self, action, timeout_s=None, **more):
        self.count += 1
        guess = int(action.number)
        if guess == self.number:
            return Hint(text="right", done=True, reward=1.0)
        return Hint(text="higher" if guess < self.number else "lower", done=False, reward=0.125)

    @property
    def state(self):
        return State(step_count=self.count)


app = create_app(Game, Guess, Hint, env_name="game", max_concurrent_envs=8)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("openenv"), free_port()
    (folder / "server.py").write_text(SERVER)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    assert PYTHON is not None
    process = subprocess.Popen([PYTHON, "server.py", str(port)], cwd=folder, env=environment)
    try:
        deadline = time.monotonic() + 120
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def count_up(said: str) -> str:
    """Guess the numbers from 11 on, one after the other."""
    return str(11 + said.count("higher"))


@needs_server
def test_a_game_on_a_server_is_played_to_its_end(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = {"url": server, "action": "number", "observation": "text", "reset_args": {"low": 11}}
    groups = play(config("openenv", args=args, max_turns=9), count_up, prompt(0), prompt(1))
    for group in groups:
        first, second = group.samples
        assert first.stop is Stop.ENVIRONMENT and first.text == second.text
        assert first.rewards == {"environment": 1 + 0.125 * (len(first.turns) - 1)}
    assert len({len(group.samples[0].turns) for group in groups}) == 2


@needs_server
def test_what_the_server_refuses_is_told(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"environment 'openenv' failed on prompt 0: step: RuntimeError: the server said"
    ):
        one(config("openenv", args={"url": server, "action": "word", "observation": "text"}), lambda said: "5")
    with pytest.raises(UserError, match=r"KeyError: .*the observation has no field 'words'; it has: .*text"):
        one(config("openenv", args={"url": server, "action": "number", "observation": "words"}), lambda said: "5")


def test_a_server_that_is_not_there_and_an_address_that_is_none_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args: dict[str, Any] = {"url": f"http://127.0.0.1:{free_port()}", "action": "number"}
    with pytest.raises(UserError, match=r"failed on prompt 0: reset: .*Connect call failed"):
        one(config("openenv", args=args), lambda said: "5")
    with pytest.raises(UserError, match=r"^environment\.args\.url: 'game' is no address such as http"):
        OpenEnv("game", "number")
    with pytest.raises(UserError, match=r"^environments\.a\.args\.url: 'game' is no address"):
        build("openenv", {"url": "game", "action": "number"}, [], "environments.a")
