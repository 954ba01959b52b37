"""Runs with environments and tools: real vLLM on the CPU, a tiny random model, float32."""

from __future__ import annotations

import contextlib
import json
import statistics
from dataclasses import replace
from pathlib import Path

import forked
import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from accelerate import Accelerator
from command import records, steps_of, timeless
from games import MODULE
from inside import kept_apart, sapo_train
from tiny import PLAIN, engine_settings, logps_of, make_tokenizer, make_workspace
from transformers import AutoModelForCausalLM

from sapo_rl.config import Config, EnvironmentConfig, LaunchConfig, RewardFunctionConfig
from sapo_rl.engines.process import LocalEngine
from sapo_rl.environments.runner.pool import pools_of
from sapo_rl.policy.model import load_policy
from sapo_rl.policy.trainer import PolicyTrainer
from sapo_rl.rollout.collector import Rollouts
from sapo_rl.rollout.episodes import Episodes
from sapo_rl.run import eval as eval_command
from sapo_rl.run import launch, start
from sapo_rl.types import Group, Prompt

pytestmark = pytest.mark.e2e

AGENT = """
async def run(client, row):
    messages = [{"role": "user", "content": row["prompt"]}]
    for _ in range(2):
        said = (await client.chat.completions.create(model="policy", messages=messages)).choices[0].message
        messages += [said, {"role": "user", "content": "And?"}]
    return 0.5
"""


ODD = """
def odd(completions, **columns):
    return [sum(ord(c) % 2 for one in messages for c in one["content"]) / 100 for messages in completions]
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = make_workspace(
        tmp_path_factory.mktemp("workspace"),
        tiny_model,
        data={"source": "sapo_rl.environments.guess.tasks", "eval_split": "held out", "max_prompt_tokens": 256},
        reward={"functions": {"said": {"function": "my_games.said"}, "odd": {"function": "my_games.odd"}}},
        environment={"name": "guess", "max_turns": 3, "max_tokens": 200, "workers": 1},
        rollout={"verify_every": 1},
        trainer={"steps": 2},
        eval={"every": 1, "prompts": 4},
        checkpoint={"every": 1},
        logging={"tokens": True},
    )
    (folder / "my_games.py").write_text(MODULE + ODD)
    return folder


@pytest.fixture(scope="module")
def guessing(workspace: Path) -> Path:
    return forked.new_run(workspace)


def test_a_game_is_trained_on_by_one_command(guessing: Path) -> None:
    first, second = steps_of(guessing)
    for record in (first, second):
        assert record["episode/turns/mean"] == record["episode/turns/max"] == 3  # it never hits
        assert 0 < record["episode/masked_fraction"] < 1
        assert record["stop/turns"] == 1 and record["stop/length"] == record["episode/dropped"] == 0
        assert record["episode/forks"] == 0
        assert record["time/environment"] > 0 and 0 < record["rollout/prefix_hit"] < 1
        assert record["rewards/environment/mean"] is not None and record["rewards/said/mean"] == 1
        assert record["completions/mean_length"] < record["episode/length"] <= 200
    evaluations = [record for record in records(guessing) if "eval/reward" in record]
    assert [record["step"] for record in evaluations] == [0, 1, 2]
    assert "eval/rewards/environment" in evaluations[0]
    table = pq.read_table(guessing / "completions/step_00001.parquet").to_pydict()
    assert set(table["turns"]) == {3} and set(table["stop"]) == {"turns"}
    assert all(text.startswith("assistant: ") and "\n\nuser: " in text for text in table["completion"])
    assert (guessing / "logs/environments_rank0.log").is_file()


def test_the_recipe_guess_plays_with_vllm(workspace: Path, tiny_model: Path) -> None:
    model = (f"model.path={tiny_model}", "model.dtype=float32", "data.max_prompt_tokens=256")
    brief = ("environment.max_tokens=200", "rollout.batch_size=16", "trainer.steps=2", "eval.every=2", "eval.prompts=4")
    code, out, err = forked.run(workspace, "config=guess", *model, *brief, "run_dir=recipe")
    assert code == 0, out + err
    assert list((workspace / "recipe/logs").glob("vllm*"))
    for record in steps_of(workspace / "recipe"):
        assert 1 <= record["episode/turns/mean"] <= record["episode/turns/max"] == 3
        assert record["episode/forks"] == record["episode/dropped"] == 0
        assert 0 <= record["rewards/environment/mean"] <= 1
    evaluations = [record for record in records(workspace / "recipe") if "eval/reward" in record]
    assert [record["step"] for record in evaluations] == [0, 2]


def test_every_token_has_its_numbers_and_those_of_the_environment_have_none(guessing: Path) -> None:
    for record in steps_of(guessing):
        name = f"{record['step']:05d}.parquet"
        told = pq.read_table(guessing / f"completions/step_{name}").to_pylist()
        tokens = pq.read_table(guessing / f"completions/tokens_{name}").to_pylist()
        assert tokens
        for row in tokens:
            one = told[row["sample"]]
            assert one["advantage"] == row["advantage"] != 0
            assert sum(row["trained"]) == one["tokens"] < len(row["texts"]) <= one["length"]
            pairs = list(zip(row["texts"], row["trained"], strict=True))
            masked = "".join(text for text, trained in pairs if not trained)
            for message in json.loads(one["messages"])[:-1]:  # what answers the last reply comes too late
                assert message["role"] == "assistant" or message["content"] in masked
            for column in ("logps", "ratio", "gradient_weight"):
                assert [value is not None for value in row[column]] == row["trained"]
        last = [value for row in tokens for value in row["ratio"] if value is not None]
        assert (1 + statistics.fmean(last)) / 2 == pytest.approx(record["policy/ratio_mean"], rel=1e-6)  # two updates


def test_the_same_run_begun_again_and_resumed_plays_the_same_episodes(guessing: Path, workspace: Path) -> None:
    half = forked.new_run(workspace, "trainer.steps=1")
    code, out, err = forked.run(workspace, f"resume={half}", "trainer.steps=2")
    assert code == 0, out + err
    ours, theirs = ([one for one in timeless(run) if "warning" not in one] for run in (half, guessing))
    assert ours == theirs


def test_sapo_eval_plays_the_games_of_a_runs_evaluation(
    guessing: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another engine: greedy replies are the same."""

    def forks(settings: LaunchConfig, begun: start.Start, lock: int) -> None:
        assert forked.Popen(launch.command(settings, begun.folder)).wait(300) == 0

    monkeypatch.chdir(workspace)
    monkeypatch.setattr(start, "_spawn", forks)
    with kept_apart():
        eval_command.main([f"model={guessing / 'checkpoints'}", "run_dir=measured", PLAIN])
    results = json.loads((workspace / "measured/results.json").read_text())["models"]
    _, *expected = [record for record in records(guessing) if "eval/reward" in record]
    assert [one["step"] for one in results] == [record["step"] for record in expected] == [1, 2]
    for one, record in zip(results, expected, strict=True):
        found = one["sets"]["default"]["metrics"]
        assert found == {name: value for name, value in record.items() if name.startswith("eval/")}
        assert found["eval/rewards/odd"] > 0


