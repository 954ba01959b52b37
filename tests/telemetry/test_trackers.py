"""What every tracker was told, read back by its own package: numbers, names and settings, over a resume."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tracked import NAME, SECRET, SWEEP, logged, run, series

ALL = {
    "trackers": ["tensorboard", "trackio", "mlflow", "wandb", "lines.Lines", "my_trackers.Lines"],
    "wandb": "offline",
    "tags": ["a"],
}
DOCS = Path(__file__).parents[2] / "docs/metrics.md"
OWN = '''
class Lines:
    """A tracker of a user's own."""
    run_id, where = None, "own.txt"
    def __init__(self, run):
        self.file = open(run.folder / "own.txt", "a")
        self.file.write(f"{run.name}|{run.group}|{run.resumed_after}\\n")
    def log(self, record, rows):
        self.file.write(f"{record['step']} {len(rows)}\\n")
    def finish(self, failed):
        self.file.write(f"{failed}\\n")
        self.file.close()
'''
BROKEN = '''
class Broken:
    """Fails at the step and at the end."""
    run_id, where = "kept", "nowhere"
    def __init__(self, run):
        pass
    def log(self, record, rows):
        if record["step"] == 2:
            raise OSError("the disk is full")
    def finish(self, failed):
        raise OSError("still full")
def no_server(run):
    raise ConnectionError("nobody answers")
