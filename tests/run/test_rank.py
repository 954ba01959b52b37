"""How a rank words what the machine under it does: in a sentence, where it is no mistake of the program."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from sapo_rl.errors import UserError
from sapo_rl.run.rank import worded


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_told_in_a_line_with_the_run_folder(error: Exception) -> None:
    told = worded(error, Path("runs/a"))
    assert isinstance(told, UserError) and str(told).startswith(str(error)) and "\n" not in str(told)
    assert str(told).endswith("(the run folder is runs/a); free some of it, then resume")
    assert worded(told, None) is told


def test_a_deleted_folder_is_told_and_other_errors_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing, bug = FileNotFoundError(errno.ENOENT, "No such file", "runs/a/b"), ValueError("a mistake")
    told = worded(missing, tmp_path)  # no config.yaml in it
    assert isinstance(told, UserError) and f"run folder '{tmp_path}' was deleted or moved" in str(told)
    (tmp_path / "config.yaml").touch()
    assert worded(missing, tmp_path) is missing and worded(bug, tmp_path) is bug
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    os.rmdir(tmp_path / "here")
    told = worded(missing, tmp_path)
    assert isinstance(told, UserError) and "was started in does not exist any more" in str(told)
