"""Checkpoints from which a run continues exactly: written whole or not at all, and only read as they were written.

`trainer_<rank>.safetensors` hold `weight/<name>` (float32) and AdamW's `exp_avg/<name>`, `exp_avg_sq/<name>` and
`step/<name>`. The ranks divide the names among themselves and write at the same time, but each tensor is whole: another
number of ranks, or another way of sharding, can read it. No rank has more than one whole weight in memory at a time.
`random_<rank>.json` hold the states of the random generators, `loop_<rank>.safetensors` what the loop of a rank wants
back beside, if anything. What tells damage is in `sapo_rl.policy.manifest`.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes
from torch import Tensor

from sapo_rl.errors import SharedError, UserError
from sapo_rl.policy import manifest
from sapo_rl.policy.manifest import Entry, reading
from sapo_rl.policy.tensor_file import DATA_START, write_tensors
from sapo_rl.policy.trainer import PolicyTrainer
from sapo_rl.run_folder import BEST, checkpoints_in, link_to, step_of

PATTERN = "step_{:06d}"


def save(
    folder: Path,
    step: int,
    trainer: PolicyTrainer,
    state: dict[str, Any],
    keep_last: int,
    own: Mapping[str, NDArray[Any]] | None = None,
    best: int | None = None,
) -> None:
    """Write `folder/step_<step>`; called on every rank.

    Args:
        folder: the run's folder of checkpoints; made where it is not there, in the run folder, which must be.
        step: the last step that the checkpoint contains.
        trainer: the weights that it trains (float32), optimiser and number of updates are kept.
        state: what the loop wants back; JSON.
        keep_last: that many checkpoints stay, older ones go.
        own: what the loop wants back on this rank alone, if anything.
        best: the step of a checkpoint that stays however old it is; the link `best` leads to it.

    Raises:
        SharedError: it cannot be written, as on a full disk; nothing of it is left, and older ones are as they were.
    """
    accelerator, final = trainer.accelerator, folder / PATTERN.format(step)
    partial = final.with_name(f".{final.name}.partial")

    def begin() -> dict[str, Entry]:
        for left in folder.glob(".step_*.partial"):  # of a run that was killed
            shutil.rmtree(left)
        folder.mkdir(exist_ok=True)
        partial.mkdir()
        return {}

    def complete() -> dict[str, Entry]:
        record = partial / manifest.RECORD
        content = {"step": step, "updates": trainer.updates, "state": state}
        if trainer.temperatures.adapt:
            content["tau_scale"] = trainer.temperatures.scale
        record.write_text(json.dumps(content, indent=1, default=float), encoding="utf-8")
        entries[record.name] = manifest.entry_of(record)
        manifest.write_manifest(partial, step, entries)
        _sync(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        if best is not None:
            link_to(folder / PATTERN.format(best), BEST)
        for old in checkpoints_in(folder)[:-keep_last]:
            if step_of(old) != best:
                shutil.rmtree(old)
        if not (link := folder / BEST).exists():  # what it led to is none by the metric that counts now
            link.unlink(missing_ok=True)
        return {}

    _together(accelerator, partial, begin if accelerator.is_main_process else dict)
    entries = _together(accelerator, partial, lambda: _write_own(trainer, partial, own or {}))
    _together(accelerator, partial, complete if accelerator.is_main_process else dict)


def _together(accelerator: Accelerator, partial: Path, part: Callable[[], dict[str, Entry]]) -> dict[str, Entry]:
    """Have every rank do its part, and return what all have written; where one cannot, it ends on all."""
    own, problem = dict[str, Entry](), ""
    try:
        own = part()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        problem = f"{error}; {'free some room' if full else 'fix that'}, then resume"
    everyone: list[tuple[dict[str, Entry], str]] = gather_object([(own, problem)])
    for _, problem in everyone:
        if problem:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)  # it takes the room that is to be freed
            raise SharedError(f"checkpoint '{partial.parent / partial.stem[1:]}' cannot be written: {problem}")
    return {name: entry for entries, _ in everyone for name, entry in entries.items()}


def _write_own(trainer: PolicyTrainer, partial: Path, own: Mapping[str, NDArray[Any]]) -> dict[str, Entry]:
    """Write this rank's files, with the other ranks, which gather each weight together."""
    rank = trainer.accelerator.process_index
    generators, tensors = partial / f"random_{rank:05d}.json", partial / f"trainer_{rank:05d}.safetensors"
    loop, small = partial / f"loop_{rank:05d}.safetensors", [generators]
    digest, named = xxhash.xxh3_128(), _own_tensors(trainer)
    try:
        generators.write_text(json.dumps(_random_state()), encoding="utf-8")
        if own:
            loop.write_bytes(to_bytes(dict(own)))
            small.append(loop)
        write_tensors(tensors, named, digest)
    finally:
        deque(named, maxlen=0)  # to the end even where this rank has failed: the others would wait for it
    return {
        **{path.name: manifest.entry_of(path) for path in small},
        tensors.name: Entry(tensors.stat().st_size, DATA_START, digest.hexdigest()),
    }


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


