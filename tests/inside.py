"""The command line inside the test's own process: a second less than a process of its own, for what starts no run.

Hydra composes here once, not twice: a recipe's `hydra.mode`, which it looks for first, has no effect.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins

from sapo_rl.run import cli


def sapo_train(*arguments: str) -> tuple[int, str, str]:
    """Run the command line in the current folder; return the exit code and what was printed on stdout and stderr.

    What it registers with Hydra, and the paths and arguments that it sets, are as before afterwards.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    try:
        with kept_apart(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main(list(arguments))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    return code, out.getvalue(), err.getvalue()


def in_folder(*arguments: str, cwd: Path, **environment: str) -> SimpleNamespace:
    """Run the command line in `cwd`, as `command.sapo_train` does; `environment` is beside the test's own."""
    with contextlib.chdir(cwd), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        code, out, err = sapo_train(*arguments)
    return SimpleNamespace(returncode=code, stdout=out, stderr=err)


@contextlib.contextmanager
def kept_apart() -> Iterator[None]:
    """Leave no trace of a command in the test's process."""
    Plugins.instance()
    store, before = ConfigStore.instance(), (sys.argv, list(sys.path), dict(os.environ))
    kept = copy.deepcopy(store.repo)
    GlobalHydra.instance().clear()
    known = set(sys.modules)
    find_mode, Hydra.get_mode = Hydra.get_mode, lambda *_, **__: None
    try:
        yield
    finally:
        Hydra.get_mode = find_mode
        for name in set(sys.modules) - known:  # of the test's own files: another test's may have the same name
            if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == Path.cwd():
                del sys.modules[name]
        store.repo = kept
        sys.argv, sys.path[:] = before[:2]
        os.environ.clear()
        os.environ.update(before[2])
