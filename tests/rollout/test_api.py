"""Whom a rollout server works for."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from sapo_rl.rollout import api
from sapo_rl.rollout.api import OWNED_SECONDS, TrainerApi
from sapo_rl.rollout.key import VARIABLE


class Engine:
    """Says of itself what `info` asks for; its workers do nothing."""

    vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(world_size=1),
        device_config=SimpleNamespace(device_type="cpu"),
        model_config=SimpleNamespace(model="m", dtype="torch.float32", max_model_len=8),
    )

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(api.time, "monotonic", lambda: now[0])
    monkeypatch.setenv(VARIABLE, "key")
    return now


def ask(server: TrainerApi, method: str, *arguments: str) -> tuple[int, str]:
    async def call() -> None:
        await getattr(server, method)(Engine(), *arguments)

    try:
        asyncio.run(call())
    except Exception as error:
        return 0, str(error)
    return 1, ""


def test_a_run_keeps_the_server_as_long_as_it_is_heard_of(clock: list[float]) -> None:
    server = TrainerApi(app=None)  # type: ignore[arg-type]
    assert ask(server, "join", "first/1", "") == (1, "")
    for _ in range(5):
        clock[0] += OWNED_SECONDS - 1
        assert ask(server, "join", "second/1", "") == (0, "is in use by another run")
        assert ask(server, "info", "first") == (1, "")
        assert ask(server, "info", "second") == (1, "")
    assert ask(server, "join", "first/2", "") == (1, "")  # a new meeting of the same run
    clock[0] += OWNED_SECONDS
    assert ask(server, "join", "second/1", "") == (1, "")
    assert ask(server, "join", "first/3", "") == (0, "is in use by another run")


def test_a_run_that_leaves_makes_room_at_once_and_nobody_else_can_do_so(clock: list[float]) -> None:
    server = TrainerApi(app=None)  # type: ignore[arg-type]
    ask(server, "join", "first/1", "")
    ask(server, "leave", "second")
    assert ask(server, "join", "second/1", "")[0] == 0
    ask(server, "leave", "first")
    assert ask(server, "join", "second/1", "") == (1, "")
