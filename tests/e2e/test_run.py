"""Whole runs through the command line: real vLLM on the CPU, a tiny random model, float32."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import forked
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from command import MODULE, ROOT, finish, folders, new_run, records, steps_of, timeless, wait_for_step
from safetensors.torch import load_file
from tiny import CHAT_TEMPLATE, PLAIN, make_workspace
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.e2e

PROBE = "mismatch/probe_logp_diff"

REWARDS = """
import time

def hangs(completions, **columns):
    time.sleep(1000)

def mute(completions, **columns):
    return [None for _ in completions]

def judges(completions, solution, **columns):
    return [float(text == solution) for text in completions]

def picky(completions, prompts, **columns):
    if any("+" in prompt for prompt in prompts):
        raise ValueError("no sums please \\ud800")  # a character that no terminal can show
    return [1.0 for _ in completions]

def fussy(completions, **columns):
    if any(len(text) % 2 for text in map(str.strip, completions)):
        raise ConnectionError("not today")
    return [1.0 for _ in completions]

def rank(completions, **columns):
    order = sorted(completions)
    return [order.index(text) / len(order) for text in completions]
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    return make_workspace(
        folder,
        tiny_model,
        REWARDS,
        data={"pass_rate": {"solved_at": 0.5}},
        rollout={"verify_every": 2, "refill": {"max_extra": 0.5}},
        eval={"every": 3, "prompts": 8},
        checkpoint={"every": 3},
    )


def checkpointed(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint of one process."""
    tensors = load_file(checkpoint / "trainer_00000.safetensors")
    return {key.removeprefix("weight/"): tensor for key, tensor in tensors.items() if key.startswith("weight/")}


@pytest.fixture(scope="module")
def whole(workspace: Path) -> Path:
    """A run started as a user starts one, with vLLM, in an ASCII locale."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}.items():
            patch.setenv(name, value)
        return new_run(workspace)


@pytest.fixture(scope="module")
def plain(workspace: Path) -> Path:
    """The same without vLLM; test_kill.py and others resume runs with it."""
    return forked.new_run(workspace, PLAIN)


def test_run_folder_holds_everything(whole: Path, workspace: Path) -> None:
    for name in ("config.yaml", "overrides.yaml", "user.yaml", "environment.json", "metrics.jsonl", "wandb", "final"):
        assert (whole / name).exists(), name
    assert (whole / "logs/rewards_rank0.log").is_file()
    assert yaml.safe_load((whole / "config.yaml").read_text())["loss"]["tau_neg"] == 1.05
    assert (whole / "user.yaml").read_text() == (workspace / "tiny.yaml").read_text()
    environment = json.loads((whole / "environment.json").read_text())
    assert environment["packages"]["torch"] == importlib.metadata.version("torch")
    assert environment["device"]["device"] == "cpu"
    assert [path.name for path in sorted((whole / "checkpoints").iterdir())] == ["step_000003", "step_000006"]
    umask = os.umask(0o022)
    os.umask(umask)
    closed = [path for part in ("final", "checkpoints", "completions", "logs") for path in (whole / part).rglob("*.*")]
    assert [str(path) for path in closed if path.is_file() and path.stat().st_mode & 0o777 != 0o666 & ~umask] == []


def test_every_step_and_evaluation_is_recorded(whole: Path) -> None:
    assert [record["step"] for record in steps_of(whole)] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records(whole) if "eval/reward" in record] == [0, 3, 6]
    for record in steps_of(whole):
        for name in ("reward/mean", "rewards/odd/mean", "policy/grad_norm", "policy/entropy", "policy/kl_old_k3"):
            assert isinstance(record[name], float), name
        phases = ["time/rollout", "time/reward", "time/old_logps", "time/update", "time/sync"]
        assert 0 < sum(record[name] for name in phases) <= record["time/step"] * 1.001
        assert record["policy/ratio_max"] > 1.0  # the second update is off-policy
    probes = [record[PROBE] for record in records(whole) if PROBE in record]
    assert len(probes) == 4 and max(probes) < 1e-5


def test_completions_agree_with_the_metrics(whole: Path) -> None:
    for record in steps_of(whole):
        table = pq.read_table(whole / "completions" / f"step_{record['step']:05d}.parquet").to_pydict()
        assert len(table["completion"]) == 16
        assert sum(table["reward"]) / 16 == pytest.approx(record["reward/mean"])
        assert abs(sum(table["advantage"])) < 1e-6
        assert set(table["weight_version"]) == {record["step"] - 1}


