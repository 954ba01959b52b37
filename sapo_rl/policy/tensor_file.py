"""Tensors on their way to the disk, one at a time: a safetensors file whose header is written last."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

HEADER_BYTES = 4 << 20
"""Room for the names and shapes, about 30,000 of them."""
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def write_tensors(path: Path, named: Iterable[tuple[str, Tensor]]) -> None:
    """Write named tensors (float32 or bfloat16, any device) so that they are on the disk when this returns.

    Raises:
        ValueError: more names than the header has room for.
        OSError: the disk is full.
    """
    header: dict[str, dict[str, object]] = {}
    end = 0
    with open(path, "wb") as file:
        file.seek(8 + HEADER_BYTES)
        for name, tensor in named:
            data = tensor.detach().cpu().contiguous()
            start, end = end, end + data.nbytes
            header[name] = {"dtype": DTYPE_NAMES[data.dtype], "shape": list(data.shape), "data_offsets": [start, end]}
            file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        text = json.dumps(header).encode()
        if len(text) > HEADER_BYTES:
            raise ValueError(f"{len(header)} tensors need a header of {len(text)} bytes, more than {HEADER_BYTES}")
        file.seek(0)
        file.write(HEADER_BYTES.to_bytes(8, "little") + text.ljust(HEADER_BYTES))
        file.flush()
        os.fsync(file.fileno())
