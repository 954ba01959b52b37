"""The API key that rollout servers ask for: from the environment, or from a file that only its owner can read."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from pathlib import Path

from sapo_rl.errors import UserError

VARIABLE = "SAPO_API_KEY"


def key_file() -> Path:
    """Return the file in which the key is kept where the environment has none."""
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "sapo-train" / "api_key"


def read_key() -> str:
    """Return the key.

    Raises:
        UserError: there is none, or others can read its file.
    """
    if key := os.environ.get(VARIABLE):
        return key
    path = key_file()
    if not path.is_file():
        raise UserError(
            f"rollout.servers: no API key; set {VARIABLE} to that of sapo-serve, or copy its file to {path}"
        )
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise UserError(f"{path} can be read by others: chmod 600 {path}, or better delete it for a new key")
    return path.read_text(encoding="utf-8").strip()


def make_key() -> str:
    """Return the key; where there is none, make one and keep it in the file. Raises what `read_key` raises."""
    path = key_file()
    if not os.environ.get(VARIABLE) and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, partial = tempfile.mkstemp(dir=path.parent)  # for its owner only
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        with contextlib.suppress(FileExistsError):  # of two servers that start at once the first decides
            os.link(partial, path)
        os.unlink(partial)
    return read_key()
