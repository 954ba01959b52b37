"""How ranks and machines are started, and how they end: real launches, gloo, a tiny model, vLLM on the CPU."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import forked
import psutil
import pyarrow.parquet as pq
import pytest
from command import finish, folders, run, start, steps_of, wait_for_step
from tiny import PLAIN, make_workspace

from sapo_rl.config import LaunchConfig
from sapo_rl.paths import CONFIGS
from sapo_rl.run import launch
from sapo_rl.run.checks import ConfigError, check
from sapo_rl.run.compose import loads

SHORT = ("eval.prompts=0", "logging.wandb=off", "checkpoint.save_final=false")
Machine: TypeAlias = Callable[..., forked.Popen]
TWO = ("launch=ddp", "launch.num_processes=2")
GAME = (
    "environment.name=guess",
    "environment.workers=1",
    "environment.max_turns=2",
    "environment.max_tokens=100",
    "reward.functions.odd.function=my_rewards.odd_said",
)
"""Has a run play episodes."""
REWARDS = """
def odd_said(completions, **columns):
    return [sum(ord(c) % 2 for one in messages for c in one["content"]) / 100 for messages in completions]
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return make_workspace(
        tmp_path_factory.mktemp("workspace"), tiny_model, REWARDS, trainer={"steps": 500}, checkpoint={"every": 2}
    )


