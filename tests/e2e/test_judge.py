"""A judge that is a real model behind vLLM's own server."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from command import free_port
from waiting import until

from sapo_rl.rewards import judge
from sapo_rl.rewards.registry import Completion

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def url(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `vllm serve` with the tiny model."""
    port, log = free_port(), tmp_path_factory.mktemp("judge") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_model)]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512"]
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
            start_new_session=True,
        )

    def healthy() -> bool:
        assert server.poll() is None, log.read_text()
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        except httpx.HTTPError:
            return False

    try:
        until(healthy, seconds=300)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_a_real_model_judges(url: str) -> None:
    asked: dict[str, Any] = {"url": url, "model": "tiny", "template": "{completion}", "max_tokens": 8}
    grades = {"good": 1.0, "bad": 0.25}
    extra = {"structured_outputs": {"choice": [*grades]}}  # or a random model would say anything
    completions: list[Completion] = [f"reply {number}" for number in range(8)]
    found = asyncio.run(judge(completions, ["Q?"] * 8, choices=grades, extra=extra, **asked))
    assert set(found) <= {1.0, 0.25}
    with pytest.raises(ValueError, match="the judge's answer holds none of good, bad"):
        asyncio.run(judge(completions[:1], ["Q?"], choices=grades, **asked))