'''


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A run with all trackers that was resumed after its second step: its folder, their ids, and what was printed."""
    folder = tmp_path_factory.mktemp("tracked") / "run"
    (folder.parent / "lines.py").write_text(OWN)
    (example,) = re.findall(r"^```python\n(.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    (folder.parent / "my_trackers.py").write_text(example)
    found, first = run(folder, changes=ALL)
    again, second = run(folder, first=3, changes=ALL)
    assert again == found and found.keys() == {"imported", "mlflow", "trackio", "wandb"}
    return folder, found, first + second


def test_the_run_says_where_its_trackers_are_and_nothing_else(tracked) -> None:
    folder, found, printed = tracked
    lines = [line.split("  ") for line in printed.splitlines()]
    shown = {line[0]: line[-1].strip() for line in lines if len(line) > 1}
    assert shown["TensorBoard"] == f"tensorboard --logdir {folder}/tensorboard"
    assert shown["trackio"] == "trackio show --project sapo-train"
    assert shown["MLflow"].startswith(f"run {found['mlflow']} at sqlite:///")
    assert shown["Weights & Biases"].startswith(f"{folder}/wandb/offline-run-")
    assert "warning" not in printed and "* " not in printed and "INFO" not in printed, printed


def test_tensorboard_has_each_number_at_its_step(tracked) -> None:
    folder = tracked[0]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    expected = series(logged(folder))
    assert set(events.Tags()["scalars"]) == set(expected)
    for name, points in expected.items():
        assert [(one.step, one.value) for one in events.Scalars(name)] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in points
        ]
    table = events.Tensors("completions/text_summary")
    assert [one.step for one in table] == [1, 2, 3, 4]
    text = table[0].tensor_proto.string_val[0].decode()
    assert [line.split(" | ")[3] for line in text.splitlines()[2:]] == ["reply 0.0", "reply 1.0"]
    (config, *_) = events.Tensors("config/text_summary")
    assert b"scale: 3" in config.tensor_proto.string_val[0]
    assert "hparams" in events.summary_metadata["_hparams_/session_start_info"].plugin_data.plugin_name


def test_steps_that_are_made_again_are_shown_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    for first in (1, 2):
        run(folder, first, {"trackers": ["tensorboard"]})
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [one.step for one in events.Scalars("reward/mean")] == [1, 2, 3]


def test_trackio_has_each_number_at_its_step(tracked) -> None:
    folder, found, _ = tracked
    script = """
import json, trackio
(run,) = trackio.Api().runs("sapo-train")
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps([run.name, run.id, SQLiteStorage.get_run_config("sapo-train", run.name),
    SQLiteStorage.get_logs("sapo-train", run.name, run_id=run.id)]))
"""
    environ = os.environ | {"HOME": str(folder.parent / "home")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    name, run_id, config, logs = json.loads(done.stdout.splitlines()[-1])
    assert (name, run_id, config["_Group"]) == (NAME, found["trackio"], SWEEP)
    assert config["reward.functions.judge.args.scale"] == 3
    tables = [(log["step"], log["completions"]["_value"]) for log in logs if "completions" in log]
    assert [step for step, _ in tables] == [1, 2, 3, 4]
    assert [row["completion"] for row in tables[0][1]] == ["reply 0.0", "reply 1.0"]
    plain = [{name: one for name, one in log.items() if name not in ("timestamp", "completions")} for log in logs]
    expected = series(logged(folder))
    del expected["time"]
    assert series(plain) == expected


def test_mlflow_has_each_number_at_its_step(tracked) -> None:
    folder, found, _ = tracked
    database = sqlite3.connect(folder.parent / "mlflow.db")
    run_id, name, status = database.execute("select run_uuid, name, status from runs").fetchone()
    assert (run_id, name, status) == (found["mlflow"], NAME, "FINISHED")
    rows = database.execute("select step, key, value from metrics order by key, step, timestamp").fetchall()
    kept: dict[str, list[tuple[int, float]]] = {}
    for step, key, value in rows:
        kept.setdefault(key, []).append((step, value))
    assert kept == series(logged(folder))
    parameters = dict(database.execute("select key, value from params").fetchall())
    assert parameters["reward.functions.judge.args.scale"] == "3" and parameters["trainer.steps"] == "4"
    tags = dict(database.execute("select key, value from tags").fetchall())
    assert tags["group"] == SWEEP and tags["run_folder"] == str(folder) and "a" in tags
    (experiment,) = database.execute("select name from experiments where name != 'Default'").fetchone()
    assert experiment == "sapo-train"


def test_a_tracker_of_ones_own_gets_records_and_completions(tracked) -> None:
    lines = (tracked[0] / "own.txt").read_text().splitlines()
    assert lines == [
        *(f"{NAME}|{SWEEP}|None", "1 2", "1 0", "2 2", "2 0", "True"),
        *(f"{NAME}|{SWEEP}|2", "3 2", "3 0", "4 2", "4 0", "False"),
    ]
    told = [line.split() for line in (tracked[0] / "lines.txt").read_text().splitlines()]  # that of docs/metrics.md
    assert [int(step) for step, _ in told] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [reward for _, reward in told] == ["0.5", "None"] * 4


def test_no_secret_is_written_anywhere(tracked) -> None:
    folder, _, printed = tracked
    files = [path for path in folder.parent.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert files == [] and SECRET not in printed


def test_a_tracker_that_fails_is_told_once_and_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(BROKEN)
    own = ["mine.Broken", "mine.no_server", "tensorboard"]
    _, printed = run(tmp_path / "run", changes={"trackers": own})
    assert [line for line in printed.splitlines() if line.startswith("warning")] == [
        "warning: mine.no_server fails (nobody answers); metrics.jsonl has every number",
        "warning: mine.Broken fails (the disk is full); metrics.jsonl has every number",
    ]
    assert [record["step"] for record in logged(tmp_path / "run")] == [1, 1, 2, 2]
    assert list((tmp_path / "run/tensorboard").glob("events*"))


def test_a_server_that_is_not_there_ends_nothing(tmp_path: Path) -> None:
    quick = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    _, printed = run(tmp_path / "run", changes={"trackers": ["mlflow"]}, **quick)
    (warning,) = [line for line in printed.splitlines() if line.startswith("warning")]
    assert warning.startswith("warning: MLflow fails (API request to http://127.0.0.1:9/") and len(warning) < 220
    assert "Connection refused" in warning
    assert len(logged(tmp_path / "run")) == 4


def test_without_trackers_none_is_imported(tmp_path: Path) -> None:
    for changes in ({"trackers": []}, {"wandb": "off"}):
        found, _ = run(tmp_path / "run", changes=changes)
        assert found == {"imported": []}
    assert not (tmp_path / "run" / "wandb").exists()
