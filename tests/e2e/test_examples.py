"""The examples of docs/examples in whole runs of a tiny model: three share one server, which the judge asks as well."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
import nbformat
import pyarrow.parquet as pq
import pytest
from command import free_port, records, steps_of
from nbclient import NotebookClient
from tiny import make_tiny_model

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
SMALL = {
    "model.dtype": "float32",
    "data.max_prompt_tokens": 400,
    "rollout.batch_size": 8,
    "rollout.group_size": 4,
    "rollout.max_completion_tokens": 16,
    "rollout.max_num_seqs": 16,
    "rollout.cpu_kv_cache_gb": 0.1,
    "trainer.steps": 2,
    "trainer.updates_per_rollout": 2,
    "trainer.mini_batches": 1,
    "eval.every": 2,
    "eval.prompts": 4,
    "checkpoint.every": 0,
    "logging.wandb": "off",
    "logging.console": "plain",
}


@dataclass
class Server:
    """A `sapo-serve` with the tiny model, and the environment of those that know its key."""

    model: Path
    port: int
    environment: dict[str, str]

    def run(self, folder: Path, *arguments: str) -> Path:
        """Train in a copy of an example; return the run folder."""
        shutil.copytree(ROOT / "docs/examples" / folder.name, folder)
        small = [f"{key}={value}" for key, value in SMALL.items()]
        beside = [f"rollout.servers=[127.0.0.1:{self.port}]", f"model.path={self.model}", f"run_dir={folder / 'run'}"]
        code, out, err = forked.run(folder, *small, *beside, *arguments, SAPO_API_KEY=self.environment["SAPO_API_KEY"])
        assert code == 0, out + err
        return folder / "run"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    model, port = make_tiny_model(folder / "model"), free_port()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SAPO_API_KEY": "of-these-tests-alone"}
    command = [sys.executable, "-m", "sapo_rl.run.serve", "--port", str(port), "config=quickstart"]
    command += [f"model.path={model}", *(f"{key}={value}" for key, value in SMALL.items())]
    command += ["rollout.max_completion_tokens=100"]
    with (folder / "log").open("wb") as log:
        process = forked.Popen(command, server="engines", cwd=folder, env=environment, stdout=log, stderr=log)
    yield Server(model, port, environment)
    process.send_signal(signal.SIGTERM)
    process.wait(60)


def test_a_loss_of_ones_own_trains_and_the_server_writes_the_turns_of_a_game(server: Server, tmp_path: Path) -> None:
    game = ("environment={name: guess, workers: 1}", "environment.max_turns=2", "environment.max_tokens=100")
    all_count = ("rollout.logprobs=true", "advantage.skip_zero_spread=false", "rollout.mode=sync")
    run = server.run(tmp_path / "own_loss", "config=tapered.yaml", *game, *all_count)
    assert [one["step"] for one in steps_of(run)] == [1, 2]
    for one in steps_of(run):
        assert one["episode/turns/max"] == 2 and one["stop/turns"] + one["stop/environment"] == 1
        assert 0 < one["episode/masked_fraction"] < 1
        assert abs(one["mismatch/kl_k1"]) < 1e-5  # what a turn begins with is what the server was sent
    assert "my_losses.Tapered" in (run / "config.yaml").read_text()


def test_an_agent_is_told_of_its_tool(server: Server, tmp_path: Path) -> None:
    run = server.run(
        tmp_path / "tool_agent", "config=agent.yaml", "environment.max_tokens=100", "environment.workers=1"
    )
    assert all(one["tools/call_frequency"] == 0 for one in steps_of(run))  # a random model calls nothing
    evaluations = [one for one in records(run) if "eval/reward" in one]
    assert [one["step"] for one in evaluations] == [0, 2]


def test_a_judge_behind_a_server_gives_marks(server: Server, tmp_path: Path) -> None:
    args = "reward.functions.quality.args"
    asked = (
        f"{args}.url=http://127.0.0.1:{server.port}/v1",
        f"{args}.key=SAPO_API_KEY",
        f"{args}.model={server.model}",
    )
    short = ("{args}.template='{completion}'".format(args=args, completion="{completion}"), "reward.env=[SAPO_API_KEY]")
    run = server.run(tmp_path / "judge", "config=explain.yaml", *asked, *short)
    marks = pq.read_table(run / "completions/step_00001.parquet").column("rewards/quality").to_pylist()
    assert len(marks) == 8 and set(marks) <= {1.0, 0.4, 0.0}


def test_the_notebook_runs_from_its_first_cell_to_its_last(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book: Any = nbformat.read(ROOT / "docs/examples/notebook/train.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells)
    (first,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    small = [f"{key}={value}" for key, value in SMALL.items()]
    beside = [f"model.path={server.model}", f"rollout.servers=[127.0.0.1:{server.port}]"]
    first.source = f"overrides = {[*small, *beside]}"
    monkeypatch.setenv("SAPO_API_KEY", server.environment["SAPO_API_KEY"])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    NotebookClient(book, timeout=900, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "step 0: 0.00\nstep 2: 0.00\n" in said
    shown = [output.data for output in outputs if output.output_type in ("execute_result", "display_data")]
    assert [sorted(one) for one in shown if "image/png" in one]
    assert sum("rewards/brief" in one["text/plain"] for one in shown) == 2