def test_final_model_is_the_trained_one(whole: Path, tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(whole / "final", dtype=torch.float32)
    trained = checkpointed(whole / "checkpoints/step_000006")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, trained[name])
    start = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), model.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(whole / "final").chat_template == CHAT_TEMPLATE


def test_wandb_offline_shows_what_metrics_jsonl_holds(whole: Path) -> None:
    (offline,) = (whole / "wandb").glob("offline-run-*")
    output = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(offline)], capture_output=True, text=True
    )
    assert output.returncode == 0, output.stderr
    assert "policy/grad_norm" in output.stdout and "eval/reward" in output.stdout


def test_what_ended_after_three_steps_and_is_resumed_equals_six_to_the_last_bit(
    workspace: Path, plain: Path, tmp_path: Path
) -> None:
    folder = as_after_step_3(plain, tmp_path / "copy")
    code, out, err = forked.run(workspace, f"resume={folder}")
    assert code == 0, out + err
    assert timeless(folder) == timeless(plain)
    assert [one["after_step"] for one in json.loads((folder / "environment.json").read_text())["resumes"]] == [3]
    kept = sorted(path.stem for path in (folder / "completions").iterdir())
    assert kept == [*(f"eval_{step:05d}" for step in (0, 3, 6)), *(f"step_{step:05d}" for step in range(1, 7))]
    ours, theirs = (checkpointed(run / "checkpoints/step_000006") for run in (folder, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def as_after_step_3(whole: Path, copy: Path) -> Path:
    """Copy a run of six steps and take away what it saved at its end, as if it had been killed after its last step."""
    shutil.copytree(whole, copy, symlinks=True, ignore=shutil.ignore_patterns("final", "step_000006"))
    return copy


def test_a_fork_at_the_third_step_makes_the_same_steps_to_the_last_bit(workspace: Path, plain: Path) -> None:
    before = folders(workspace)
    code, out, err = forked.run(workspace, f"fork={plain.relative_to(workspace)}", "step=3")
    assert code == 0, out + err
    (folder,) = folders(workspace) - before
    assert timeless(folder) == timeless(plain)
    ours, theirs = (checkpointed(one / "checkpoints/step_000006") for one in (folder, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "after step 3\n" in out and len(list((folder / "completions").glob("step_*"))) == 6
    ids = [json.loads((one / "environment.json").read_text())["trackers"]["wandb"] for one in (folder, plain)]
    assert ids[0] != ids[1]


def test_what_cannot_be_resumed_is_refused_before_vllm_starts(workspace: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder, symlinks=True)
    file = folder / "checkpoints/step_000006/trainer_00000.safetensors"
    told = (folder / "logs/vllm_rank0.log").read_bytes()

    def refused(*arguments: str) -> str:
        code, _, err = forked.run(workspace, f"resume={folder}", "trainer.steps=8", *arguments)
        assert code == 2 and len(err.splitlines()) == 1, err
        assert (folder / "logs/vllm_rank0.log").read_bytes() == told
        return err

    assert "model.lora.rank (command line): is 4, but the run was begun with 0" in refused("model.lora.rank=4")
    file.write_bytes(file.read_bytes()[:-1000])
    err = refused()
    assert f"'{file}' cannot be used: it has" in err and f"move '{file.parent}' away to resume from step_000003" in err


def test_a_resume_goes_on_with_what_is_set_now_and_tells_what_it_lacks(
    workspace: Path, plain: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(plain, folder, symlinks=True)
    (folder / "metrics.jsonl").write_text("")
    now = ("trainer.steps=7", "trainer.learning_rate=3e-6", "eval.every=0", "logging.wandb=off")
    code, out, err = forked.run(workspace, f"resume={folder}", *now)
    assert code == 0, out + err
    assert [record["policy/learning_rate"] for record in steps_of(folder)] == [3e-6]
    assert f"goes on from {folder}/checkpoints/step_000006, after step 6\n" in out
    assert "learning rate 3e-06 after update 12 of 14, schedule constant with a peak of 3e-06\n" in out
    assert "changed since: " in out and "trainer.steps 6 -> 7" in out and "trainer.learning_rate 0.001 -> 3e-06" in out
    (lost,) = [record["warning"] for record in records(folder) if "no record" in record.get("warning", "")]
    assert lost.endswith("metrics.jsonl has no record of 6 of the 6 steps that were made before this resume")


def test_a_run_folder_that_is_taken_away_in_mid_run_is_told_in_two_lines(workspace: Path, tmp_path: Path) -> None:
    before = folders(workspace)
    often = ("trainer.steps=500", "checkpoint.every=1", "logging.wandb=off")
    process = forked.launch(workspace, "config=tiny.yaml", *often, PLAIN)
    folder = wait_for_step(process, workspace, before, 2)
    folder.rename(tmp_path / "elsewhere")
    code, out, err = finish(process)
    assert code == 2, out + err
    assert err.startswith(f"sapo-train: the run folder '{folder.relative_to(workspace)}' was deleted or moved while")
    assert len(err.splitlines()) == 2, err


def test_interrupt_saves_and_tells_how_to_go_on(workspace: Path) -> None:
    before = folders(workspace)
    process = forked.launch(workspace, "config=tiny.yaml", "trainer.steps=500", "checkpoint.every=400")
    folder = wait_for_step(process, workspace, before, 2)
    (rank,) = psutil.Process(process.pid).children()
    engine = forked.engine_with(folder / "logs/vllm_rank0.log")
    family = [process.pid, *(child.pid for one in (rank, engine) for child in (one, *one.children(recursive=True)))]
    assert len(family) >= 4  # there is a worker of rewards, too
    rank.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 130, out + err
    assert folders(workspace) - before == {folder}
    assert f"vLLM is starting; it writes to {folder.relative_to(workspace)}/logs\n" in out
    assert f"resume={folder.relative_to(workspace)}" in out
    assert len(list((folder / "checkpoints").glob("step_*"))) == 1
    assert not any(psutil.pid_exists(pid) for pid in family)
    again = ("config=tiny.yaml", "trainer.steps=500", "checkpoint.every=400", "resume=auto", "dry_run=true")
    code, out, err = forked.run(workspace, *again, begin=forked.launch)
    assert code == 0 and f"resume=auto: goes on with {folder.relative_to(workspace)}\n" in err, out + err


@pytest.mark.multi
def test_two_ranks_make_one_folder_and_the_loss_of_one(workspace: Path) -> None:
    profile = ROOT / "configs" / "accelerate" / "ddp.yaml"
    options = ("--num_processes", "2", "--main_process_port", "0")
    launcher = ("--config_file", str(profile), *options, *MODULE)

    def accelerate(workspace: Path, *arguments: str) -> forked.Popen:
        return forked.launch(workspace, *launcher, *arguments, module="accelerate.commands.launch")

    short = ("trainer.steps=2", "checkpoint.every=0", PLAIN)
    alone, folder = forked.new_run(workspace, *short), forked.new_run(workspace, *short, begin=accelerate)
    assert json.loads((folder / "environment.json").read_text())["device"]["processes"] == 2
    for ours, theirs in zip(steps_of(folder), steps_of(alone), strict=True):
        equal = ("policy/loss", "policy/grad_norm", "reward/mean", "policy/entropy", "completions/mean_length")
        for name in (*equal, "data/pass_rate_mean", "data/known_fraction"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    assert {path.name for path in (folder / "logs").iterdir()} == {"rewards_rank0.log", "rewards_rank1.log"}
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 1


def test_overlap_trains_on_batches_one_version_old(workspace: Path) -> None:
    folder = forked.new_run(workspace, "rollout.mode=overlap", "trainer.steps=4", "eval.prompts=0", "logging.wandb=off")
    assert [record["rollout/staleness"] for record in steps_of(folder)] == [0.0, 1.0, 1.0, 1.0]
    for record in steps_of(folder)[1:]:
        table = pq.read_table(folder / "completions" / f"step_{record['step']:05d}.parquet").to_pydict()
        assert set(table["weight_version"]) == {record["step"] - 2}
    state = json.loads((folder / "checkpoints/step_000003/state.json").read_text())["state"]
    assert state["sampler"]["position"] == 3 * 4  # of the batch that was trained on, not of the one ahead


@pytest.mark.parametrize("ahead", [1, 2])
def test_rollouts_that_go_on_over_new_weights_are_as_old_as_allowed(workspace: Path, ahead: int) -> None:
    staleness = ("rollout.mode=overlap", f"rollout.max_staleness={ahead}")
    short = ("trainer.steps=6", "eval.every=3", "checkpoint.every=3", "logging.wandb=off")
    again = ("+reward.functions.again.function=my_rewards.odd", "+reward.functions.again.weight=0")
    folder = forked.new_run(workspace, "reproducible=false", "rollout.verify_every=1", *staleness, *short, *again)
    steps = steps_of(folder)
    assert [record["rollout/staleness"] for record in steps] == [min(ahead, step) for step in range(6)]
    for record in steps:
        table = pq.read_table(folder / "completions" / f"step_{record['step']:05d}.parquet").to_pydict()
        begun_by = max(0, record["step"] - 1 - ahead)
        assert set(table["weight_version"]) <= {begun_by, begun_by + 1}  # a push may come while prompts are handed out
        assert len(table["weight_version"]) == 16
    evaluated = [record for record in records(folder) if "eval/reward" in record]
    assert [record["eval/rewards/again"] for record in evaluated] == [record["eval/reward"] for record in evaluated]
    assert max(record[PROBE] for record in records(folder) if PROBE in record) < 1e-4
    assert [record["step"] for record in records(folder) if "eval/reward" in record] == [0, 3, 6]
    state = json.loads((folder / "checkpoints/step_000003/state.json").read_text())["state"]
    assert state["sampler"]["position"] == 3 * 4  # of the batch that was trained on, not of those ahead


@pytest.mark.parametrize(
    "how", [(PLAIN,), ("rollout.mode=overlap", PLAIN), ("rollout.mode=overlap", "reproducible=false")]
)
def test_gradient_that_is_not_finite_ends_the_run_and_saves_nothing(workspace: Path, how: tuple[str, ...]) -> None:
    before = folders(workspace)
    steep = ("trainer.learning_rate=1e30", "checkpoint.every=1", "logging.wandb=off", *how)
    code, out, err = forked.run(workspace, "config=tiny.yaml", *steep)
    assert code == 2, out + err
    for words in (
        "step 1: the gradient norm is nan",
        "trainer.learning_rate (is 1e+30)",
        "trainer.max_grad_norm (is 1)",
    ):
        assert words in err
    assert "Traceback" not in err
    (folder,) = folders(workspace) - before
    (record,) = steps_of(folder)
    assert record["step"] == 1 and record["policy/grad_norm"] is None
    assert not (folder / "checkpoints").exists() and not (folder / "final").exists()


def test_sweep_makes_a_run_for_each_value(workspace: Path) -> None:
    before = folders(workspace)
    short = ("trainer.steps=1", "eval.prompts=0", "checkpoint.save_final=false", "logging.wandb=off", PLAIN)
    code, out, err = forked.run(
        workspace, "config=tiny.yaml", "loss.tau_neg=1.0,1.2", *short, "-m", begin=forked.launch
    )
    assert code == 0, out + err
    made = folders(workspace) - before
    assert len(made) == 2 and all(str(folder.relative_to(workspace)) in out for folder in made)
    assert "[1/2] loss.tau_neg=1.0" in out and "[2/2] loss.tau_neg=1.2" in out
    values = {yaml.safe_load((folder / "config.yaml").read_text())["loss"]["tau_neg"] for folder in made}
    assert values == {1.0, 1.2}
    assert all(len(steps_of(folder)) == 1 for folder in made)


def test_reward_that_needs_a_column_is_refused_without_waiting_for_vllm(workspace: Path) -> None:
    function = "+reward.functions.judge.function=my_rewards.judges"
    code, out, err = forked.run(workspace, "config=tiny.yaml", function, "logging.wandb=off")
    assert code == 2, out + err
    assert "'judge' (my_rewards.judges) needs 'solution', which is no column of the data" in err
    assert "vLLM is starting" not in out


def test_reward_that_hangs_is_named_with_its_sample(workspace: Path) -> None:
    function = ("+reward.functions.slow.function=my_rewards.hangs", "+reward.functions.slow.timeout=1")
    code, _, err = forked.run(workspace, "config=tiny.yaml", *function, "trainer.steps=1", "logging.wandb=off", PLAIN)
    assert code == 2
    assert "Traceback" not in err
    for words in ("slow", "my_rewards.hangs", "prompt", "1 s"):
        assert words in err


def test_reward_that_raises_counts_as_zero_and_one_that_never_applies_is_told_once(workspace: Path) -> None:
    function = ("+reward.functions.picky.function=my_rewards.picky", "+reward.functions.picky.on_error=zero")
    off = ("eval.prompts=0", "logging.wandb=off", "checkpoint.every=0", PLAIN)
    mute = "+reward.functions.mute.function=my_rewards.mute"
    closed = ("sh", "-c", '"$@" >&-', "sh")
    unweighted = "reward.functions.odd.weight=0"
    folder = new_run(workspace, *function, mute, unweighted, "trainer.steps=2", *off, prefix=closed)
    (flat,) = [record["warning"] for record in records(folder) if "teaches" in record.get("warning", "")]
    assert flat == "step 1 teaches nothing: the samples of each group all have the same reward"
    (warning,) = [record["warning"] for record in records(folder) if "mute" in record.get("warning", "")]
    assert warning == "reward mute applied to no completion of step 1: it returned None for all"
    for record in steps_of(folder):
        table = pq.read_table(folder / "completions" / f"step_{record['step']:05d}.parquet").to_pydict()
        sums = sum("+" in prompt for prompt in table["prompt"])
        assert record["rewards/picky/errors"] == sums
        assert record["rewards/picky/mean"] == pytest.approx((16 - sums) / 16)


LOSSES = """
from dataclasses import dataclass
from sapo_rl.losses import PolicyLossFn, TokenLosses

@dataclass
class Constant(PolicyLossFn):
    value: float = 5.0

    def token_losses(self, logps, log_ratios, advantages):
        return TokenLosses(logps * 0 + self.value, logps.detach() * 0)

class Seventh: ...
"""


def test_samples_without_a_reward_leave_their_groups_and_a_whole_step_is_compared_under_an_own_loss(
    workspace: Path,
) -> None:
    (workspace / "my_losses.py").write_text(LOSSES)
    loss = ("loss.name=my_losses.Constant", "+loss.args.value=7", "advantage.skip_zero_spread=false")
    fussy = "+reward.functions.fussy={function: my_rewards.fussy, on_error: none}"
    rank = "+reward.functions.rank={function: my_rewards.rank, scope: batch}"
    off = ("rollout.refill.max_extra=0", "logging.wandb=off", PLAIN)
    folder = forked.new_run(workspace, fussy, rank, *loss, "trainer.steps=2", *off)
    left = 0
    for record in steps_of(folder):
        assert record["policy/loss"] == pytest.approx(7)
        table = pq.read_table(folder / "completions" / f"step_{record['step']:05d}.parquet").to_pydict()
        texts, order = table["completion"], sorted(table["completion"])
        assert 0 < len(texts) == 16 - record["rewards/fussy/errors"]
        assert all(len(text.strip()) % 2 == 0 for text in texts)
        assert table["rewards/rank"] == [order.index(text) / len(order) for text in texts]
        groups: dict[int, list[tuple[float, float]]] = {}
        for index, reward, advantage in zip(table["prompt_index"], table["reward"], table["advantage"], strict=True):
            groups.setdefault(index, []).append((reward, advantage))
        for group in groups.values():
            rewards = [reward for reward, _ in group]
            spread = statistics.stdev(rewards) + 1e-6 if len(group) > 1 else 1.0
            expected = [(reward - statistics.fmean(rewards)) / spread for reward in rewards]
            assert [advantage for _, advantage in group] == pytest.approx(expected)
        left += 16 - len(texts)
    assert left
    warnings = [record["warning"] for record in records(folder) if "not today" in record.get("warning", "")]
    assert warnings and all("samples left their groups" in warning for warning in warnings)
    assert all("eval/rewards/rank" in record for record in records(folder) if "eval/reward" in record)


def test_a_loss_that_is_none_is_refused_before_vllm_starts(workspace: Path) -> None:
    (workspace / "my_losses.py").write_text(LOSSES)
    before = folders(workspace)
    code, _, err = forked.run(workspace, "config=tiny.yaml", "loss.name=my_losses.Seventh", "logging.wandb=off")
    assert code == 2 and len(err.splitlines()) == 1
    assert err.startswith("sapo-train: loss.name: policy loss 'my_losses.Seventh' is no subclass of PolicyLossFn")
    (refused,) = folders(workspace) - before
    assert not (refused / "logs").exists()
