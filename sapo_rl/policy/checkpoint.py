"""Checkpoints from which a run continues exactly: written whole or not at all.

`trainer_<rank>.safetensors` hold `weight/<name>` (float32) and AdamW's `exp_avg/<name>`, `exp_avg_sq/<name>` and
`step/<name>`. The ranks divide the names among themselves and write at the same time, but each tensor is whole: another
number of ranks, or another way of sharding, can read it. No rank has more than one whole weight in memory at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sapo_rl.errors import UserError
from sapo_rl.policy.trainer import PolicyTrainer
from sapo_rl.run_folder import checkpoints_in
from sapo_rl.tensor_file import write_tensors

PATTERN = "step_{:06d}"


def save(folder: Path, step: int, trainer: PolicyTrainer, state: dict[str, Any], keep_last: int) -> None:
    """Write `folder/step_<step>`; called on every rank.

    Args:
        folder: the run's folder of checkpoints.
        step: the last step that the checkpoint contains.
        trainer: the weights that it trains (float32), optimiser and schedule are kept.
        state: what the loop wants back; JSON.
        keep_last: that many checkpoints stay, older ones go.
    """
    accelerator = trainer.accelerator
    final, partial = folder / PATTERN.format(step), folder / f".{PATTERN.format(step)}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    torch.save(_random_state(), partial / f"random_{accelerator.process_index}.pt")
    write_tensors(partial / f"trainer_{accelerator.process_index:05d}.safetensors", _own_tensors(trainer))
    if accelerator.is_main_process:
        record = {"step": step, "updates": trainer.updates, "schedule": trainer.schedule.state_dict(), "state": state}
        (partial / "state.json").write_text(json.dumps(record, indent=1, default=float))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _sync(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in checkpoints_in(folder)[:-keep_last]:
            shutil.rmtree(old)


def _own_tensors(trainer: PolicyTrainer) -> Iterator[tuple[str, Tensor]]:
    """Go through the whole state with the other ranks, which gathers it, and yield what this rank is to write."""
    ranks, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    weights = sorted(trainer.policy.trainable_weights(), key=lambda item: -trainer.parallel.shape_of(item[1]).numel())
    for start in range(0, len(weights), ranks):  # a round of alike weights, one for each rank: they write side by side
        own: dict[str, Tensor] = {}
        for owner, (name, parameter) in enumerate(weights[start : start + ranks]):
            state = trainer.parallel.state_of(parameter)
            if owner == rank:
                own = {f"{kind}/{name}": value for kind, value in state.items()}
        yield from own.items()


def latest(folder: Path) -> Path:
    """Return the newest complete checkpoint.

    Raises:
        UserError: there is none.
    """
    found = checkpoints_in(folder)
    if not found:
        raise UserError(f"resume: no checkpoint in '{folder}': the run ended before its first; start it anew")
    return found[-1]


def check(checkpoint: Path, shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Refuse what `load` could not put into weights of these names and shapes; reads no tensor.

    Returns:
        What is recorded beside the tensors, and by weight name, then by kind, the open file that a tensor is in.

    Raises:
        UserError: the checkpoint is damaged, or belongs to another model.
    """
    record = _read_record(checkpoint)
    for path in checkpoint.glob("random_*.pt"):
        with _reading(path):
            torch.load(path, weights_only=True)
    found = _open_tensors(checkpoint)
    for name in [*shapes, *found]:
        file = found.get(name, {}).get("weight")
        saved = file.get_slice(f"weight/{name}").get_shape() if file else "not there"
        wanted = list(shapes[name]) if name in shapes else "not trained"
        if saved != wanted:
            raise UserError(
                f"resume: checkpoint '{checkpoint}' is of another model or other adapters: weight '{name}' is {saved} "
                f"in it, now {wanted}; leave model.path and model.lora as they were"
            )
    return record, found


def load(checkpoint: Path, trainer: PolicyTrainer) -> tuple[int, dict[str, Any]]:
    """Put a checkpoint into the trainer and the random generators; called on every rank.

    Returns:
        The step that the checkpoint contains, and the loop's state.

    Raises:
        UserError: as `check` does.
    """
    parallel, weights = trainer.parallel, dict(trainer.policy.trainable_weights())
    record, found = check(checkpoint, {name: parallel.shape_of(parameter) for name, parameter in weights.items()})
    for name, parameter in weights.items():
        parallel.restore(parameter, {kind: file.get_tensor(f"{kind}/{name}") for kind, file in found[name].items()})
    trainer.schedule.load_state_dict(record["schedule"])
    for group, rate in zip(parallel.optimizer.param_groups, trainer.schedule.get_last_lr(), strict=True):
        group["lr"] = rate
    trainer.updates = record["updates"]
    own = checkpoint / f"random_{trainer.accelerator.process_index}.pt"
    if own.is_file():  # a rank that did not exist then keeps its fresh seed
        _restore_random_state(torch.load(own, weights_only=True))
    return record["step"], record["state"]


def _read_record(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "state.json"
    with _reading(path):
        record = json.loads(path.read_bytes())
        return {name: record[name] for name in ("step", "updates", "schedule", "state")}


def _open_tensors(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Return by weight name, then by kind, the file that a tensor is in."""
    found: dict[str, dict[str, Any]] = {}
    names = [re.fullmatch(r"(?:random|trainer)_(\d+)\.(?:pt|safetensors)", path.name) for path in checkpoint.iterdir()]
    ranks = [int(name[1]) for name in names if name]
    for rank in range(max(ranks, default=0) + 1):
        path = checkpoint / f"trainer_{rank:05d}.safetensors"
        with _reading(path):
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118 (no mapping)
                kind, name = key.split("/", 1)
                found.setdefault(name, {})[kind] = file
    return found


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Tell which file is damaged, and what is left to resume from."""
    try:
        yield
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        UnpicklingError,
        EOFError,
        SafetensorError,
    ) as error:
        step = path.parent
        older = [other.name for other in checkpoints_in(step.parent) if other != step][-1:]
        way = f"move '{step}' away to resume from {older[0]}" if older else "it is the only one: start the run anew"
        raise UserError(f"resume: '{path}' cannot be read: {error!r}; {way}") from error


def _random_state() -> dict[str, Any]:
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    name, keys, position, has_gauss, cached = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    for device, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state, device)


def _sync(folder: Path) -> None:
    """Have the files on the disk before the folder gets its final name."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
