"""Weights & Biases, offline, its files read back by its own tool."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tracked import NAME, SECRET, SWEEP, run

from sapo_rl.telemetry.trackers import spread
from sapo_rl.telemetry.trackers.wandb import choose_mode


def records(file: Path) -> list[dict[str, Any]]:
    """Everything in a .wandb file."""
    tool = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(file)]
    answer = subprocess.run(tool, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in answer.stdout.splitlines()]


def history(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The logged rows."""
    return [record["history"]["item"] for record in found if record["type"] == "history"]


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str, list[dict[str, Any]]]:
    """An offline run: its folder, what it found and printed, and the records of its .wandb file."""
    folder = tmp_path_factory.mktemp("offline") / "run"
    named = {"entity": "us", "group": None, "job_type": "train", "tags": ["a", "b"]}
    found, printed = run(folder, changes={"wandb": "offline", **named})
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    return folder, found, printed, records(file)


def test_an_offline_run_holds_the_numbers_of_metrics_jsonl(offline) -> None:
    folder, found, _, written = offline
    (start,) = [record["run"] for record in written if record["type"] == "run"]
    assert start["run_id"] == found["wandb"]
    assert (start["project"], start["display_name"], start["entity"]) == ("sapo-train", NAME, "us")
    assert (start["run_group"], start["job_type"], start["tags"]) == (SWEEP, "train", ["a", "b"])
    glob = next(r["metric"] for r in written if r["type"] == "metric" and "glob_name" in r["metric"])
    assert (glob["glob_name"], glob["step_metric"]) == ("*", "step")
    rows = history(written)
    kept = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len(kept) == 4
    for row, record in zip(rows, kept, strict=True):
        logged = {name: value for name, value in row.items() if not name.startswith(("_", "completions."))}
        logged.pop("completions", None)
        assert logged == {name: value for name, value in record.items() if value is not None}


def test_tables_hold_the_lowest_and_the_highest_reward_and_lie_in_the_run_folder(offline) -> None:
    folder = offline[0]
    tables = sorted(folder.glob("wandb/offline-run-*/files/media/table/*.json"))
    assert len(tables) == 2
    for table in tables:
        content = json.loads(table.read_text())
        columns = content["columns"]
        rewards = [row[columns.index("rewards/judge")] for row in content["data"]]
        assert rewards == [0.0, 1.0]
        assert {"step", "prompt", "completion", "advantage"} <= set(columns)
    assert list((folder.parent / "home").rglob("*staging*")) == []


def test_no_secret_and_no_facts_about_the_machine_are_written(offline) -> None:
    folder, _, printed, written = offline
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in printed
    (start,) = [record["run"] for record in written if record["type"] == "run"]
    shown = start["config"]["update"]
    assert shown["reward"]["functions"]["judge"]["args"] == {"api_key": "${oc.env:MINE}", "scale": 3}
    assert shown["description"] == "${oc.env:MINE}"
    assert not {"stats", "environment", "output", "output_raw"} & {record["type"] for record in written}


def test_a_resumed_run_keeps_its_id_and_its_axis(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    offline = {"wandb": "offline", "name": "mine", "group": "first"}
    found, _ = run(folder, changes=offline)
    again, _ = run(folder, first=3, changes=offline)
    assert again["wandb"] == found["wandb"]
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    assert [file.name for file in files] == [f"run-{found['wandb']}.wandb"] * 2
    assert [row["step"] for file in files for row in history(records(file))] == [1, 1, 2, 2, 3, 3, 4, 4]
    for file in files:
        (start,) = [record["run"] for record in records(file) if record["type"] == "run"]
        assert (start["display_name"], start["run_group"]) == ("mine", "first")


def test_online_without_a_usable_key_falls_back_with_one_line(tmp_path: Path) -> None:
    _, printed = run(
        tmp_path / "run", changes={"wandb": "online"}, WANDB_API_KEY="not-a-key", WANDB_BASE_URL="http://127.0.0.1:9"
    )
    (warning,) = [line for line in printed.splitlines() if "W&B" in line]
    assert "offline" in warning
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    assert len(history(records(file))) == 4


@pytest.mark.parametrize(
    ("setting", "environ", "mode"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_IDENTITY_TOKEN_FILE": "f"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "off"),
        ("auto", {"WANDB_MODE": "online"}, "online"),
        ("online", {"WANDB_MODE": "offline"}, "online"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        ("off", {"WANDB_API_KEY": "k"}, "off"),
    ],
)
def test_modes(tmp_path: Path, setting: str, environ: dict[str, str], mode: str) -> None:
    assert choose_mode(setting, environ, tmp_path) == mode


def test_auto_finds_a_key_for_this_server_in_netrc(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password k\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert choose_mode("auto", {}, tmp_path) == "online"
    assert choose_mode("auto", {"WANDB_BASE_URL": "https://wandb.example.org"}, tmp_path) == "offline"
    assert choose_mode("auto", {"NETRC": str(tmp_path / "none")}, tmp_path) == "offline"


def test_spread_reaches_from_the_lowest_to_the_highest() -> None:
    rows = [{"reward": reward} for reward in (3.0, None, 1.0, 4.0, 2.0)]
    assert [row["reward"] for row in spread(rows, 3)] == [None, 2.0, 4.0]
    assert [row["reward"] for row in spread(rows, 1)] == [4.0]
    assert len(spread(rows, 9)) == 5
