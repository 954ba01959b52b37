"""Which environment variables reward functions see."""

from __future__ import annotations

import re
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
