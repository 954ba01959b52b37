"""One run that is killed again and again, at all its moments, equals one that nobody touched."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import psutil
import pytest
from command import Process, finish, folders, records, start, steps_of, timeless
from tiny import make_workspace

pytestmark = pytest.mark.e2e

PARTS = {
    "rank": "sapo_rl.run.rank",
    "engine": "sapo_rl.engines.vllm.child",
    "worker": "sapo_rl.rewards.runner.worker",
    "environment": "sapo_rl.environments.runner.worker",
}
STEPS = 10
OPTIONS = ("checkpoint.every=1", "logging.wandb=off", "rollout.max_restarts=9")
GATE = '''
import asyncio
from pathlib import Path


class Gate:
    """Its episodes go on as long as there is a file `open`, and say so where they wait for it."""

    def reset(self, seed):
        self.seed, self.heard = seed, 0

    async def step(self, reply):
        while not Path("open").exists():
            Path("waiting").touch()
            await asyncio.sleep(0.02)
        self.heard += 1
        return f"you said {reply}", (self.seed + len(reply)) % 7 / 7, self.heard == 3
'''
EVERY_RECORD_OF_STEPS = ("policy/loss", "eval/reward", "mismatch/probe_logp_diff")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return make_workspace(
        tmp_path_factory.mktemp("workspace"),
        tiny_model,
        rollout={"verify_every": 2},
        trainer={"steps": STEPS},
        eval={"every": 3, "prompts": 8},
    )


class Attempt:
    """A start or resume, under way; `begin` is how a user's is started, or one of those of `forked`."""

    def __init__(
        self, workspace: Path, *arguments: str, begin: Callable[..., Process] = start, folder: Path | None = None
    ) -> None:
        self.workspace, self.before, self.begin, self.resumed = workspace, folders(workspace), begin, folder
        self.others = set(psutil.Process().children(recursive=True))
        self.process = begin(workspace, *arguments, *OPTIONS)
        self.launcher = psutil.Process(self.process.pid)
        self.seen: set[psutil.Process] = set()

    @property
    def folder(self) -> Path:
        if self.resumed:
            return self.resumed
        (folder,) = self.until(lambda: folders(self.workspace) - self.before)
        return folder

    def until(self, what: Callable[[], Any], seconds: float = 400) -> Any:
        """Wait until something is the case, or the run has ended; return it."""
        looked, deadline = 0.0, time.monotonic() + seconds
        while (now := time.monotonic()) < deadline:
            if now - looked > 0.2:  # it reads a file of every process on the machine
                looked = now
                with contextlib.suppress(psutil.Error):
                    self.seen |= set(psutil.Process().children(recursive=True)) - self.others
            if (found := what()) or self.process.poll() is not None:
                return found
            time.sleep(0.01)
        raise AssertionError(f"it never came; the last was {records(self.folder)[-1:]}")

    def part(self, name: str) -> psutil.Process | None:
        """A process of the run; without a launcher, its first one is the rank."""
        if name == "rank" and self.begin is forked.start:
            return self.launcher
        if name == "engine" and self.begin is not start:
            return forked.engine_with(self.folder / "logs/vllm_rank0.log")
        with contextlib.suppress(psutil.Error):
            for process in self.launcher.children(recursive=True):
                if forked.is_module(process, PARTS[name]):
                    return process
        return None

    def send(self, name: str, *numbers: int) -> None:
        process = self.launcher if name == "launcher" else self.until(lambda: self.part(name))
        for number in numbers:
            process.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; no process outlives it."""
        told = finish(self.process)
        _, alive = psutil.wait_procs(self.seen, timeout=20)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
        return told


def made(folder: Path) -> int:
    """The last step that is recorded."""
    return steps_of(folder)[-1]["step"] if (folder / "metrics.jsonl").is_file() and steps_of(folder) else 0


def saved(folder: Path) -> int:
    """The last step of which there is a checkpoint."""
    return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step_*")), default=0)


def left_behind() -> set[Path]:
    """Folders of weights and of temporary files that no process owns."""
    found = set()
    for folder in [*Path("/dev/shm").glob("sapo-weights-*"), *Path(tempfile.gettempdir()).glob("sapo-run-*")]:
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.add(folder)
            finally:
                os.close(lock)
    return found


def numbers(folder: Path) -> list[dict[str, Any]]:
    """All that was measured, without what tells of restarts."""
    measured = [record for record in timeless(folder) if set(EVERY_RECORD_OF_STEPS) & set(record)]
    of_restarts = ("rollout/engine_restarts", "rollout/prefix_hit")
    return [{k: v for k, v in record.items() if k not in of_restarts} for record in measured]


def test_a_run_killed_at_all_its_moments_equals_one_that_nobody_touched(workspace: Path) -> None:
    whole = forked.new_run(workspace, *OPTIONS)
    composing = Attempt(workspace, "config=tiny.yaml")
    time.sleep(0.5)
    composing.send("launcher", signal.SIGKILL)
    assert composing.end()[0] == -signal.SIGKILL

    first = Attempt(workspace, "config=tiny.yaml")
    first.until(lambda: first.part("rank"))
    first.send("launcher", signal.SIGKILL)
    assert first.end()[0] == -signal.SIGKILL

    run = Attempt(workspace, "config=tiny.yaml", begin=forked.launch)
    run.send("engine", signal.SIGKILL)  # while it starts
    run.send("worker", signal.SIGKILL)  # while it has nothing to do
    folder = run.folder
    again = f"resume={folder.relative_to(workspace)}"
    code, _, err = forked.run(workspace, again, *OPTIONS, begin=forked.launch)
    assert code == 2 and f"still going on (process {run.process.pid} on {os.uname().nodename})" in err, err
    run.until(lambda: made(folder) >= 1)
    run.send("rank", signal.SIGSTOP, signal.SIGCONT)
    run.send("launcher", signal.SIGSTOP, signal.SIGCONT)
    run.until(lambda: saved(folder) >= 2)
    run.send("rank", signal.SIGKILL)
    code, _, err = run.end()
    assert code == 128 + signal.SIGKILL and "was killed by SIGKILL" in err and "Traceback" not in err
    assert f"sapo-train {again}" in err

    early = Attempt(workspace, again)
    early.until(lambda: early.part("rank"))
    early.send("launcher", signal.SIGINT)  # alone, and before there is a step to finish
    code, _, err = early.end()
    assert (code, err) == (130, "")

    restarted, last = Attempt(workspace, again, begin=forked.launch, folder=folder), saved(folder)
    restarted.until(lambda: saved(folder) > last)
    restarted.send("engine", signal.SIGABRT)
    restarted.until(lambda: saved(folder) > last + 1)
    restarted.send("launcher", signal.SIGHUP)
    code, out, err = restarted.end()
    assert code == 130 and "Traceback" not in err, out + err
    assert again in out and saved(folder) == made(folder)
    assert 1 in [record["rollout/engine_restarts"] for record in steps_of(folder)[last:]]

    saving, last = Attempt(workspace, again, begin=forked.launch, folder=folder), saved(folder)
    saving.until(lambda: list((folder / "checkpoints").glob(".step_*.partial")) or saved(folder) > last)
    saving.send("launcher", signal.SIGKILL)
    assert saving.end()[0] == -signal.SIGKILL

    left = left_behind()
    final = Attempt(workspace, again, begin=forked.launch, folder=folder)
    final.until(lambda: made(folder) == STEPS)
    with contextlib.suppress(psutil.Error, AttributeError):  # it has ended meanwhile
        final.send("rank", signal.SIGABRT)
    final.end()
    if not (folder / "final").exists():
        code, out, err = Attempt(workspace, again, begin=forked.launch, folder=folder).end()
        assert code == 0, out + err
    assert numbers(folder) == numbers(whole)
    assert steps_of(folder)[0]["rollout/engine_restarts"] == 1  # of the one that was killed while it started
    assert [record["step"] for record in steps_of(folder)] == list(range(1, STEPS + 1))
    assert not left & left_behind()


def test_what_is_killed_in_mid_episode_plays_it_anew_and_counts_it_once(tmp_path: Path, tiny_model: Path) -> None:
    settings = {"name": "my_gate.Gate", "max_turns": 4, "max_tokens": 200, "workers": 1}
    workspace = make_workspace(
        tmp_path,
        tiny_model,
        environment=settings,
        reward={"functions": {}},
        trainer={"steps": 7},
        eval={"every": 3, "prompts": 4},
    )
    (workspace / "my_gate.py").write_text(GATE)
    gate, waiting = workspace / "open", workspace / "waiting"

    def shut() -> None:
        gate.unlink()
        waiting.unlink(missing_ok=True)

    gate.touch()
    whole = forked.new_run(workspace, *OPTIONS)
    shut()
    run = Attempt(workspace, "config=tiny.yaml", begin=forked.start)
    run.until(waiting.exists)
    run.send("engine", signal.SIGKILL)
    gate.touch()
    folder = run.folder
    run.until(lambda: made(folder) >= 1)
    for part, last in (("environment", 3), ("rank", 5)):
        shut()
        run.until(waiting.exists)
        run.send(part, signal.SIGKILL)
        gate.touch()
        run.until(lambda last=last: made(folder) >= last)
    code, out, err = run.end()
    assert code == -signal.SIGKILL, out + err
    code, out, err = Attempt(workspace, f"resume={folder.relative_to(workspace)}", begin=forked.start).end()
    assert code == 0, out + err
    assert numbers(folder) == numbers(whole)
    assert [record["step"] for record in steps_of(folder)] == [1, 2, 3, 4, 5, 6, 7]
    assert all(record["episode/turns/mean"] == 3 and not record["episode/dropped"] for record in steps_of(folder))
