"""The environment variables of vLLM's processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from sapo_rl.processes.streams import UTF8

LAUNCHER_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip

LAUNCHER_PREFIXES = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_", "WANDB_")

QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def child_environment(
    device: str, environ: Mapping[str, str], cpus: int, devices: int = 1, core_process: bool = False
) -> dict[str, str]:
    """Return the environment of the child: `environ` without the trainer's launcher, its own devices, no telemetry.

    `device` is `cpu` or `cuda:<index>`, the index among the devices that `environ` leaves visible, and `devices` how
    many from there on; `core_process` is that of `EngineSettings`. On the CPU the ranks of this machine share its
    `cpus` cores; a user's own OMP_NUM_THREADS counts where one rank runs (with more, launchers set it to 1).
    """
    env = _bare(environ) | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(core_process))}
    if device != "cpu":
        first = int(device.removeprefix("cuda:"))
        visible = environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(index) for index in range(first + devices)]
        chosen = ",".join(name.strip() for name in names[first : first + devices])
        return env | {"CUDA_VISIBLE_DEVICES": chosen}
    ranks = int(environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks > 1 or "OMP_NUM_THREADS" not in env:
        env["OMP_NUM_THREADS"] = str(max(1, cpus // ranks))
    if devices > 1:  # else vLLM asks for a NUMA node for each worker
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return _on_cpu(env) | {"CUDA_VISIBLE_DEVICES": ""}


def server_environment(environ: Mapping[str, str], on_gpu: bool, cpus: int, workers: int) -> dict[str, str]:
    """Return the environment of a server: `environ` without a launcher, with all its devices, no telemetry.

    On the CPU one of vLLM's `workers` has all `cpus` cores, unless the user has set OMP_NUM_THREADS.
    """
    env = _bare(environ)
    if on_gpu:
        return env
    if workers == 1:  # part of vLLM's core process, which would spin, on another core, for the end of its every step
        env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        env.setdefault("OMP_NUM_THREADS", str(cpus))
    return _on_cpu(env)


def _bare(environ: Mapping[str, str]) -> dict[str, str]:
    env = {
        name: value
        for name, value in environ.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))
    # Whatever the locale: vLLM does not start where it is ASCII.
    text = {**UTF8, "PYTHONIOENCODING": "utf-8:backslashreplace"}
    more = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    return env | QUIET | text | more


def _on_cpu(env: dict[str, str]) -> dict[str, str]:
    # Waiting threads that spin took nine tenths of the speed of two engines on two cores.
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Small functions of vLLM are compiled even in eager mode: 17 s at the first call, and it takes a C++ compiler.
    return env | {"TORCHDYNAMO_DISABLE": "1"}
