"""The run folder: contents, refusals, and that no secret gets into it."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sapo_rl import run_folder
from sapo_rl.config import Config
from sapo_rl.errors import UserError
from sapo_rl.run_folder import secrets

SECRET = "s3cr3t-value"


def keys_of(schema: Any) -> list[str]:
    """Every key of a dataclass and of the dataclasses in it."""
    found = []
    for field in dataclasses.fields(schema):
        found.append(field.name)
        if dataclasses.is_dataclass(getattr(schema, field.name)):
            found += keys_of(getattr(schema, field.name))
    return found


def test_create_writes_config_overrides_user_file_and_environment(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("# my run\ntrainer: {steps: 3}\n")
    folder = tmp_path / "runs" / "a"
    run_folder.create(folder, "seed: 1\n", ["config=mine.yaml", "seed=1"], mine)
    assert (folder / run_folder.CONFIG).read_text() == "seed: 1\n"
    assert yaml.safe_load((folder / run_folder.OVERRIDES).read_text()) == ["config=mine.yaml", "seed=1"]
    assert (folder / run_folder.USER_FILE).read_text() == mine.read_text()
    record = json.loads((folder / run_folder.record.ENVIRONMENT).read_text())
    assert record["python"] == sys.version.split()[0]
    assert record["packages"]["wandb"].count(".") >= 1
    assert record["cpu_count"] >= 1
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [run_folder.CONFIG, run_folder.OVERRIDES, run_folder.USER_FILE, run_folder.record.ENVIRONMENT]
    )


@pytest.mark.parametrize("name", [run_folder.CONFIG, run_folder.METRICS])
def test_create_refuses_a_folder_that_holds_a_run(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("kept\n")
    with pytest.raises(UserError, match=f"resume={tmp_path}"):
        run_folder.create(tmp_path, "seed: 1\n", [], None)
    assert (tmp_path / name).read_text() == "kept\n"


def test_a_run_that_goes_on_is_refused_by_name_until_its_holder_is_dead(tmp_path: Path) -> None:
    hold = (
        "import sys, time; from pathlib import Path; from sapo_rl.run_folder import locked;"
        " lock = locked(Path(sys.argv[1])); lock.__enter__(); print(flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    refusal = rf"'{tmp_path}' is a run that is still going on \(process {holder.pid} on {os.uname().nodename}\)"
    for _ in range(2):  # being refused does not change what is said
        with pytest.raises(UserError, match=refusal), run_folder.locked(tmp_path):
            pass
    holder.kill()
    holder.wait()
    for _ in range(2):
        with run_folder.locked(tmp_path):
            pass


def test_a_command_to_go_on_is_quoted_for_the_shell(tmp_path: Path) -> None:
    folder = tmp_path / "it's a run"
    assert run_folder.resume_command(folder) is None
    (folder / "checkpoints/step_000001").mkdir(parents=True)
    command = run_folder.resume_command(folder)
    assert command is not None and shlex.split(command)[-1] == f"resume={folder}"
    (folder / run_folder.CONFIG).touch()
    with pytest.raises(UserError) as caught:
        run_folder.create(folder, "", [], None)
    assert shlex.quote(f"resume={folder}") in str(caught.value)


def test_unused_never_hands_out_a_folder_twice(tmp_path: Path) -> None:
    folders = [run_folder.unused(tmp_path / "runs" / "now") for _ in range(3)]
    assert [folder.name for folder in folders] == ["now", "now-2", "now-3"]
    run_folder.create(folders[1], "seed: 1\n", [], None)


def test_latest_points_to_the_newest_run_and_spares_a_real_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run_folder.create(tmp_path / "x" / name, "seed: 1\n", [], None)
    assert (tmp_path / "x" / run_folder.LATEST).resolve() == tmp_path / "x" / "b"
    real = tmp_path / "y" / run_folder.LATEST
    real.mkdir(parents=True)
    run_folder.create(tmp_path / "y" / "a", "seed: 1\n", [], None)
    assert not real.is_symlink()


def test_device_is_entered_into_the_start_and_then_into_the_resume(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    run_folder.create(folder, "seed: 1\n", ["config=a"], None)
    run_folder.record.add_to_start(folder, {"device": {"name": "cpu", "count": 1}})
    run_folder.refreeze(folder, "seed: 2\n", ["resume=a", "seed=2"])
    run_folder.record.add_to_start(folder, {"device": {"name": "H100", "count": 8}})
    record = json.loads((folder / run_folder.record.ENVIRONMENT).read_text())
    assert record["device"] == {"name": "cpu", "count": 1}
    assert [resume["device"]["name"] for resume in record["resumes"]] == ["H100"]
    assert (folder / run_folder.CONFIG).read_text() == "seed: 2\n"


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_refused_resume_leaves_the_config_as_it_was(tmp_path: Path, goes_on: bool) -> None:
    folder = tmp_path / "a"
    run_folder.create(folder, "seed: 1\n", ["config=a"], None)
    (folder / run_folder.METRICS).write_text("{}\n")
    undo = run_folder.refreeze(folder, "seed: 2\n", ["resume=a", "seed=2"])
    if goes_on:
        (folder / run_folder.METRICS).write_text("{}\n{}\n")
    undo()
    assert (folder / run_folder.CONFIG).read_text() == ("seed: 2\n" if goes_on else "seed: 1\n")
    assert ("seed=2" in (folder / run_folder.OVERRIDES).read_text()) is goes_on


def test_a_run_with_nothing_left_is_refused(tmp_path: Path) -> None:
    run_folder.refuse_finished(tmp_path, 8)
    (tmp_path / "checkpoints/step_000008").mkdir(parents=True)
    run_folder.refuse_finished(tmp_path, 9)
    run_folder.refuse_finished(tmp_path, 8)  # it was stopped before the final model
    with pytest.raises(UserError, match=r"8 steps of trainer\.steps=5; for more, set trainer\.steps"):
        run_folder.refuse_finished(tmp_path, 5)
    (tmp_path / "final").mkdir()
    with pytest.raises(UserError, match="8 steps of trainer"):
        run_folder.refuse_finished(tmp_path, 8)


def test_refreeze_refuses_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        run_folder.refreeze(tmp_path, "seed: 2\n", [])


def test_a_garbled_record_of_environments_is_named(tmp_path: Path) -> None:
    run_folder.create(tmp_path / "a", "seed: 1\n", [], None)
    (tmp_path / "a" / run_folder.record.ENVIRONMENT).write_bytes(b"{\xff")
    with pytest.raises(UserError, match=r"environment\.json' cannot be read"):
        run_folder.refreeze(tmp_path / "a", "seed: 2\n", [])
    assert (tmp_path / "a" / run_folder.CONFIG).read_text() == "seed: 1\n"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_of_a_model_are_as_open_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    (tmp_path / "adapter").mkdir()
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        (tmp_path / name).touch(mode=0o600)
    before = os.umask(umask)
    try:
        run_folder.open_up(tmp_path)
    finally:
        os.umask(before)
    modes = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.*")}
    assert modes == {"model.safetensors": mode, "adapter/adapter_model.safetensors": mode}


def test_last_eval_reward(tmp_path: Path) -> None:
    assert run_folder.last_eval_reward(tmp_path) is None
    lines = ['{"step": 0, "eval/reward": 0.25}', '{"step": 1}', '{"step": 1, "eval/reward": 0.5}', '{"st']
    (tmp_path / run_folder.METRICS).write_text("\n".join(lines))
    assert run_folder.last_eval_reward(tmp_path) == 0.5


@pytest.mark.parametrize(
    "key",
    [
        *("api_key", "judge.api_key", "hfToken", "password", "client-secret", "TOKEN", "apikey", "api_keys"),
        *("wandb_token", "Authorization", "pwd", "passphrase"),
    ],
)
def test_secret_keys(key: str) -> None:
    assert secrets.is_secret(key)


def test_no_key_of_the_schema_counts_as_secret() -> None:
    assert [key for key in keys_of(Config()) if secrets.is_secret(key)] == []


@pytest.mark.parametrize(
    "text",
    [
        f"judge:\n  api_key: {SECRET}\n  weight: 1\n",
        f"judge: {{api_key: '{SECRET}', weight: 1}}\n",
        f'judge:\n  "api_key": "{SECRET}"\n  weight: 1\n',
        f"judge:\n  api_key: |\n    {SECRET}\n    {SECRET}\n  weight: 1\n",
        f"judge:\n  weight: 1\n  api_key: >\n    {SECRET}",
        f"judge:\n  api_key: &k {SECRET}\n  other_key: *k\n  weight: 1\n",
        f"judge:\n  api_key:\n  - {SECRET}\n  - x{SECRET}\n  weight: 1\n",
    ],
)
def test_yaml_secrets_are_replaced_and_the_rest_is_kept(text: str) -> None:
    redacted = secrets.redact_yaml(text)
    assert SECRET not in redacted
    assert yaml.safe_load(redacted)["judge"]["weight"] == 1
    assert "redacted" in str(yaml.safe_load(redacted)["judge"]["api_key"])


@pytest.mark.parametrize(
    "text",
    [
        "# note\nmax_tokens: 5   # kept\n",
        "api_key: ${oc.env:JUDGE_KEY}\n",
        "Authorization: Bearer ${oc.env:KEY}\n",
        "token: null\n",
        "a: 1e-06\n",
        "",
    ],
)
def test_yaml_without_secrets_is_untouched(text: str) -> None:
    assert secrets.redact_yaml(text) == text


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (f"+judge.api_key={SECRET}", "+judge.api_key=<redacted>"),
        (f"judge.args={{api_key: {SECRET}, n: 3}}", "judge.args={api_key: <redacted>, n: 3}"),
        (f"judge.args={{api_key:'{SECRET},x',n:3}}", "judge.args={api_key:<redacted>,n:3}"),
        ("judge.api_key=${oc.env:KEY}", "judge.api_key=${oc.env:KEY}"),
        ("judge.args={api_key: ${oc.env:KEY}, n: 3}", "judge.args={api_key: ${oc.env:KEY}, n: 3}"),
        ("trainer.steps=3", "trainer.steps=3"),
        ("-m", "-m"),
    ],
)
def test_override_secrets(argument: str, expected: str) -> None:
    assert secrets.redact_override(argument) == expected


def test_nothing_in_the_folder_holds_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    override = f"+reward.functions.judge.args.api_key={SECRET}"
    monkeypatch.setattr(sys, "argv", ["sapo-train", override])
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"api_key: {SECRET}\n")
    run_folder.create(tmp_path / "run", f"judge: {{password: {SECRET}}}\n", [override], mine)
    files = [path for path in (tmp_path / "run").iterdir() if path.is_file()]
    assert len(files) == 4
    assert [path.name for path in files if SECRET in path.read_text()] == []


def test_git_revision_and_dirtiness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "first")
    monkeypatch.chdir(tmp_path)
    assert run_folder.record.environment()["git"]["cwd"] == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a").write_text("2")
    assert run_folder.record.environment()["git"]["cwd"]["dirty"] is True


def test_import_is_light() -> None:
    code = "import sys, sapo_rl.run_folder; print(sorted({'torch', 'numpy', 'wandb', 'pyarrow'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
