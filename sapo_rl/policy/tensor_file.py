"""A safetensors file written one tensor after the other: a sharded model is gathered so, and never whole in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
import xxhash
from torch import Tensor

HEADER_BYTES = 4 << 20
"""Room for the header, which is written last: names and shapes of about 30,000 tensors."""
DATA_START = 8 + HEADER_BYTES
"""Where the tensors begin."""
DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8"}


def write_tensors(
    path: Path, named_tensors: Iterable[tuple[str, Tensor]], digest: xxhash.xxh3_128 | None = None
) -> None:
    """Write float32, bfloat16 or uint8 tensors into a file that appears complete or not at all.

    `digest` is updated with the bytes as they are written: those from `DATA_START` on, then the header.

    Raises:
        ValueError: more names than the header has room for.
        OSError: the disk is full.
    """
    partial = path.with_suffix(".partial")
    header: dict[str, dict[str, object]] = {}
    end = 0
    with open(partial, "wb", buffering=0) as file:
        file.seek(DATA_START)
        for name, tensor in named_tensors:
            data = tensor.detach().cpu().contiguous()
            start, end = end, end + data.nbytes
            header[name] = {"dtype": DTYPE_NAMES[data.dtype], "shape": list(data.shape), "data_offsets": [start, end]}
            _write_all(file.fileno(), data.reshape(-1).view(torch.uint8).numpy().data, digest)
        text = json.dumps(header).encode()
        if len(text) > HEADER_BYTES:
            raise ValueError(f"{len(header)} tensors need a header of {len(text)} bytes, more than {HEADER_BYTES}")
        file.seek(0)
        header_bytes = memoryview(HEADER_BYTES.to_bytes(8, "little") + text.ljust(HEADER_BYTES))
        _write_all(file.fileno(), header_bytes, digest)
    os.replace(partial, path)


def _write_all(fd: int, data: memoryview, digest: xxhash.xxh3_128 | None) -> None:
    if digest is not None:
        digest.update(data)
    while data:  # the kernel takes at most 2 GiB a call
        data = data[os.write(fd, data) :]
