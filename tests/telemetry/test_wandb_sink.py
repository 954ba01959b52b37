"""Weights & Biases, offline, its files read back by its own tool."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sapo_rl.telemetry.sinks.wandb import choose_mode, spread

SECRET = "s3cr3t-value"
SCRIPT = """
import dataclasses, json, sys, yaml
from pathlib import Path
from sapo_rl.config import Config, RewardFunctionConfig
from sapo_rl.telemetry import Telemetry, rows, sample_metrics
from sapo_rl.types import Group, Prompt, Row, Sample, Stop

folder, mode, first, wandb_id = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] or None
config = Config()
config.model.path, config.trainer.steps = "/models/tiny", 4
config.logging.wandb, config.logging.console, config.logging.completions = mode, "plain", 2
config.reward.functions = {"judge": RewardFunctionConfig(function="a.b", args={"api_key": "SECRET", "scale": 3})}
config.description = "SECRET"  # as every rank reads it; what the run folder holds is a reference
kept = dataclasses.asdict(config)
kept["description"] = kept["reward"]["functions"]["judge"]["args"]["api_key"] = "${oc.env:MINE}"
(folder / "config.yaml").write_text(yaml.safe_dump(kept))
row, values = Row([1], [1]), (0.5, 1.0, 0.0)
samples = [Sample([row], Stop.STOP, (0, 0), text=f"reply {r}", rewards={"judge": r}, reward=r) for r in values]
group = Group(Prompt(0, [1], "prompt", {}), samples)
with Telemetry(config, folder, resume_step=first - 1 if first > 1 else None, wandb_id=wandb_id) as telemetry:
    for step in range(first, first + 2):
        groups = [rows(step, group)]
        telemetry.log_step(step, sample_metrics(groups) | {"policy/loss": float("nan"), "time/step": 1.0}, groups)
        telemetry.log_eval(step, {"eval/reward": step / 8}, [])
    print(json.dumps({"id": telemetry.wandb_id, "imported": "wandb" in sys.modules}))
""".replace("SECRET", SECRET)


def run(folder: Path, mode: str, first: int = 1, wandb_id: str = "", **environ: str) -> tuple[dict[str, Any], str]:
    """Run SCRIPT with a home of its own; return what it found, and all that it printed."""
    hidden = [key for key in os.environ if key.startswith("WANDB_") or key == "NETRC"]
    inherited = {key: value for key, value in os.environ.items() if key not in hidden}
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), mode, str(first), wandb_id],
        capture_output=True,
        text=True,
        env=inherited | {"HOME": str(home)} | environ,
    )
    assert done.returncode == 0, done.stderr
    found = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return found, done.stdout + done.stderr


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
    found, printed = run(folder, "offline")
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    return folder, found, printed, records(file)


def test_an_offline_run_holds_the_numbers_of_metrics_jsonl(offline) -> None:
    folder, found, _, written = offline
    (start,) = [record["run"] for record in written if record["type"] == "run"]
    assert start["run_id"] == found["id"]
    assert (start["project"], start["display_name"]) == ("sapo-train", "run")
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
    found, _ = run(folder, "offline")
    again, _ = run(folder, "offline", first=3, wandb_id=found["id"])
    assert again["id"] == found["id"]
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    assert [file.name for file in files] == [f"run-{found['id']}.wandb"] * 2
    assert [row["step"] for file in files for row in history(records(file))] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_off_does_not_even_import_it(tmp_path: Path) -> None:
    found, _ = run(tmp_path / "run", "off", wandb_id="kept")
    assert found == {"id": "kept", "imported": False}
    assert not (tmp_path / "run" / "wandb").exists()


def test_online_without_a_usable_key_falls_back_with_one_line(tmp_path: Path) -> None:
    _, printed = run(tmp_path / "run", "online", WANDB_API_KEY="not-a-key", WANDB_BASE_URL="http://127.0.0.1:9")
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
