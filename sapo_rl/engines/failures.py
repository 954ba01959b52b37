"""What vLLM's failures mean to a user: the last words of its log, and what to change."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sapo_rl.engines.base import EngineSettings
from sapo_rl.errors import EngineError, UserError

OUT_OF_MEMORY = (
    "No available memory for the cache blocks",
    "To serve at least one request",
    "Free memory on device",
    "Available memory on node",
    "out of memory",
    "can't allocate memory",
)
LACKS = {
    "Read-only file system": "/dev/shm and TMPDIR must be writable",
    "No space left on device": "it needs room in /dev/shm (of a container: --shm-size) and TMPDIR",
    "Too many open files": "raise the limit (ulimit -n)",
}
"""What an error of the machine says, and what helps."""
ERROR = re.compile(r"(\(.*?pid=\d+\) )?(?P<said>(?!.*Engine core initialization failed)[\w.]*(Error|Exception)\b.*)")
"""A line that ends a traceback, of the child or of vLLM's core process; the last one tells why vLLM did not start."""
REFUSED = re.compile(r"(?P<said>model\.lora\.sync: .*)")
"""What the worker says of a setting."""
NO_ROOM_BESIDE = (
    "vLLM does not fit into the GPU's memory beside the trainer; lower rollout.gpu_memory_utilization, "
    "rollout.sync_buffer_gb or trainer.tokens_per_micro_batch, or spread the trainer (launch=fsdp2)"
)


def refused_call(method: str, trace: str) -> EngineError | UserError:
    """Return the error of a call that vLLM answered with a traceback; a UserError for want of memory or of adapters."""
    lines = trace.splitlines()
    if found := REFUSED.search("".join(lines[-1:])):
        return UserError(found["said"])
    if said := _out_of_memory(lines):
        return UserError(f"{NO_ROOM_BESIDE}\nIt said, during {method}: {said}")
    return EngineError(f"vLLM refused the call:\n{trace}")


def too_slow_a_start(settings: EngineSettings) -> UserError:
    """Return the error of a vLLM that is not ready in time."""
    return UserError(
        f"rollout.start_timeout: vLLM was not ready within {settings.start_timeout:g} s; raise it, or see in "
        f"{settings.log_path} what it waited for"
    )


def failed_start(settings: EngineSettings, reason: str, tail: Sequence[str]) -> UserError:
    """Return why vLLM did not start, by the last lines of its log, and what to change."""
    memory = _out_of_memory(tail)
    if memory is None:
        errors = [found["said"] for found in map(ERROR.match, tail) if found]
        said = errors[-1][:400] if errors else reason
        helps = "".join(f"; {text}" for mark, text in LACKS.items() if mark in said)
        return UserError(f"vLLM did not start: {said}{helps}\n  see {settings.log_path}")
    keys = "rollout.cpu_kv_cache_gb" if settings.device == "cpu" else "rollout.gpu_memory_utilization"
    return UserError(
        f"vLLM does not fit into memory; change {keys} or lower rollout.max_num_seqs or the lengths.\nIt said: {memory}"
    )


def _out_of_memory(lines: Sequence[str]) -> str | None:
    """Return the last line that says that memory ran out; None where there is none."""
    found = next((line for line in reversed(lines) if any(mark in line for mark in OUT_OF_MEMORY)), None)
    return found and found.strip()[-400:]
