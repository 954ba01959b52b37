"""The dashboard for Weights & Biases, as far as it goes without their servers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sapo_rl.telemetry.report import cli, dashboard

ROOT = Path(__file__).parents[2]


def test_its_panels_show_metrics_that_are_told_in_the_docs() -> None:
    spec = json.loads(dashboard.build("us", "gsm8k")._to_model().model_dump_json())
    assert (spec["entity"], spec["project"], spec["display_name"]) == ("us", "gsm8k", "sapo-train")
    sections = {one["name"]: one["panels"] for one in spec["spec"]["section"]["panel_bank_config"]["sections"]}
    assert list(sections)[:4] == list(dashboard.SECTIONS)
    shown = [one["config"] for name in dashboard.SECTIONS for one in sections[name]]
    assert {one["x_axis"] for one in shown} == {"step"}
    names = {name for one in shown for name in one["metrics"]}
    assert names == {name for plots in dashboard.SECTIONS.values() for curves in plots.values() for name in curves}
    lines = [line for run in (ROOT / "docs/runs").glob("*.jsonl") for line in run.read_text().splitlines()]
    known = {name for line in lines for name in json.loads(line)}
    sources = "".join(path.read_text() for path in (ROOT / "sapo_rl").rglob("*.py") if path.name != "dashboard.py")
    derived = {f"policy/weight_mean_{side}" for side in ("with", "against")} | {"mismatch/kl_k3"}
    assert {name for name in names - known - derived if f'"{name}"' not in sources} == set()


def test_what_wandb_refuses_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    for name, value in {
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_API_KEY": "k" * 40,
        "HOME": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("wandb_workspaces.workspaces.Workspace.save", lambda self: (_ for _ in ()).throw(OSError("no")))
    assert cli.main(["--wandb", "us/gsm8k"]) == 2
    assert capsys.readouterr().err == "sapo-report: --wandb: W&B does not take the dashboard of 'us/gsm8k': no\n"


def test_without_runs_and_project_it_says_what_is_missing(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main([])
    assert "RUN_DIR" in capsys.readouterr().err
