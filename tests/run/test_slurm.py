"""What the Slurm scripts start, with Slurm's commands in this machine's place."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts/slurm"
STUBS = {
    "scontrol": "printf 'node1\\nnode2\\n'",
    "srun": """export SLURM_PROCID=1
while [ "$1" != bash ]; do shift; done
exec "$@" """,
    "sapo-train": 'echo "train $*"',
    "sapo-serve": 'echo "serve $*"',
}


@pytest.mark.parametrize("script", ["train.sbatch", "train_and_serve.sbatch"])
@pytest.mark.parametrize(
    ("restarts", "given", "begins"),
    [
        (None, "config=mine.yaml", "config=mine.yaml launch"),
        ("0", "config=mine.yaml", "config=mine.yaml launch"),
        ("1", "config=mine.yaml", "config=mine.yaml resume=auto launch"),
        ("1", "resume=runs/mine/a", "resume=runs/mine/a launch"),
    ],
)
def test_a_job_that_was_requeued_goes_on_by_itself(
    tmp_path: Path, script: str, restarts: str | None, given: str, begins: str
) -> None:
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SAPO_API_KEY": "k" * 32}
    slurm |= {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    environ = {**os.environ, **slurm, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "GPUS_PER_NODE": "2"}
    done = subprocess.run(["bash", str(SCRIPTS / script), given], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("train ")]
    served = script == "train_and_serve.sbatch"
    expected = begins.replace("launch", "rollout.servers=[node1:8000,node1:8001] launch") if served else begins
    assert line.startswith(f"train {expected}.") and "launch.machine_rank=1" in line, line
    machines, head = (1, "node2") if served else (2, "node1")
    assert f"launch.num_machines={machines} launch.num_processes={2 * machines}" in line
    assert f"launch.main_process_ip={head}" in line
    assert all("resume=auto" not in line for line in done.stdout.splitlines() if line.startswith("serve"))
