"""Where the API key is kept."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from sapo_rl.errors import UserError
from sapo_rl.rollout.key import VARIABLE, key_file, make_key, read_key


@pytest.fixture(autouse=True)
def config_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)


def test_a_key_is_made_once_for_its_owner_only() -> None:
    with pytest.raises(UserError, match=rf"no API key; set {VARIABLE}"):
        read_key()
    key = make_key()
    assert len(key) >= 40
    assert make_key() == read_key() == key
    assert stat.S_IMODE(key_file().stat().st_mode) == 0o600
    assert [path.name for path in key_file().parent.iterdir()] == ["api_key"]
    key_file().unlink()
    assert make_key() != key


def test_a_key_that_others_can_read_is_refused() -> None:
    make_key()
    key_file().chmod(0o640)
    with pytest.raises(UserError, match=r"can be read by others"):
        read_key()


def test_the_environment_goes_first_and_leaves_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "mine")
    assert make_key() == read_key() == "mine"
    assert not key_file().exists()
