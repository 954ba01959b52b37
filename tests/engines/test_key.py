"""Where the API key is kept."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from sapo_rl.engines.key import VARIABLE, key_file, make_key, read_key
from sapo_rl.errors import UserError


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
    monkeypatch.setenv(VARIABLE, "mine_and_nobody_elses")
    assert make_key() == read_key() == "mine_and_nobody_elses"
    assert not key_file().exists()


@pytest.mark.parametrize("key", ["", "\n", "fifteen_letters", "two words, so it is", "un_mot_fran\u00e7ais_aussi"])
@pytest.mark.parametrize("place", ["file", "variable"])
def test_a_key_that_is_empty_short_or_no_word_is_refused_and_kept(
    key: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_key()
    if place == "file":
        key_file().write_text(key)
    else:
        monkeypatch.setenv(VARIABLE, key)
    for use in (read_key, make_key):
        with pytest.raises(UserError) as refused:
            use()
        told = str(refused.value)
        assert (str(key_file()) if place == "file" else VARIABLE) in told
        assert "at least 16" in told or "no single word of ASCII" in told
        assert len(told.splitlines()) == 1
    assert place == "variable" or key_file().read_text() == key


@pytest.mark.parametrize("obstacle", ["file for a folder", "folder for the file", "dangling link", "no home"])
def test_where_no_key_can_be_kept_the_way_out_is_named(
    obstacle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if obstacle == "file for a folder":
        key_file().parent.write_text("")
    elif obstacle == "folder for the file":
        key_file().mkdir(parents=True)
    elif obstacle == "dangling link":
        key_file().parent.mkdir()
        key_file().symlink_to(tmp_path / "nowhere")
    else:
        monkeypatch.delenv("XDG_CONFIG_HOME")
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(UserError, match=rf"set {VARIABLE}") as refused:
        make_key()
    assert len(str(refused.value).splitlines()) == 1