def test_a_class_of_trls_shape_a_game_an_agent_and_a_tool_train_beside_each_other_with_overlap(workspace: Path) -> None:
    recipe = yaml.safe_load((workspace / "tiny.yaml").read_text())
    game = recipe.pop("environment")
    agent = {**game, "name": "endpoint", "args": {"run": "my_agent.run"}}
    recipe["environments"] = {"shelf": {**game, "name": "my_games.Shelf"}, "guess": game, "agent": agent}
    folder = workspace / "several"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "my_agent.py").write_text(AGENT)
    for name in ("my_games.py", "my_rewards.py"):
        (folder / name).symlink_to(workspace / name)
    done = forked.new_run(
        folder,
        "data.source=my_games.rows",
        "data.eval_split=null",
        "eval.prompts=9",
        "tools=[my_games.double]",
        "rollout.mode=overlap",
        "reproducible=false",
        "~reward.functions.odd",
    )
    for record in steps_of(done):
        shares = {name: record.get(f"environment/{name}/fraction", 0.0) for name in ("shelf", "guess", "agent")}
        assert sum(shares.values()) == pytest.approx(1)
        if shares["shelf"]:  # a random model calls no tool
            assert record["environment/shelf/turns"] == 1 and record["environment/shelf/reward"] == 1.25
        if shares["guess"]:
            assert record["environment/guess/turns"] == 3
        if shares["agent"]:
            assert record["environment/agent/turns"] == 2 and record["environment/agent/reward"] == 1.5
        assert record["tools/call_frequency"] == 0 and record["rewards/said/mean"] == 1
    assert {name for record in steps_of(done) for name in record if name.endswith("/fraction")} == {
        "environment/shelf/fraction",
        "environment/guess/fraction",
        "environment/agent/fraction",
    }
    evaluations = [record for record in records(done) if "eval/reward" in record]
    assert all("eval/environment/agent" in record and "eval/environment/guess" in record for record in evaluations)


