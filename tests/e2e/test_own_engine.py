"""The engine of docs/extending.md in a whole run, through the command line."""

from __future__ import annotations

from pathlib import Path

import forked
import pytest
from command import folders, records, steps_of
from tiny import PLAIN, make_workspace

pytestmark = pytest.mark.e2e


def test_an_engine_named_by_dotted_path_trains_with_the_weights_that_it_is_brought(
    tmp_path: Path, tiny_model: Path
) -> None:
    """The probe compares its log-probabilities with the trainer's after the start and after each step."""
    workspace = make_workspace(
        tmp_path,
        tiny_model,
        rollout={"batch_size": 8, "max_completion_tokens": 4, "verify_every": 1},
        trainer={"steps": 2, "learning_rate": 1e-2},
        eval={"prompts": 2},
        logging={"wandb": "off"},
    )
    code, out, err = forked.run(workspace, "config=tiny.yaml", PLAIN)
    assert code == 0, out + err
    (folder,) = folders(workspace)
    assert "my_engine.PlainEngine is starting\nmy_engine.PlainEngine is ready, after" in out and "vLLM" not in out
    probes = [one["mismatch/probe_logp_diff"] for one in records(folder) if "mismatch/probe_logp_diff" in one]
    assert len(probes) == 3 and max(probes) < 1e-5
    assert not list((folder / "logs").glob("vllm*"))
    assert len(steps_of(folder)) == 2