def check(checkpoint: Path, shapes: Mapping[str, Sequence[int]], accelerator: Accelerator) -> None:
    """Refuse what is damaged, or could not be put into weights of these names and shapes; called on every rank.

    The ranks divide the files among themselves, so that each is read once before it is loaded.

    Raises:
        SharedError: naming the file, or the weight; the same on every rank.
    """
    problem = ""
    try:
        check_files(checkpoint, shapes, accelerator.process_index, accelerator.num_processes)
    except UserError as error:
        problem = str(error)
    for found in filter(None, gather_object([problem])):
        raise SharedError(found)


def check_files(checkpoint: Path, shapes: Mapping[str, Sequence[int]], part: int = 0, parts: int = 1) -> None:
    """Refuse what `check` refuses, alone, or as far as it is in one of several parts of the files.

    Raises:
        UserError: naming the file, or the weight.
    """
    entries = manifest.read_manifest(checkpoint)
    by_size = sorted(entries, key=lambda name: -entries[name].size)
    for name in by_size[part::parts]:
        manifest.verify(checkpoint, name, entries[name])
    _check_shapes(checkpoint, shapes)


def read_weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a checkpoint that `check_files` has let pass, float32, one by one by their names."""
    for name, kinds in _open_tensors(checkpoint).items():
        yield name, kinds["weight"].get_tensor(f"weight/{name}")


def _check_shapes(checkpoint: Path, shapes: Mapping[str, Sequence[int]]) -> None:
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


def load(checkpoint: Path, trainer: PolicyTrainer) -> tuple[int, dict[str, Any]]:
    """Put a checkpoint that `check` has let pass into the trainer and the random generators; called on every rank.

    Returns:
        The step that the checkpoint contains, and the loop's state.

    Raises:
        UserError: a file cannot be read.
    """
    parallel, found = trainer.parallel, _open_tensors(checkpoint)
    record = manifest.read_record(checkpoint)
    for name, parameter in trainer.policy.trainable_weights():
        parallel.restore(parameter, {kind: file.get_tensor(f"{kind}/{name}") for kind, file in found[name].items()})
    trainer.go_on(record["step"], record["updates"])
    trainer.temperatures.scale = record["tau_scale"]
    own = checkpoint / f"random_{trainer.accelerator.process_index:05d}.json"
    if own.is_file():  # a rank that did not exist then keeps its fresh seed
        with reading(own):
            _restore_random_state(json.loads(own.read_bytes()))
    return record["step"], record["state"]


def loop_files(checkpoint: Path) -> list[Path]:
    """Return the files of a checkpoint with what the loop wants back on each rank, in the ranks' order."""
    return [checkpoint / name for name in sorted(manifest.read_manifest(checkpoint)) if name.startswith("loop_")]


def _open_tensors(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Return by weight name, then by kind, the open file that a tensor is in; reads no tensor."""
    found: dict[str, dict[str, Any]] = {}
    for path in [checkpoint / name for name in manifest.read_manifest(checkpoint)]:
        if not path.name.startswith("trainer_"):
            continue
        with reading(path):
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(str(error)) from error
            for key in file.keys():  # noqa: SIM118 (no mapping)
                kind, name = key.split("/", 1)
                found.setdefault(name, {})[kind] = file
    return found


def _random_state() -> dict[str, Any]:
    """Return the states of this process's generators as JSON; those of torch in hexadecimal."""
    name, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": _hex(torch.get_rng_state()),
        "cuda": [_hex(state) for state in cuda],
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    for device, text in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_bytes(text), device)


def _hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _sync(folder: Path) -> None:
    """Have the files on the disk before the folder gets its final name."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
