"""The safetensors file that is written tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sapo_rl.policy.tensor_file import write_tensors


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (3, 5), "b.weight": (7,), "scalar": (), "empty": (0, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_file_holds_the_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = tensors(0) | {"transposed": torch.arange(6.0).reshape(2, 3).T}
    weights["grad"] = torch.ones(2, requires_grad=True)
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    write_tensors(tmp_path / "1.safetensors", weights.items())
    found = load_file(tmp_path / "1.safetensors")
    assert list(found) and set(found) == set(weights)
    for name, tensor in weights.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor.detach()), name
    assert [path.name for path in tmp_path.iterdir()] == ["1.safetensors"]


def test_tensors_are_taken_one_at_a_time(tmp_path: Path) -> None:
    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        buffer = torch.empty(4)  # a sharded trainer reuses its buffer: the file must not depend on it afterwards
        for i in range(3):
            yield f"layer.{i}", buffer.fill_(i)

    write_tensors(tmp_path / "1.safetensors", gathered())
    found = load_file(tmp_path / "1.safetensors")
    assert [found[f"layer.{i}"].tolist() for i in range(3)] == [[0.0] * 4, [1.0] * 4, [2.0] * 4]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "1.safetensors"
    write_tensors(path, tensors(0).items())

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a.weight", torch.zeros(3, 5)
        raise RuntimeError("gather failed")

    with pytest.raises(RuntimeError, match="gather failed"):
        write_tensors(path, broken())
    assert torch.equal(load_file(path)["a.weight"], tensors(0)["a.weight"])
