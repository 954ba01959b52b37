"""Which environment variables a user's own code sees."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Mapping

_SECRET = re.compile(
    r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|AUTH)S?(_|$)|_(PAT|PWD)(_|$)", re.IGNORECASE
)


def hidden(environ: Mapping[str, str], allowed: Collection[str]) -> list[str]:
    """Return the names of variables that look as if they held a secret and are not among the `allowed`.

    A name does in which a word ends in key, token, secret, password or the like: `WANDB_API_KEY`, `HF_TOKEN`,
    `PGPASSWORD`, `SSH_AUTH_SOCK`. `TOKENIZERS_PARALLELISM` does not.
    """
    return [name for name in environ if _SECRET.search(name) and name not in allowed]


def environment_of(secrets: Collection[str]) -> dict[str, str]:
    """Return this process's variables without these, and with the modules that it can import on the path."""
    kept = {name: value for name, value in os.environ.items() if name not in secrets}
    return kept | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


def with_hint(cause: str, secrets: Collection[str]) -> str:
    """Add to a failure that names one of these variables how the user's code gets to see it."""
    name = next((name for name in secrets if re.search(rf"\b{re.escape(name)}\b", cause)), None)
    return cause if name is None else f"{cause}; reward.env=[{name}] lets functions see that variable"
