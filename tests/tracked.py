"""Runs of four steps with trackers, in processes of their own with a home of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SECRET = "s3cr3t-value"
NAME, SWEEP = "mine tau_neg=1.2 1", "sweep 2026-11-23_04-09-45"
SCRIPT = (
    """
import dataclasses, json, sys, yaml
from pathlib import Path
from sapo_rl.config import Config, RewardFunctionConfig
from sapo_rl.run_folder import record
from sapo_rl.telemetry import Telemetry, rows, sample_metrics
from sapo_rl.types import Group, Prompt, Row, Sample, Stop

folder, first, changes = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
config = Config()
config.model.path, config.trainer.steps = "/models/tiny", 4
config.logging.console, config.logging.completions = "plain", 2
for name, value in changes.items():
    setattr(config.logging, name, value)
config.reward.functions = {"judge": RewardFunctionConfig(function="a.b", args={"api_key": "SECRET", "scale": 3})}
config.description = "SECRET"  # as every rank reads it; what the run folder holds is a reference
kept = dataclasses.asdict(config)
kept["description"] = kept["reward"]["functions"]["judge"]["args"]["api_key"] = "${oc.env:MINE}"
(folder / "config.yaml").write_text(yaml.safe_dump(kept))
if first == 1:
    record.write(folder, {record.NAME: "NAMED", record.SWEEP: "SWEPT"})
row, values = Row([1], [1]), (0.5, 1.0, 0.0)
samples = [Sample([row], Stop.STOP, (0, 0), text=f"reply {r}", rewards={"judge": r}, reward=r) for r in values]
group = Group(Prompt(0, [1], "prompt", {}), samples)
with Telemetry(config, folder, resume_step=first - 1 if first > 1 else None) as telemetry:
    for step in range(first, first + 2):
        groups = [rows(step, group)]
        telemetry.log_step(step, sample_metrics(groups) | {"policy/loss": float("nan"), "time/step": 1.0}, groups)
        telemetry.log_eval(step, {"eval/reward": step / 8}, [])
    telemetry.finish(first > 1, [])
loaded = sorted({"wandb", "mlflow", "tensorboard", "trackio"} & set(sys.modules))
print(json.dumps(record.read(folder).get(record.TRACKERS, {}) | {"imported": loaded}))
""".replace("SECRET", SECRET)
    .replace("NAMED", NAME)
    .replace("SWEPT", SWEEP)
)


def run(folder: Path, first: int = 1, changes: dict[str, Any] | None = None, **environ: str) -> tuple[Any, str]:
    """Run SCRIPT from step `first` on in the folder's parent; return the ids of trackers, and all that it printed.

    `changes` are made to the section `logging`; a run that is not the first one's resumes it.
    """
    hidden = [key for key in os.environ if key.startswith(("WANDB_", "MLFLOW_", "TRACKIO_")) or key == "NETRC"]
    inherited = {key: value for key, value in os.environ.items() if key not in hidden}
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(first), json.dumps(changes or {})],
        capture_output=True,
        text=True,
        cwd=folder.parent,
        env=inherited
        | {"HOME": str(home), "PYTHONPATH": os.pathsep.join(["", str(Path(__file__).parents[2])])}
        | environ,
    )
    assert done.returncode == 0, done.stderr
    found = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return found, done.stdout + done.stderr


def logged(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl without warnings, and without what was not finite."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {name: value for name, value in line.items() if value is not None} for line in lines if "warning" not in line
    ]


def series(records: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Step and value of each metric, in the order of the records."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step":
                found.setdefault(name, []).append((record["step"], value))
    return found
