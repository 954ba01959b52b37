"""The API key that rollout servers ask for: from the environment, or from a file that only its owner can read."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import tempfile
from pathlib import Path

from sapo_rl.errors import UserError

VARIABLE = "SAPO_API_KEY"
SHORTEST = 16
"""Characters of a key, at least."""


def key_file() -> Path:
    """Return the file in which the key is kept where the environment has none. Raises UserError without a home."""
    try:
        config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    except RuntimeError as error:
        raise UserError(f"there is no home folder to keep the API key in; set {VARIABLE}") from error
    return config / "sapo-train" / "api_key"


def read_key() -> str:
    """Return the key.

    Raises:
        UserError: there is none, it is short or no word of ASCII, or its file cannot be read, or can be by others.
    """
    if VARIABLE in os.environ:
        return _checked(os.environ[VARIABLE], f"the environment variable {VARIABLE}", "unset it")
    path = key_file()
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise UserError(f"{path} is no file; remove it for a new key, or set {VARIABLE}")
        if stat.S_IMODE(mode) & 0o077:
            raise UserError(f"{path} can be read by others: chmod 600 {path}, or better delete it for a new key")
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise UserError(
            f"rollout.servers: no API key; set {VARIABLE} to that of sapo-serve, or copy its file to {path}"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); set {VARIABLE}") from error
    return _checked(text.strip(), str(path), "delete it and start sapo-serve for a new key")


def make_key() -> str:
    """Return the key; where there is none, make one and keep it in the file. Raises what `read_key` raises."""
    if VARIABLE not in os.environ:
        path = key_file()
        try:
            _make_file(path)
        except OSError as error:
            raise UserError(f"{path}: no API key can be kept there ({error.strerror}); set {VARIABLE}") from error
    return read_key()


def _make_file(path: Path) -> None:
    """Write a new key into `path`, whole or not at all, unless something has that name already."""
    if os.path.lexists(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, partial = tempfile.mkstemp(dir=path.parent)  # for its owner only
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
            file.flush()
            os.fsync(descriptor)  # else a power cut could leave the name on an empty file
        with contextlib.suppress(FileExistsError):  # of two servers that start at once the first decides
            os.link(partial, path)
    finally:
        os.unlink(partial)


def _checked(key: str, where: str, remedy: str) -> str:
    """Return the key, unless anybody could guess it, or no HTTP header could carry it."""
    if len(key) < SHORTEST:
        raise UserError(f"{where} has an API key of {len(key)} characters, must be at least {SHORTEST}; {remedy}")
    if not re.fullmatch(r"[!-~]+", key):
        raise UserError(f"{where} has an API key that is no single word of ASCII characters; {remedy}")
    return key
