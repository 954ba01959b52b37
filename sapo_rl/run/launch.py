"""Several processes for one run: `launch.*` becomes `accelerate launch`, and how the ranks end becomes an exit code.

`python -m sapo_rl.run.launch ARGUMENTS` is `accelerate launch ARGUMENTS`, but for what it tells of a failure: the
rank's own error, once, and its exit code, where Accelerate prints a traceback of its own and exits with 1.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from sapo_rl import processes
from sapo_rl.processes import streams

if __name__ == "__main__":
    processes.begin()

from sapo_rl.config import LaunchConfig
from sapo_rl.errors import UserError, did_you_mean, first_line, program
from sapo_rl.errors.files import expand, is_file, read_yaml
from sapo_rl.paths import CONFIGS

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

SINGLE = "single"
"""The profile of one process, which needs no launcher."""
SHARDING = ("FSDP", "DEEPSPEED")
"""Accelerate's `distributed_type`s under which weights or the optimiser's state are spread over the ranks."""
LOOPBACK = "sapo-loopback"
"""The rendezvous of one machine's ranks, in `ranks`, for torch's launcher."""
PEER_LOST = 69
"""Exit code of a rank that ended because another did."""

_passed: set[int] = set()
"""The signals that this launcher has handed to its ranks."""


def check_variables(environ: Mapping[str, str]) -> None:
    """Raise UserError where the variables by which ranks find each other are not as a launcher sets them."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if not (text := environ.get(name, "0")).isdecimal():
            raise UserError(f"the environment variable {name} is '{text}', must be a whole number; unset it")
    rank, size = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
    if rank >= size:
        raise UserError(f"the environment variable RANK is {rank}, but WORLD_SIZE is {size}; unset both")
    if size > 1 and "RANK" not in environ:
        raise UserError(f"the environment variable WORLD_SIZE is {size}, without RANK; unset it")


def profile_path(name: str) -> Path:
    """Return the Accelerate config that `launch.profile` names, shipped or the user's own.

    Raises:
        UserError: there is none, or it needs a package that is not installed.
    """
    shipped = {path.stem: path for path in (CONFIGS / "accelerate").glob("*.yaml")}
    path = shipped.get(name, expand(name))
    if not is_file(path):
        options = did_you_mean(name, [SINGLE, *shipped])
        raise UserError(f"launch.profile: no profile '{name}'; {options}, or the path of an Accelerate config")
    content = read_yaml(path)
    if not isinstance(content, dict) or "distributed_type" not in content:
        raise UserError(f"launch.profile: '{path}' is no Accelerate config (no distributed_type in it)")
    if content["distributed_type"] == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"launch.profile: '{name}' needs DeepSpeed: pip install deepspeed")
    return path


def shards(name: str) -> bool:
    """Return whether a profile spreads weights or the optimiser's state over the ranks. Raises as `profile_path`."""
    return _content(name)["distributed_type"] in SHARDING


def fsdp(name: str) -> dict[str, Any] | None:
    """Return what a profile sets of FSDP; None where it is of another kind. Raises as `profile_path`."""
    content = _content(name)
    return content.get("fsdp_config") or {} if content["distributed_type"] == "FSDP" else None


def _content(name: str) -> dict[str, Any]:
    return {"distributed_type": "NO"} if name == SINGLE else read_yaml(profile_path(name))


def command(launch: LaunchConfig, folder: Path | None) -> list[str]:
    """Return the command that runs this machine's ranks: `launch.profile` is `single`, or the launcher's business.

    `folder` is the run folder; None on machines that learn it from machine 0.
    """
    rank = ["-m", "sapo_rl.run.rank", *([str(folder)] if folder else [])]
    if launch.profile == SINGLE:
        return [sys.executable, *rank]
    per_machine = launch.num_processes // launch.num_machines
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) // per_machine)
    options: dict[str, object] = {
        "config_file": profile_path(launch.profile),
        "num_processes": launch.num_processes,
        "num_machines": launch.num_machines,
        "machine_rank": launch.machine_rank,
        "main_process_ip": launch.main_process_ip or "127.0.0.1",
        # On one machine any free port, so that runs side by side do not meet.
        "main_process_port": launch.main_process_port if launch.num_machines > 1 else 0,
        # Static: others deal out ranks as they like, but machine 0 has the run folder. It listens on all interfaces.
        "rdzv_backend": "static" if launch.num_machines > 1 else LOOPBACK,
        "rdzv_conf": f"timeout={int(launch.timeout)}",
        "num_cpu_threads_per_process": threads,
    }
    return [sys.executable, "-m", "sapo_rl.run.launch", *(f"--{key}={value}" for key, value in options.items()), *rank]


def main() -> None:
    """Run `accelerate launch` with this process's arguments and exit as its ranks did."""
    os.environ[processes.PARENT] = str(os.getpid())  # of the ranks
    streams.outlive()
    quiet = {} if "TORCH_CPP_LOG_LEVEL" in os.environ else {"TORCH_CPP_LOG_LEVEL": "FATAL"}
    os.environ.update(quiet)  # else a machine that is late is told of in pages of C++ frames
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from sapo_rl.run import ranks

    processes.imports_are_done()
    for name in quiet:
        del os.environ[name]
    ranks.register_rendezvous()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    arguments = launch_command_parser().parse_args()
    if arguments.rdzv_backend == LOOPBACK:
        arguments.rdzv_endpoint = ranks.ADDRESS  # not read, but torch warns where there is none
    arguments.log_dir = os.devnull  # nothing is logged there; a folder would be left behind
    # The launcher would kill ranks half a minute after a Ctrl-C; they may need longer to finish a step and to save.
    arguments.signals_to_handle = "none"
    for number in processes.stopping_signals():
        signal.signal(number, _pass_on)
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        sys.exit(outcome(error.failures, _passed))
    except (DistError, ConnectionError) as error:
        where = f"{arguments.main_process_ip}:{arguments.main_process_port}"
        print(f"{program()}: the machines did not meet at {where}: {first_line(error)}", file=sys.stderr)
        sys.exit(2)


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Hand a signal to the ranks, which are in sessions of their own; end where there is none yet."""
    import psutil

    _passed.add(number)
    ranks = psutil.Process().children()
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(number)
    if not ranks:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def outcome(failures: Mapping[int, ProcessFailure], passed: Collection[int] = ()) -> int:
    """Say which rank's failure ended the run, unless it has said so itself; return the exit code.

    Of several, a rank that only lost its peers or was stopped by the launcher is not the cause. That the ranks ended by
    a signal of the user's, which the launcher has `passed` on, is no news.
    """

    def innocence(rank: int) -> tuple[bool, bool, int]:
        code = failures[rank].exitcode
        return code == -signal.SIGTERM, code == PEER_LOST, failures[rank].timestamp

    rank = min(failures, key=innocence)
    code = failures[rank].exitcode
    if code in (2, 128 + signal.SIGINT):
        return code
    if -code in passed:
        return 128 - code
    if code == PEER_LOST:
        reason = "a rank on another machine ended or cannot be reached any more; that machine's output tells why"
    elif code < 0:
        reason = f"rank {rank} {processes.killed_by(-code)}"
    else:
        reason = f"rank {rank} failed, as shown above"
    print(f"{program()}: {reason}; the run has ended", file=sys.stderr)
    return 128 - code if code < 0 else 1


if __name__ == "__main__":
    main()
