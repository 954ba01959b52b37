"""A judge that is a real model behind vLLM's own server."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import httpx
import pytest
import yaml
from command import free_port, steps_of
from tiny import PLAIN, make_workspace
from waiting import until

from sapo_rl.rewards import judge
from sapo_rl.rewards.registry import Completion

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def url(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `vllm serve` with the tiny model."""
    port, log = free_port(), tmp_path_factory.mktemp("judge") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_model)]
    command += [
        "--served-model-name",
        "tiny",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--max-model-len",
        "512",
        "--enforce-eager",
    ]
    with log.open("wb") as output:
        server = forked.Popen(
            command,
            server="engines",
            stdout=output,
            stderr=output,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            start_new_session=True,
        )

    def healthy() -> bool:
        assert server.poll() is None, log.read_text()
        try:
            return client.get(f"http://127.0.0.1:{port}/health").status_code == 200
        except httpx.HTTPError:
            return False

    try:
        with httpx.Client(trust_env=False) as client:
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


def test_a_real_model_compares(url: str) -> None:
    letters = {"A": 1.0, "B": 0.0}
    asked: dict[str, Any] = {"url": url, "model": "tiny", "template": "{first}|{second}", "max_tokens": 8, "pairs": 4}
    extra = {"structured_outputs": {"choice": [*letters]}}
    completions: list[Completion] = [f"reply {number}" for number in range(4)]
    found: list[Any] = asyncio.run(judge(completions, ["Q?"] * 4, choices=letters, extra=extra, **asked))
    assert sum(one["score"] for one in found) == pytest.approx(4 * 0.5)  # what one wins another has lost
    assert all(one["score"] * 4 in (0, 1, 2, 3, 4) and one["consistency"] in (0, 0.5, 1) for one in found)


def test_the_recipe_trains_on_what_a_real_model_says(url: str, tiny_model: Path, tmp_path: Path) -> None:
    args = {"url": url, "model": "tiny", "choices": {"good": 1, "bad": 0}, "max_tokens": 8}
    args |= {"template": "{thing}: {completion}", "extra": {"structured_outputs": {"choice": ["good", "bad"]}}}
    own = {
        "defaults": ["judge", "_self_"],
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "reward": {"functions": {"quality": {"on_error": "raise", "args": args}}},
        "rollout": {"batch_size": 32, "max_completion_tokens": 8, "cpu_kv_cache_gb": 0.1},
        "trainer": {"steps": 2},
        "eval": {"prompts": 4, "every": 2},
        "logging": {"wandb": "off"},
    }
    make_workspace(tmp_path, tiny_model)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(own))
    code, out, err = forked.run(tmp_path, "config=mine.yaml", "run_dir=run", PLAIN)
    assert code == 0, out + err
    steps = steps_of(tmp_path / "run")
    assert len(steps) == 2 and all(0 <= step["rewards/quality/mean"] <= 1 for step in steps)
    with sqlite3.connect(tmp_path / "judge.sqlite") as cache:
        said = {text for (text,) in cache.execute("SELECT text FROM answers")}
    assert said <= {"good", "bad"} and said
