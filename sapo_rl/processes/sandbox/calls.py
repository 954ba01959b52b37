"""The system calls that a program of a model's cannot make, by number."""

from __future__ import annotations

import struct
from functools import cache

_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The kernel's number for each kind of processor that `platform.machine` names."""
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_CLONE_THREAD = 0x10000
_ALLOW, _REFUSE, _NO_SUCH_CALL, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000  # EPERM, ENOSYS
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


@cache
def filter_of(machine: str) -> bytes:
    """Return a program of the kernel's packet filter by which it refuses these calls, and every new process.

    It reads `struct seccomp_data`: the call's number at 0, the machine at 4, arguments from 16. What is refused fails
    with EPERM; threads are allowed. A filter cannot see the flags of `clone3`, which does not exist therefore, and
    libraries take `clone`. Calls by another convention than the machine's own end the process.

    Args:
        machine: a kind of processor, one of MACHINES.
    """
    load, equal, at_least, test, end = 0x20, 0x15, 0x35, 0x45, 0x06
    column = MACHINES.index(machine)
    lines = [(load, 0, 0, 4), (equal, 1, 0, _MACHINES[machine]), (end, 0, 0, _KILL), (load, 0, 0, 0)]
    lines += [(at_least, 0, 1, 0x40000000), (end, 0, 0, _KILL)]  # the x32 convention
    lines += [(equal, 0, 1, _CLONE3), (end, 0, 0, _NO_SUCH_CALL)]
    for both in _REFUSED.values():
        if (number := both[column]) is not None:
            lines += [(equal, 0, 1, number), (end, 0, 0, _REFUSE)]
    lines += [(equal, 0, 3, _CLONE[machine]), (load, 0, 0, 16), (test, 1, 0, _CLONE_THREAD), (end, 0, 0, _REFUSE)]
    lines += [(end, 0, 0, _ALLOW)]
    return b"".join(struct.pack("HBBI", *line) for line in lines)
