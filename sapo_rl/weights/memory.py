"""GPU memory that another process on the same GPU can read: the few calls of the CUDA driver that torch does not offer.

Memory from torch's own allocator would do only where it is not made of expandable segments, and sharing it would also
share whatever else lies in the same block.
"""

from __future__ import annotations

import ctypes
import functools

import torch

HANDLE_BYTES = 64
LAZY_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    """CUipcMemHandle; passed to the driver by value."""

    _fields_ = [("reserved", ctypes.c_byte * HANDLE_BYTES)]


class SharedMemory:
    """Bytes on a GPU, allocated by this process or by another one that exported them."""

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3,
        }  # fmt: skip

    @classmethod
    def allocate(cls, size: int) -> SharedMemory:
        """Allocate `size` bytes on the current device, outside torch's allocator.

        Raises:
            torch.OutOfMemoryError: there is no room, even with what torch only keeps for later use.
        """
        address = ctypes.c_uint64()
        torch.cuda.synchronize()  # also makes the device's context current in this thread
        status = _driver().cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size))
        if status:
            torch.cuda.empty_cache()
            status = _driver().cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size))
        if status:
            raise torch.OutOfMemoryError(f"no {size / 2**20:.0f} MiB on the GPU for the weights on their way to vLLM")
        return cls(address.value, size)

    @classmethod
    def open(cls, handle: bytes, size: int) -> SharedMemory:
        """Map memory that another process exported; it stays mapped until this process ends."""
        address = ctypes.c_uint64()
        torch.cuda.synchronize()
        _check(
            _driver().cuIpcOpenMemHandle_v2(
                ctypes.byref(address), _Handle.from_buffer_copy(handle), ctypes.c_uint(LAZY_PEER_ACCESS)
            )
        )
        return cls(address.value, size)

    def export(self) -> bytes:
        """Return the handle by which another process opens this memory."""
        handle = _Handle()
        _check(_driver().cuIpcGetMemHandle(ctypes.byref(handle), ctypes.c_uint64(self.address)))
        return bytes(handle)

    def tensor(self) -> torch.Tensor:
        """Return the memory as a (size,) uint8 tensor, valid until it is freed."""
        return torch.as_tensor(self, device=torch.device("cuda", torch.cuda.current_device()))

    def free(self) -> None:
        """Free memory that this process allocated. No process may have it mapped, no tensor may be in use."""
        torch.cuda.synchronize()
        _check(_driver().cuMemFree_v2(ctypes.c_uint64(self.address)))


def pin(memory: torch.Tensor) -> bool:
    """Have the GPU copy to this memory of the host by itself; return whether it can. Undo it before it is freed."""
    torch.cuda.synchronize()
    address, size = ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.nbytes)
    return _driver().cuMemHostRegister_v2(address, size, ctypes.c_uint(0)) == 0


def unpin(memory: torch.Tensor) -> None:
    """Undo `pin`; nothing may be under way."""
    torch.cuda.synchronize()
    _check(_driver().cuMemHostUnregister(ctypes.c_void_p(memory.data_ptr())))


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(ctypes.c_int(status), ctypes.byref(text))
        raise RuntimeError(f"CUDA driver error {status}: {(text.value or b'unknown').decode()}")