@pytest.fixture(scope="module")
def interrupted(workspace: Path) -> SimpleNamespace:
    """Two ranks on one machine that play episodes, stopped by SIGHUP to their launcher after eight steps at least."""
    before = folders(workspace)
    process = forked.launch(workspace, "config=tiny.yaml", *TWO, *SHORT, *GAME)
    folder = wait_for_step(process, workspace, before, 8)
    everything = psutil.Process(process.pid).children(recursive=True)
    listening = {
        connection.laddr.ip
        for one in everything
        for connection in one.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    (launcher,) = psutil.Process(process.pid).children()
    ranks = launcher.children()
    launcher.send_signal(signal.SIGHUP)
    code, out, err = finish(process)
    assert folders(workspace) - before == {folder}
    return SimpleNamespace(folder=folder, code=code, out=out, err=err, ranks=ranks, listening=listening)


@pytest.mark.multi
def test_ranks_of_one_machine_listen_where_no_other_reaches_them(interrupted: SimpleNamespace) -> None:
    assert interrupted.listening and interrupted.listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.multi
def test_stop_saves_once_for_all_ranks_and_exits_with_130(interrupted: SimpleNamespace) -> None:
    assert interrupted.code == 130, interrupted.out + interrupted.err
    assert "Traceback" not in interrupted.err
    assert interrupted.out.count("resume=") == 1
    last = steps_of(interrupted.folder)[-1]["step"]
    assert (interrupted.folder / "checkpoints" / f"step_{last:06d}").is_dir()
    assert json.loads((interrupted.folder / "environment.json").read_text())["device"]["processes"] == 2
    assert len(interrupted.ranks) == 2 and not any(rank.is_running() for rank in interrupted.ranks)


@pytest.mark.multi
def test_each_rank_plays_its_share_of_the_episodes_in_a_process_of_its_own(interrupted: SimpleNamespace) -> None:
    for record in steps_of(interrupted.folder):
        assert record["episode/turns/max"] == 2 and record["episode/dropped"] == 0
        assert record["stop/turns"] + record["stop/environment"] == 1  # it may hit
        assert record["policy/grad_norm"] > 0 and 0 < record["episode/masked_fraction"] < 1
    table = pq.read_table(interrupted.folder / "completions/step_00001.parquet").to_pydict()
    assert sorted(Counter(table["prompt_index"]).values()) == [4] * 4 and set(table["turns"]) <= {1, 2}
    assert {f"environments_rank{rank}.log" for rank in (0, 1)} <= {
        path.name for path in (interrupted.folder / "logs").iterdir()
    }


def left_in_shared_memory() -> set[str]:
    """Segments of shared memory that no process uses any more; those in use are of tests that run at the same time."""
    used = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it has just ended
            used += maps.read_text()
    return {str(path) for path in Path("/dev/shm").glob("psm_*") if str(path) not in used}


@pytest.mark.multi
def test_sharded_ranks_share_an_engine_that_spans_them_and_equal_one(workspace: Path) -> None:
    alone = forked.new_run(workspace, *SHORT, "trainer.steps=2", "checkpoint.every=0")
    left = left_in_shared_memory()
    spread = ("launch=fsdp2", "launch.num_processes=2", "rollout.tensor_parallel=2", "rollout.verify_every=1")
    brief = (*SHORT, "trainer.steps=2", "checkpoint.every=0")
    folder = forked.new_run(workspace, *spread, *brief, begin=forked.launch)
    assert {path.name for path in (folder / "logs").iterdir()} == {
        "vllm_rank0.log",
        "rewards_rank0.log",
        "rewards_rank1.log",
    }
    assert not left_in_shared_memory() - left  # of what vLLM's workers talk to each other by
    for own, single in zip(steps_of(folder), steps_of(alone), strict=True):
        for name in ("policy/loss", "policy/grad_norm", "reward/mean", "perf/completion_tokens"):
            assert own[name] == pytest.approx(single[name], rel=1e-4), name


@pytest.mark.multi
def test_killed_rank_ends_the_run_and_is_named(workspace: Path) -> None:
    before = folders(workspace)
    process = start(workspace, "config=tiny.yaml", *TWO, *SHORT, "checkpoint.every=0", PLAIN)
    wait_for_step(process, workspace, before, 2)
    everything = psutil.Process(process.pid).children(recursive=True)
    (second,) = [one for one in everything if one.environ().get("RANK") == "1" and "sapo_rl.run.rank" in one.cmdline()]
    second.kill()
    code, _, err = finish(process)
    assert code == 128 + signal.SIGKILL
    assert "rank 1 was killed by SIGKILL" in err and "out of memory" in err
    assert "Traceback" not in err
    assert not psutil.wait_procs(everything, timeout=5)[1]


@pytest.mark.multi
def test_mistake_that_all_ranks_find_is_told_once_with_code_2(workspace: Path) -> None:
    code, _, err = forked.run(workspace, "config=tiny.yaml", *TWO, "data.max_prompt_tokens=2", begin=forked.launch)
    assert code == 2
    assert err.count("data.max_prompt_tokens") == 1 and len(err.splitlines()) == 1, err


@pytest.mark.multi
def test_training_that_diverges_ends_all_ranks_and_is_told_once(workspace: Path) -> None:
    steep = (*TWO, *SHORT, "trainer.learning_rate=1e30", PLAIN)
    code, out, err = forked.run(workspace, "config=tiny.yaml", *steep, begin=forked.launch)
    assert code == 2, out + err
    assert err.count("step 1: the gradient norm is nan") == 1 and "Traceback" not in err


@pytest.mark.multi
def test_other_number_of_ranks_than_asked_for_is_refused(workspace: Path) -> None:
    how = ("--standalone", "--nproc_per_node=2", "-m", "sapo_rl", "config=tiny.yaml", "launch.num_processes=4")
    code, _, err = forked.run(workspace, *how, module="torch.distributed.run", begin=forked.launch)
    assert code != 0
    (line,) = [line for line in err.splitlines() if line.startswith("sapo-train:")]
    assert "launch.num_processes: is 4, but the launcher started 2" in line


@pytest.mark.multi
def test_accelerate_that_would_start_one_process_instead_of_two_is_refused(workspace: Path) -> None:
    accelerate = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "sapo_rl")
    before = folders(workspace)
    code, _, err = run(workspace, "config=tiny.yaml", module=accelerate)
    assert code != 0 and "ignores --num_processes" in err
    assert folders(workspace) == before


