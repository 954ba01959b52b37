"""A model folder looked at without torch: can its config be used, and are the files of its weights whole?"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sapo_rl.errors import UserError

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where transformers finds weights; the first that is there counts."""
TEXTS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
"""Whole numbers from 1 in every config that has them."""
MAYBE_SIZES = ("intermediate_size", "num_key_value_heads", "head_dim")
"""The same, or null, or one for each layer."""
POINTER = b"version https://git-lfs"


def looks_local(path: str) -> bool:
    """Whether a path is none that the hub could have, such as `owner/name`."""
    return path.startswith((".", "/", "~")) or path.count("/") != 1


def local_folder(path: str) -> Path | None:
    """Return the folder that `model.path` names; None where it is a name on the hub.

    Raises:
        UserError: it looks like a folder and holds no model.
    """
    try:
        folder = Path(path).expanduser()
        is_local = looks_local(path) or folder.is_dir()
        if is_local and not (folder / CONFIG).is_file():
            raise UserError(f"'{path}' is no folder with a Hugging Face model")
    except (OSError, RuntimeError, ValueError) as error:  # names that are too long, folders that may not be entered
        raise UserError(f"'{path[:200]}' cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return folder if is_local else None


def look(folder: Path) -> dict[str, Any]:
    """Return the text model's part of the config, once all files are known to be what they should be.

    Raises:
        UserError: naming a file that is missing, cut short, a Git LFS pointer, no JSON, or at odds with the config.
    """
    config = read_json(folder / CONFIG)
    _check_sizes(folder / CONFIG, config)
    shape = text_part(config)
    _check_sizes(folder / CONFIG, shape)
    if (folder / GENERATION).is_file():
        _check_generation(folder / GENERATION)
    for name in TEXTS:
        if (folder / name).is_file():
            _read(folder / name, 64)
    _check_layers(folder, shapes(folder), shape)
    return shape


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the language model in that of a model which has other parts too."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else config


def count_parameters(folder: Path) -> int | None:
    """Count the elements of a folder's safetensors from their headers; None where it has none."""
    found = shapes(folder)
    return sum(math.prod(shape) for shape in found.values()) if found else None


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in the folder's safetensors by name, from their headers; empty for other formats.

    Raises:
        UserError: there are no weights, or a file of them is missing, cut short or something else.
    """
    found: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        found |= _header(file) if file.suffix == ".safetensors" else {}
    return found


def weight_files(folder: Path) -> Iterator[Path]:
    """Yield the files of the weights, each known to be there and no Git LFS pointer. Raises what `shapes` does."""
    first = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        raise UserError(f"{folder} holds no weights; valid: {', '.join(WEIGHTS)}")
    names = {first.name}
    if first.suffix == ".json":
        mapped = read_json(first).get("weight_map")
        if not isinstance(mapped, dict) or not all(isinstance(name, str) for name in mapped.values()) or not mapped:
            raise UserError(f"{first} has no weight_map of names to files")
        names = set(mapped.values())
    for name in sorted(names):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing, which {first.name} names")
        if not _read(folder / name, 64):
            raise UserError(f"{folder / name} is empty")
        yield folder / name


def read_json(file: Path) -> dict[str, Any]:
    """Return what a JSON file with a mapping holds. Raises UserError where it is something else."""
    try:
        found = json.loads(_read(file).decode())
    except (ValueError, RecursionError) as error:  # of the text's encoding, too
        said = "it is empty" if not _read(file).strip() else str(error)[:150]
        raise UserError(f"{file} is no JSON in UTF-8: {said}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} must hold a mapping, not {type(found).__name__}")
    return found


def _read(file: Path, size: int = -1) -> bytes:
    """Return the first `size` bytes, or all."""
    try:
        with file.open("rb") as stream:
            found = stream.read(size)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    if found.startswith(POINTER):
        raise UserError(f"{file} is a Git LFS pointer, not the file itself; run git lfs pull in its folder")
    return found


def _check_sizes(file: Path, config: dict[str, Any]) -> None:
    for name in (*SIZES, *MAYBE_SIZES):
        value = config.get(name)
        if value is None or (name in MAYBE_SIZES and isinstance(value, list)):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise UserError(f"{file}: {name} is {str(value)[:80]!r}; must be a whole number from 1")


def _check_generation(file: Path) -> None:
    ends = read_json(file).get("eos_token_id")
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and (not isinstance(end, int) or isinstance(end, bool) or end < 0):
            raise UserError(f"{file}: eos_token_id is {str(ends)[:80]!r}; must be a token's number, or a list of them")


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise UserError(f"{file} ({size} bytes) is no whole safetensors file: {error}; bring it here again") from error


def _check_layers(folder: Path, tensors: dict[str, tuple[int, ...]], shape: dict[str, Any]) -> None:
    """Raise where weights are numbered by layer, and no model among them has all that the config asks for."""
    wanted = shape.get("num_hidden_layers")
    layers: dict[str, set[int]] = {}
    for name in tensors:
        if found := re.match(r"(.*?\b(?:layers|h|blocks))\.(\d+)\.", name):
            layers.setdefault(found[1], set()).add(int(found[2]))
    if wanted is None or not layers:
        return
    missing = min((sorted(set(range(wanted)) - numbers) for numbers in layers.values()), key=len)
    if missing:
        raise UserError(
            f"{folder}: its weights lack {len(missing)} of the {wanted} layers that {CONFIG} asks for "
            f"(num_hidden_layers), the first is {missing[0]}"
        )