def test_an_environment_that_fails_ends_the_run_by_name_and_leaves_nothing_behind(workspace: Path) -> None:
    code, out, err = forked.run(
        workspace, "config=tiny.yaml", "environment.name=my_games.Answers", "+environment.args.found='7'", PLAIN
    )
    assert code == 2, out + err
    assert "environment 'my_games.Answers' failed on prompt" in err and "step returned 7; must return" in err
    assert "environment.on_error=drop" in err and "Traceback" not in err
    own = [one for one in psutil.process_iter(["cmdline", "cwd"]) if one.info["cwd"] == str(workspace)]
    assert [one.pid for one in own if "environments.runner" in str(one.info["cmdline"])] == []


def test_a_dry_run_tells_what_is_wrong_with_an_environment(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    code, out, err = sapo_train("config=tiny.yaml", "environment.name=my_games.Mute", "dry_run=true")
    assert code == 2 and "'my_games.Mute' has neither a method step nor one that is a tool" in err, out + err


def test_the_trainers_log_probabilities_are_vllms_over_turns_with_tools(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model calls no tool: a parser that takes every reply for a call has it use one at each turn."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_games.py").write_text(MODULE)
    from sapo_rl.environments import parsers

    every = parsers.Parsed("", [parsers.Call("double", {"number": 21})])
    monkeypatch.setattr(parsers, "choose", lambda name, template, tools: parsers.Parser(lambda text: every))
    cfg = Config(environment=EnvironmentConfig("my_games.Shelf", max_turns=4, workers=1), tools=["my_games.double"])
    cfg.reward.functions = {"match": RewardFunctionConfig("exact_match")}
    cfg.rollout.group_size, cfg.rollout.max_completion_tokens, cfg.rollout.logprobs = 4, 12, True
    cfg.environment.max_tokens, cfg.data.max_prompt_tokens = 300, 100
    tokenizer = make_tokenizer()
    engine = LocalEngine(engine_settings(tiny_model, tmp_path / "log", max_model_len=400))
    engine.start()
    try:
        engine.wait_ready()
        rollouts = Rollouts([engine], cfg.rollout, tokenizer, seed=0, reproducible=False)
        with Episodes(rollouts, pools_of(cfg), cfg) as episodes:
            (group,) = episodes.write([Prompt(0, [1], "Look.", {"word": "ab"})], step=1).groups
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        (tmp_path / "my_agent.py").write_text(AGENT)
        cfg.environment.name, cfg.environment.args, cfg.tools = "endpoint", {"run": "my_agent.run"}, []
        with Episodes(rollouts, pools_of(cfg), cfg) as episodes:
            (by_agent,) = episodes.write([Prompt(0, [1], "Look.", {})], step=1).groups
    finally:
        engine.close()
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    differences = []
    for sample in (*group.samples, *by_agent.samples):
        assert len(sample.rows) == 1 and (len(sample.turns), sample.info["tool_calls"]) in ((4, 4), (2, 0))
        for row in sample.rows:
            logps = logps_of(model, [*row.prompt_ids, *row.token_ids])[len(row.prompt_ids) - 1 :]
            assert row.loss_mask is not None and row.rollout_logps is not None
            mine = [logp for start, end in row.loss_mask for logp in logps[start:end]]
            differences += [abs(a - b) for a, b in zip(mine, row.rollout_logps, strict=True)]
    assert statistics.fmean(differences) <= 1e-5, max(differences)
    packed = scored_by_the_trainer(cfg, tiny_model, [group, by_agent])
    assert len(packed) == len(differences) and statistics.fmean(packed) <= 1e-5, max(packed)


def scored_by_the_trainer(cfg: Config, model: Path, groups: list[Group]) -> list[float]:
    """What the log-probabilities of a first update differ by from vLLM's, of each trained token."""
    cfg.model.path, cfg.model.dtype, cfg.logging.tokens = str(model), "float32", True
    cfg.trainer.steps = cfg.trainer.updates_per_rollout = 1
    for group in groups:
        group.samples[:] = [replace(sample, advantage=1.0) for sample in group.samples]
    trainer = PolicyTrainer(load_policy(cfg.model), None, cfg, Accelerator(cpu=True))
    trainer.train_on(groups, contextlib.nullcontext)
    differences = []
    for values in trainer.tokens:
        written = [logp for row in values.rows for logp in row.rollout_logps or []]
        differences += [abs(a - b) for a, b in zip(values.columns["logps"].tolist(), written, strict=True)]
    return differences
