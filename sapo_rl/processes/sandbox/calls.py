"""The system calls that a program of a model's cannot make, by number."""

from __future__ import annotations

from typing import Any

_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The kernel's number for each kind of processor that `platform.machine` names."""
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_REFUSED = {
    # the network
    "socket": (41, 198),
    # memory that no limit counts
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    # new processes, and others
    "fork": (57, None),
    "vfork": (58, None),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    # large surfaces of the kernel
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
}
"""Numbers on x86_64 and on aarch64."""

MACHINES = tuple(_MACHINES)
"""What is known."""


def numbers(machine: str) -> dict[str, Any]:
    """Return the arguments of `inside._forbid` for a kind of processor, one of MACHINES."""
    column = MACHINES.index(machine)
    refused = [number for both in _REFUSED.values() if (number := both[column]) is not None]
    return {"machine": _MACHINES[machine], "refused": refused, "clone": _CLONE[machine], "clone3": _CLONE3}