@pytest.fixture(scope="module")
def machines(workspace: Path) -> Iterator[tuple[Machine, ...]]:
    """Two network namespaces joined by a cable: two machines with one disk."""
    names = [f"sapo{os.getpid()}{side}" for side in "ab"]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0][-9:], "netns", names[0], "type", "veth", "peer", names[1][-9:], "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", name[-9:])
            ip("-n", name, "link", "set", name[-9:], "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield tuple(partial(forked.launch, workspace, network=f"/run/netns/{name}") for name in names)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces are not allowed here: {error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.mark.multi
def test_two_machines_equal_two_ranks_through_a_death_and_a_resume(
    machines: tuple[Machine, ...], workspace: Path, interrupted: SimpleNamespace
) -> None:
    first, second = machines
    before = folders(workspace)
    options = ("launch=multinode", "launch.num_processes=2", "launch.main_process_ip=10.77.0.1", "launch.timeout=30")
    other = second("config=tiny.yaml", *options, "launch.machine_rank=1", *SHORT, *GAME)
    main = first("config=tiny.yaml", *options, *SHORT, *GAME)
    folder = wait_for_step(main, workspace, before, 3)
    for process in [*psutil.Process(other.pid).children(recursive=True), psutil.Process(other.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended with one that was killed before it
            process.kill()
    code, _, err = finish(main)
    finish(other)
    assert code == 1
    assert "rank 0 lost another rank" in err and "another machine" in err and "Traceback" not in err

    again = (f"resume={folder.relative_to(workspace)}", "trainer.steps=8", *SHORT)
    other = second(*again, "launch.machine_rank=1")
    code, out, err = finish(first(*again))
    assert (code, finish(other)[0]) == (0, 0), out + err
    assert folders(workspace) - before == {folder}
    assert {path.name for path in (folder / "logs").iterdir()} == {
        f"{kind}_rank{rank}.log" for kind in ("vllm", "rewards", "environments") for rank in (0, 1)
    }
    assert [record["step"] for record in steps_of(folder)] == [1, 2, 3, 4, 5, 6, 7, 8]
    for ours, theirs in zip(steps_of(folder), steps_of(interrupted.folder), strict=False):
        for name in ("policy/loss", "policy/grad_norm", "reward/mean", "policy/entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-9), name


def test_launcher_gets_what_the_config_says() -> None:
    settings = LaunchConfig("zero2", 16, 2, 1, "10.0.0.1", 29501, 60.0)
    settings.profile = str(CONFIGS / "accelerate" / "fsdp2.yaml")
    command = launch.command(settings, Path("runs/x"))
    assert command[3] == f"--config_file={settings.profile}"
    assert {"--num_processes=16", "--num_machines=2", "--machine_rank=1", "--main_process_ip=10.0.0.1"} <= set(command)
    assert {"--main_process_port=29501", "--rdzv_conf=timeout=60"} <= set(command)
    assert command[-3:] == ["-m", "sapo_rl.run.rank", "runs/x"]
    assert launch.command(LaunchConfig(), None) == [sys.executable, "-m", "sapo_rl.run.rank"]


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"num_processes": 2}, "launch.num_processes", "launch=ddp"),
        ({"profile": "fsdp2"}, "launch.num_processes", "is 1"),
        ({"profile": "fsdp", "num_processes": 2}, "launch.profile", "fsdp2"),
        ({"profile": "ddp", "num_processes": 4, "num_machines": 2}, "launch.main_process_ip", "machine 0"),
        ({"profile": "ddp", "num_processes": 3, "num_machines": 2}, "launch.num_processes", "is 3"),
        (
            {"profile": "ddp", "num_processes": 2, "machine_rank": 1},
            "launch.machine_rank",
            "below launch.num_machines = 1",
        ),
    ],
)
def test_impossible_launch_is_refused_by_key(
    changes: dict[str, Any], key: str, words: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(workspace)
    monkeypatch.syspath_prepend(workspace)
    config = loads((workspace / "tiny.yaml").read_text())
    config.launch = LaunchConfig(**changes)
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert caught.value.key == key and words in str(caught.value)


@pytest.mark.parametrize(
    ("codes", "expected", "words"),
    [
        ({0: launch.PEER_LOST, 1: 1, 2: -15}, 1, "rank 1 failed"),
        ({0: -15, 1: -9, 2: launch.PEER_LOST}, 137, "rank 1 was killed by SIGKILL"),
        ({0: launch.PEER_LOST, 1: -15}, 1, "another machine"),
        ({0: 2, 1: -15}, 2, ""),
        ({0: -15, 1: 130}, 130, ""),
        ({0: -1, 1: -1}, 129, ""),
    ],
)
def test_cause_is_told_and_not_its_consequences(
    codes: dict[int, int], expected: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    failures: Any = {rank: SimpleNamespace(exitcode=code, timestamp=7) for rank, code in codes.items()}
    assert launch.outcome(failures, passed=[signal.SIGHUP]) == expected
    told = capsys.readouterr().err
    assert words in told if words else not told
