"""The command line up to the moment a run would start: what it accepts, what it refuses, and in which words."""

from __future__ import annotations

import copy
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import command
import hydra
import inside
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from inside import in_folder as sapo_train
from omegaconf import DictConfig, OmegaConf
from report_made import write_run
from tiny import make_stand_in

from sapo_rl.config.nested import dumps
from sapo_rl.errors import UserError
from sapo_rl.paths import CONFIGS
from sapo_rl.run import keys
from sapo_rl.run.compose import Arguments, accept, loads, register
from sapo_rl.run.explain import explain

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that passes for a model as long as nobody loads it."""
    return make_stand_in(tmp_path / "model")


def composed(*arguments: str, cwd: Path) -> dict:
    result = sapo_train(*arguments, "--cfg", "job", cwd=cwd)
    assert result.returncode == 0, result.stderr
    return yaml.safe_load(result.stdout)


def test_bare_command_prints_usage_and_every_recipe(tmp_path: Path) -> None:
    result = command.sapo_train(cwd=tmp_path)
    assert result.returncode == 0
    assert "sapo-train config=NAME" in result.stdout
    for recipe in (ROOT / "configs" / "config").glob("*.yaml"):
        description = yaml.safe_load(recipe.read_text())["description"]
        assert any(recipe.stem in line and description in line for line in result.stdout.splitlines())
    assert list(tmp_path.iterdir()) == []


def test_a_current_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = ["sh", "-c", 'rmdir "$PWD"; "$@"', "sh", sys.executable, "-m", "sapo_rl", "config=quickstart"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=gone, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "") and len(result.stderr.splitlines()) == 1, result.stderr
    assert "the current folder does not exist any more" in result.stderr


def test_help_is_ours_wherever_it_stands(tmp_path: Path) -> None:
    shown = sapo_train("config=quickstart", "--help", cwd=tmp_path).stdout
    assert shown == sapo_train(cwd=tmp_path).stdout


def test_every_key_is_told_with_its_default_range_and_meaning(tmp_path: Path) -> None:
    composed_defaults = composed("config=default", "--resolve", cwd=tmp_path)
    told = {key.name: key for key in keys.every_key()}
    for name, key in told.items():
        assert key.meaning and "\n" not in key.meaning, name
        if "NAME" in name or name == "description":
            continue
        value = composed_defaults
        for part in name.split("."):
            value = value[part]
        assert value == (json.loads(key.default) if key.default else "???"), name
    assert told["loss.tau_pos"].valid == "above 0" and told["rollout.top_p"].valid == "at least 1e-06, at most 1"
    assert told["seed"].valid == "at least 0, at most 4294967295"
    assert told["data.source"].valid.startswith("one of arithmetic, reasoning_gym")
    assert told["model.revision"].type == "str or null"
    shown = sapo_train("keys", "loss.tau_n", "reward.functions.NAME.timeout", cwd=tmp_path, COLUMNS="120").stdout
    assert [line for line in shown.splitlines() if not line.startswith(" ")] == [
        "loss.tau_neg: float, above 0; default 1.05",
        "reward.functions.NAME.timeout: float, above 0, at most 1e+06; default 30.0",
    ]
    unknown = sapo_train("keys", "loss.tau_ngg", cwd=tmp_path)
    assert unknown.returncode == 2 and "no key 'loss.tau_ngg'; did you mean 'tau_neg'?" in unknown.stderr


def test_recipe_beats_group_defaults_and_the_command_line_beats_the_recipe(tmp_path: Path) -> None:
    config = composed("config=quickstart", "trainer.steps=3", cwd=tmp_path)
    recipe = yaml.safe_load((ROOT / "configs/config/quickstart.yaml").read_text())
    assert config["trainer"]["learning_rate"] == float(recipe["trainer"]["learning_rate"])
    assert config["trainer"]["steps"] == 3
    assert config["loss"]["gradient"] == "paper"


def test_flags_may_stand_between_overrides(tmp_path: Path) -> None:
    assert composed("config=quickstart", "--resolve", "trainer.steps=7", cwd=tmp_path)["trainer"]["steps"] == 7


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("model.path", "model.path (command line): '~nosuch/x' cannot be read: Could not determine home directory"),
        ("data.path", "data.path (command line): '~nosuch/x' has an unknown ending; valid: .jsonl"),
        ("run_dir", "run_dir (command line): '~nosuch/x' is not empty"),
    ],
)
def test_a_home_that_does_not_exist_is_told_with_its_key(tmp_path: Path, model: Path, key: str, told: str) -> None:
    if key == "run_dir":
        (tmp_path / "~nosuch/x").mkdir(parents=True)
        (tmp_path / "~nosuch/x/file").touch()
    (tmp_path / "mine.yaml").write_text(f"defaults: [quickstart, _self_]\nmodel: {{path: {model}}}\n")
    others = ["data.source=file"] if key == "data.path" else []
    result = sapo_train("config=mine.yaml", f"{key}='~nosuch/x'", *others, cwd=tmp_path)
    assert result.returncode == 2 and told in result.stderr, result.stderr


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("with_defaults", [True, False])
def test_user_file_by_path(tmp_path: Path, absolute: bool, with_defaults: bool) -> None:
    text = "trainer: {steps: 7}\n"
    if with_defaults:
        text = "defaults:\n  - override /loss: grpo\n  - _self_\n" + text
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    config = composed(f"config={file if absolute else 'mine.yaml'}", cwd=tmp_path)
    assert config["trainer"]["steps"] == 7
    assert config["loss"]["name"] == ("grpo" if with_defaults else "sapo")


def test_user_file_with_the_name_of_a_recipe_is_the_users(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("trainer: {steps: 77}\n")
    assert composed("config=./quickstart.yaml", cwd=tmp_path)["trainer"]["steps"] == 77


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("2024.yaml", "_2024"),
        ("null.yaml", "_null"),
        ("t\u00efny.yaml", "_t_ny"),
        ("a=b.yaml", "_a_b"),
        ("a,b.yaml", "_a_b"),
        ("it's mine.yaml", "_it_s_mine"),
        ("two words.yaml", "two words"),
        ("a =dir/7b.v2.yaml", "7b.v2"),
    ],
)
def test_files_and_folders_may_have_any_name(tmp_path: Path, name: str, recipe: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("trainer: {steps: 7}\n")
    ready = register([f"config={file}"])
    assert ready.files == {recipe: file} and ready.argv == [f"config={recipe}"]
    assert sapo_train(f"config={name}", "--cfg", "job", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("name", ["t\u00efny", "a=b", "it's, [mine]"])
def test_a_run_folder_of_any_name_is_resumed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.yaml").write_text("trainer: {steps: 7}\n")
    config = composed(f"resume={name}", cwd=tmp_path)
    assert (config["resume"], config["trainer"]["steps"]) == (name, 7)


def test_a_resume_goes_to_the_real_folder_of_a_link_and_to_the_newest_run_of_a_recipe(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "runs/x" / name).mkdir(parents=True)
        (tmp_path / "runs/x" / name / "config.yaml").write_text("trainer: {steps: 7}\n")
    (tmp_path / "runs/x/latest").symlink_to("b")
    for named in ("runs/x/latest", "runs/x"):  # `latest` moves on while the run trains
        assert composed(f"resume={named}", cwd=tmp_path)["resume"] == "runs/x/b"
    assert composed(f"resume={tmp_path}/runs/x", cwd=tmp_path)["resume"] == f"{tmp_path}/runs/x/b"
    assert composed("resume=runs/x/a", cwd=tmp_path)["resume"] == "runs/x/a"


def test_local_models_and_files_are_frozen_by_their_real_and_whole_paths(tmp_path: Path, model: Path) -> None:
    (tmp_path / "latest").symlink_to("model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "1"}\n')
    (tmp_path / "blob").write_text('{"prompt": "a", "answer": "1"}\n')
    (tmp_path / "link.jsonl").symlink_to("blob")
    files = ("data=file", "data.path=rows.jsonl", "data.eval_path=link.jsonl")
    own = ("config=quickstart", "model.path=latest", "data.args={}")
    shown = sapo_train(*own, *files, "dry_run=true", cwd=tmp_path, COLUMNS="500")
    assert shown.returncode == 0, shown.stderr
    for words in (f"path: {model}\n", f"path: {tmp_path}/rows.jsonl\n", f"eval_path: {tmp_path}/link.jsonl\n"):
        assert words in shown.stdout
    (tmp_path / "chain_sum").mkdir()
    shown = sapo_train("config=chain_sum", f"model.path={model}", "dry_run=true", cwd=tmp_path)
    assert "path: chain_sum\n" in shown.stdout, shown.stderr


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: [1", b"7", b"- 1"])
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    result = sapo_train(f"resume={tmp_path}", "--cfg", "job", cwd=tmp_path)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert f"{tmp_path}/config.yaml" in result.stderr


def test_a_tracker_that_is_not_installed_is_named_with_what_installs_it(tmp_path: Path) -> None:
    (tmp_path / "trackio").mkdir()  # a folder of the name is no package
    code = (
        "import sys; from importlib.machinery import PathFinder; from sapo_rl.run.cli import main\n"
        "find = PathFinder.find_spec\n"
        "def hide(name, path=None, target=None): return find(name, ['.'] if name == 'trackio' else path, target)\n"
        "PathFinder.find_spec = hide\n"
        "main(['config=quickstart', 'logging.trackers=[trackio]', 'dry_run=true'])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    told = "sapo-train: logging.trackers (command line): trackio is not installed: pip install 'sapo-train[trackio]'"
    assert result.returncode == 2 and told in result.stderr, result.stderr


def test_composing_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from sapo_rl.run.cli import main\n"
        "try: main(['config=quickstart', 'model.path=nowhere'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'vllm', 'accelerate', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "model.path" in result.stderr


BAD = {
    "misspelt key": (["loss.tau_ngg=1"], ["loss.tau_ngg", "command line", "tau_neg"]),
    "misspelt group": (["los.tau_neg=1"], ["los", "loss"]),
    "wrong type": (["loss.tau_neg=abc"], ["loss.tau_neg", "abc", "command line"]),
    "wrong bool": (["reproducible=perhaps"], ["reproducible", "perhaps"]),
    "value of another kind in a new environment": (
        ["+environments.sums.args=3"],
        ["environments.sums (command line)", "a value of the wrong kind", "sapo-train keys environments"],
    ),
    "value of another kind in a new reward function": (
        ["+reward.functions.mine.args=3"],
        ["reward.functions.mine (command line)", "sapo-train keys reward.functions"],
    ),
    "section set as a whole": (
        ["environment=null"],
        ["environment (command line)", "has keys of its own", "environment.name, environment.args"],
    ),
    "nested section set as a whole": (
        ["rollout.refill=3"],
        ["rollout.refill (command line)", "rollout.refill.max_extra"],
    ),
    "name in a list": (["+trainer.betas.y=overlap"], ["trainer.betas", "(command line)"]),
    "mapping of one's own set as a whole": (["environments=3"], ["environments (command line)", "names of your own"]),
    "null where there must be a value": (["seed=null"], ["seed (command line): cannot be null"]),
    "secret in plain text": (["+reward.functions.correct.args.api_key=abc123"], ["api_key", "oc.env"]),
    "one value for a list": (
        ["logging.trackers=wandb"],
        ["logging.trackers (command line): must be a list, in brackets: logging.trackers=[...]"],
    ),
    "unknown loss group": (["loss=sappo"], ["loss", "sappo", "sapo"]),
    "secret in a list": (["+reward.functions.correct.args.api_keys=[abc123]"], ["args.api_keys", "oc.env"]),
    "secret of digits": (["+reward.functions.correct.args.password=123"], ["args.password", "oc.env"]),
    "setting of another loss": (
        ["loss=grpo", "loss.tau_pos=3"],
        ["loss.tau_pos (command line): is 3.0; grpo does not use it, sapo would; grpo has loss.clip_high, "],
    ),
    "budget of a loss without a gate": (
        ["loss=grpo", "loss.tau_target_kl=0.1"],
        ["loss.tau_target_kl", "grpo does not"],
    ),
    "threshold of no width": (["loss=m2po", "loss.m2_threshold=0"], ["loss.m2_threshold", "above 0"]),
    "negative budget": (["loss=cppo", "loss.prefix_budget=-1"], ["loss.prefix_budget", "at least 0"]),
    "floor above the first weight": (["loss=cppo", "loss.weight_floor=2"], ["loss.weight_floor", "at most 1"]),
    "budget of another loss": (
        ["loss=m2po", "loss.prefix_budget=1"],
        ["loss.prefix_budget", "m2po does not use it, cppo would"],
    ),
    "args of a built-in loss": (
        ["+loss.args.tau_pos=3"],
        ["loss.args", "sapo does not use it, a loss of your own would", "loss.tau_pos"],
    ),
    "args of built-in advantages": (["+advantage.args.eps=3"], ["advantage.args", "for a function of your own"]),
    "key of the recipe with plus": (["+loss.m2_threshold=1"], ["+loss.m2_threshold (command line)", "leave out the +"]),
    "flag of another trainer": (
        ["--learning_rate", "1e-6"],
        ["--learning_rate (command line): no such flag", "key=value", "did you mean trainer.learning_rate?"],
    ),
    "key taken out that has another value": (
        ["~loss.prefix_budget=1"],
        ["~loss.prefix_budget (command line): cannot be taken out", "is 0.02 and not 1"],
    ),
    "group with plus": (["+loss=m2po"], ["+loss (command line): loss is there already; leave out the +"]),
    "misspelt key with plus": (["+loss.kl.coeff=0.1"], ["loss.kl.coeff", "coef"]),
    "unknown section with plus": (["+my.own.key=3"], ["my", "valid"]),
    "infinite": (["trainer.learning_rate=inf"], ["trainer.learning_rate", "finite"]),
    "not a number": (["reward.functions.correct.weight=nan"], ["reward.functions.correct.weight", "finite"]),
    "new reward without plus": (["reward.functions.mine.function=a.b"], ["functions.mine", "+reward.functions.mine"]),
    "misspelt key of a reward": (["reward.functions.correct.weigth=2"], ["correct.weigth", "weight"]),
    "several calls of a plain reward at once": (
        ["+reward.functions.correct.concurrency=4"],
        ["reward.functions.correct.concurrency", "is 4", "async def", "reward.workers"],
    ),
    "unknown recipe": (["config=quickstrat"], ["quickstrat", "quickstart"]),
    "missing recipe file": (["config=nowhere.yaml"], ["nowhere.yaml"]),
    "missing model": (["model.path=./nowhere"], ["model.path", "nowhere"]),
    "resume of nothing": (["resume=runs/none"], ["resume", "runs/none"]),
    "bad syntax": (["trainer.steps=[1"], ["trainer.steps"]),
    "unknown flag": (["--multi-run"], ["--multi-run", "--hydra-help"]),
    "eval set without data": (["eval.sets=[gsm8]"], ["eval.sets.gsm8", "no data", "did you mean 'gsm8k'"]),
    "eval set that is no mapping": (["eval.sets.gsm8k=5"], ["eval.sets.gsm8k", "is 5"]),
    "eval set of an unknown key": (["eval.sets.gsm8k.data.pth=x"], ["eval.sets.gsm8k.data.pth", "'path'"]),
    "eval set of an unknown kind": (["eval.sets.gsm8k.samples=x"], ["eval.sets.gsm8k.samples", "Integer"]),
    "eval set of a name that is taken": (["eval.sets.rewards.data.path=a/b"], ["eval.sets.rewards", "is taken"]),
    "best by a metric of another set": (
        ["eval.sets=[gsm8k]", "eval.sets.gsm8k.samples=4", "checkpoint.keep_best=eval/math500/avg@4"],
        ["keep_best", "unknown metric 'eval/math500/avg@4'", "'eval/gsm8k/avg@4'"],
    ),
    "eval set of an unknown reward": (["eval.sets.gsm8k.reward=x"], ["eval.sets.gsm8k.reward", "valid: correct"]),
    "eval set of an unknown function": (
        ["eval.sets.gsm8k.functions.correct.function=numric_answer"],
        ["eval.sets.gsm8k.functions.correct.function", "did you mean 'numeric_answer'"],
    ),
    "eval set of an unknown gym dataset": (
        ["eval.sets=[reasoning_gym/chain_summ]"],
        ["eval.sets.reasoning_gym/chain_summ.data.path", "chain_sum"],
    ),
    "eval set of a missing file": (["eval.sets.mine.data.path=none.jsonl"], ["eval.sets.mine.data.path", "none.jsonl"]),
    "eval set without a column": (
        ["eval.sets.gsm8k.data.template=Go"],
        ["eval.sets.gsm8k.data.template", "no column"],
    ),
    "eval set of no temperature": (["eval.sets.gsm8k.temperature=0"], ["eval.sets.gsm8k.temperature", "0.01"]),
    "absurd count": (["rollout.top_k=99999999999999999999"], ["rollout.top_k", "at most 2147483647"]),
    "argument that is filled in": (
        ["+data.chat_template_args.add_generation_prompt=false"],
        ["data.chat_template_args", "add_generation_prompt"],
    ),
}
RULES = {
    "tau of zero": (["loss.tau_pos=0"], ["loss.tau_pos", "above 0", "command line"]),
    "dual clip with both sides": (["loss.dual_clip=3"], ["loss.dual_clip", "loss.sides=one"]),
    "one detached side": (["loss.sides=one", "loss.gradient=detached"], ["loss.sides", "loss.gradient=paper"]),
    "tau order": (["loss.tau_neg=0.9"], ["loss.tau_neg", "strict_temperatures"]),
    "group of one": (["rollout.group_size=1"], ["rollout.group_size", "at least 2"]),
    "refill before the rewards are known": (
        ["rollout.refill.max_extra=1", "reward.functions.correct.scope=batch"],
        ["rollout.refill.max_extra", "is 1", "reward.functions.correct.scope is batch"],
    ),
    "batch that the group does not divide": (["rollout.batch_size=60"], ["rollout.batch_size", "group_size", "64"]),
    "more parts than prompts": (
        ["trainer.updates_per_rollout=16", "trainer.mini_batches=16"],
        ["trainer.mini_batches", "8 prompts"],
    ),
    "parts that do not divide the updates": (["trainer.mini_batches=3"], ["trainer.mini_batches", "divide"]),
    "unknown loss": (["loss.name=sappo"], ["loss.name", "sapo"]),
    "unknown tracker": (
        ["logging.trackers=[tensorbord]"],
        ["logging.trackers (command line): unknown tracker 'tensorbord'; did you mean 'tensorboard'?", "your own"],
    ),
    "tracker of no module": (["logging.trackers=[absent.Mine]"], ["logging.trackers", "no module 'absent'"]),
    "tracker named twice": (["logging.trackers=[wandb,wandb]"], ["logging.trackers", "names a tracker twice"]),
    "mode of W&B that is not asked for": (
        ["logging.trackers=[]", "logging.wandb=offline"],
        ["logging.wandb (command line): is offline, but wandb is not in logging.trackers"],
    ),
    "loss of no module": (["loss.name=absent_losses.Mine"], ["loss.name", "command line", "no module 'absent_losses'"]),
    "loss that its module lacks": (["loss.name=sapo_rl.losses.sapo.SAPOLos"], ["loss.name", "no 'SAPOLos'", "SAPOPo"]),
    "loss without a module": (["loss.name=.Mine"], ["loss.name", "'.Mine' is no dotted path"]),
    "unknown reward": (["reward.functions.correct.function=numeric_anser"], ["numeric_anser", "numeric_answer"]),
    "secret that is not there": (["reward.env=[NO_SUCH_KEY]"], ["reward.env", "NO_SUCH_KEY"]),
    "setting of another loss by name": (["loss.name=gspo", "loss.ratio_level=sequence"], ["loss.dual_clip"]),
    "setting of a loss without any": (
        ["loss.name=vespo", "loss.clip_low=0.1"],
        ["loss.clip_low", "vespo does not use it, grpo, gspo", "vespo has no settings of its own"],
    ),
    "budget of nothing": (["loss.tau_target_kl=0"], ["loss.tau_target_kl", "must be above 0, or null"]),
    "budget of a gate that is none": (
        ["loss.tau_target_kl=0.01", "loss.gradient=detached"],
        ["loss.tau_target_kl", "needs loss.name=sapo and loss.gradient=paper; they are sapo and detached"],
    ),
    "budget of a loss of ones own": (
        ["loss.name=sapo_rl.losses.sapo.SAPOPolicyLossFn", "loss.tau_target_kl=0.01"],
        ["loss.tau_target_kl", "needs loss.name=sapo"],
    ),
    "advantages of no module": (["advantage.name=absent.f"], ["advantage.name", "no module 'absent'"]),
    "adapters of no rank, sent alone": (
        ["model.lora.sync=adapter"],
        ["model.lora.sync (command line): 'adapter' needs model.lora.rank above 0"],
    ),
    "unknown reward module": (["reward.functions.correct.function=no_such_module.f"], ["no_such_module"]),
    "unknown source": (["data.source=arithmetics"], ["data.source", "arithmetic"]),
    "missing file": (["data.source=file", "data.path=none.jsonl"], ["none.jsonl"]),
    "unknown gym dataset": (["data.source=reasoning_gym", "data.path=chain_summ"], ["chain_summ", "chain_sum"]),
    "unknown aggregation": (["loss.loss_agg_mode=token-meen"], ["loss.loss_agg_mode", "token-mean"]),
    "old log-probs without log-probs": (["loss.old_logps=rollout"], ["loss.old_logps", "rollout.logprobs"]),
    "decoupled without correction": (["loss.old_logps=decoupled"], ["loss.old_logps", "loss.correction.mode"]),
    "correction without log-probs": (["loss.correction.mode=token_mask"], ["loss.correction.mode", "rollout.logprobs"]),
    "old log-probs that are filtered": (
        ["loss.old_logps=rollout", "rollout.logprobs=true", "rollout.top_p=0.9", "rollout.top_k=20"],
        ["loss.old_logps", "rollout.top_p=0.9, rollout.top_k=20", "decoupled"],
    ),
    "penalty that nothing corrects": (
        ["rollout.repetition_penalty=1.1", "rollout.logprobs=true", "loss.correction.mode=sequence_mask"],
        ["rollout.repetition_penalty", "is 1.1", "loss.correction.mode=token_truncate"],
    ),
    "eval of an unknown reward": (["eval.reward=corect"], ["eval.reward", "correct"]),
    "temperature that vLLM refuses": (["rollout.temperature=2.5"], ["rollout.temperature", "at most 2"]),
    "temperature that vLLM raises": (["rollout.temperature=0.001"], ["rollout.temperature", "at least 0.01"]),
    "group that vLLM refuses": (
        ["rollout.group_size=16400", "rollout.batch_size=131200"],
        ["rollout.group_size", "at most 16384"],
    ),
    "eval that measures nothing": (["eval.greedy=false"], ["eval.samples", "is 0, with eval.greedy=false"]),
    "best by an unknown metric": (["checkpoint.keep_best=eval/rewart"], ["keep_best", "did you mean 'eval/reward'"]),
    "best by a length": (["checkpoint.keep_best=eval/mean_length"], ["keep_best", "valid: eval/reward"]),
    "best without evaluations": (["checkpoint.keep_best=eval/reward", "eval.prompts=0"], ["keep_best", "eval.prompts"]),
    "more samples than vLLM writes": (["eval.samples=20000"], ["eval.samples", "at most 16384"]),
    "negative top_k": (["rollout.top_k=-1"], ["rollout.top_k", "at least 0"]),
    "top_p above 1": (["rollout.top_p=1.5"], ["rollout.top_p", "at most 1"]),
    "negative min_p": (["rollout.min_p=-0.1"], ["rollout.min_p", "at least 0"]),
    "no repetition penalty": (["rollout.repetition_penalty=0"], ["rollout.repetition_penalty", "at least 0.01"]),
    "absurd penalty": (["rollout.repetition_penalty=1e300"], ["rollout.repetition_penalty", "at most 100"]),
    "top_p that float32 takes for 0": (["rollout.top_p=1e-300"], ["rollout.top_p", "at least 1e-06"]),
    "negative seed": (["seed=-1"], ["seed", "at least 0"]),
    "seed that NumPy refuses": (["seed=4294967296"], ["seed", "at most 4294967295"]),
    "wait without end": (["rollout.timeout=1e12"], ["rollout.timeout", "at most"]),
    "negative steps": (["trainer.steps=-1"], ["trainer.steps", "at least 1"]),
}


def test_what_comes_from_the_environment_stays_a_reference_under_every_key(tmp_path: Path, model: Path) -> None:
    written = {
        "key": "${oc.env:MINE}",
        "wandb_token": "${oc.env:MINE}",
        "headers": {"Authorization": "Bearer ${oc.env:MINE}"},
        "url": "https://me:${oc.env:MINE}@host",
        "many": ["plain", "${oc.env:MINE}"],
        "again": "${description}",
        "decoded": "${oc.decode:${oc.env:MINE}}",
        "absent": "${oc.env:ABSENT,}",
    }
    (tmp_path / "my_rewards.py").write_text("def f(completions, **columns): ...\n")
    own = {"description": "${oc.env:MINE}", "trainer": {"steps": "${oc.decode:${oc.env:MY_STEPS}}"}}
    own["reward"] = {"functions": {"f": {"function": "my_rewards.f", "args": written}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"defaults": ["quickstart", "_self_"], **own}))
    arguments = ("config=mine.yaml", f"model.path={model}")
    shown = sapo_train(*arguments, "dry_run=true", cwd=tmp_path, MINE="4711", MY_STEPS="7", COLUMNS="200")
    assert shown.returncode == 0, shown.stderr
    assert "4711" not in shown.stdout + shown.stderr
    for value in ("${oc.env:MINE}", "Bearer ${oc.env:MINE}", "https://me:${oc.env:MINE}@host", "'${oc.env:MINE}']"):
        assert value in shown.stdout
    assert "steps: 7" in shown.stdout and "num_processes: 1" in shown.stdout


def test_off_without_quotes_is_told_from_false(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [quickstart]\nlogging: {wandb: off}\n")
    result = sapo_train("config=mine.yaml", "dry_run=true", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("sapo-train: logging.wandb") and 'write "off"' in result.stderr


@pytest.mark.parametrize("case", BAD)
def test_bad_config_ends_in_two_lines_and_code_2(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    overrides, words = BAD[case]
    given = [] if any(o.startswith(("model.path", "resume")) for o in overrides) else [f"model.path={model}"]
    recipe = [] if any(o.startswith(("config=", "resume")) for o in overrides) else ["config=quickstart"]
    monkeypatch.chdir(tmp_path)
    code, _, told = inside.sapo_train(*recipe, *given, *overrides)
    assert code == 2, told
    lines = told.strip().splitlines()
    assert 1 <= len(lines) <= 2 and "Traceback" not in told, told
    for word in words:
        assert word in told
    assert not (tmp_path / "runs").exists()


@functools.cache
def quickstart() -> DictConfig:
    """What Hydra makes of the recipe alone."""
    with inside.kept_apart(), hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose("train", overrides=register(["config=quickstart"]).argv)


@pytest.mark.parametrize("case", RULES)
def test_keys_that_a_rule_refuses_are_told_with_what_is_valid(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    overrides, words = RULES[case]
    argv = ["config=quickstart", f"model.path={model}", *overrides]
    monkeypatch.chdir(tmp_path)
    composed = copy.deepcopy(quickstart())
    for one in OverridesParser.create().parse_overrides(argv[1:]):
        OmegaConf.update(composed, one.key_or_group, one.value())
    with pytest.raises(UserError) as refused:
        accept(composed, Arguments(argv), argv)
    told = explain(refused.value, Arguments(argv))
    assert len(told.splitlines()) <= 2 and all(word in told for word in words), told


def test_a_text_that_looks_like_a_number_is_frozen_as_a_text(model: Path) -> None:
    composed = copy.deepcopy(quickstart())
    composed.model.path, composed.model.revision = str(model), "7e1234567"  # the beginning of a commit's hash
    config, frozen = accept(composed, Arguments([]), [])
    assert config.model.revision == loads(frozen).model.revision == "7e1234567"


@example("a\x85b")
@given(st.text("-+.0123456789_:eExobnaif~", min_size=1) | st.text(st.characters(), min_size=1))
def test_every_text_is_read_back_from_a_frozen_config(text: str) -> None:
    assert OmegaConf.to_container(OmegaConf.create(dumps({text: text}))) == {text: text}


def test_mistake_in_a_users_file_names_the_file(tmp_path: Path, model: Path) -> None:
    file = tmp_path / "mine.yaml"
    for text, words in {
        "loss: {tau_negg: 1}\n": ["loss.tau_negg", "tau_neg"],
        "loss: {tau_neg: -1}\n": ["loss.tau_neg", "above 0"],
        "trainer: {steps: many}\n": ["trainer.steps", "many"],
    }.items():
        file.write_text(text)
        groups = ("data=arithmetic", "reward=numeric", f"model.path={model}")
        result = sapo_train("config=mine.yaml", *groups, cwd=tmp_path)
        assert result.returncode == 2
        assert len(result.stderr.strip().splitlines()) <= 2, result.stderr
        assert all(word in result.stderr for word in [*words, "mine"]), result.stderr


def test_dry_run_shows_config_batches_and_memory_and_leaves_nothing(tmp_path: Path, model: Path) -> None:
    result = sapo_train("config=quickstart", f"model.path={model}", "dry_run=true", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for words in ("tau_neg: 1.05", "64 = 8 prompts x 8", "memory"):
        assert words in result.stdout
    assert not (tmp_path / "runs").exists()


def test_the_recipe_of_a_judge_asks_for_its_address_and_its_name(tmp_path: Path, model: Path) -> None:
    given = [f"reward.functions.quality.args.{name}" for name in ("url=http://127.0.0.1:1/v1", "model=mine")]
    command = ("config=judge", f"model.path={model}", "dry_run=true")
    for count, absent in enumerate(("url", "model")):
        result = sapo_train(*command, *given[:count], cwd=tmp_path)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert (
            result.stderr.startswith(f"sapo-train: reward.functions.quality.args.{absent} (")
            and "must be given" in result.stderr
        )
    result = sapo_train(*command, *given, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "prompt, thing, listener" in result.stdout and "{thing}" in result.stdout


@pytest.mark.parametrize("command", [["dry_run=true"], []])
def test_a_model_whose_files_are_not_those_of_a_model_is_refused_at_once(
    tmp_path: Path, model: Path, command: list[str]
) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs\noid sha256:00\nsize 1000\n")
    result = sapo_train("config=quickstart", f"model.path={model}", *command, cwd=tmp_path)
    assert result.returncode == 2
    told = f"sapo-train: model.path (command line): {model}/model.safetensors is a Git LFS pointer"
    assert result.stderr.startswith(told) and "git lfs pull" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_completion_offers_recipes(tmp_path: Path) -> None:
    line = "sapo-train config=quick"
    environment = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_CWORD": "1"}
    result = command.sapo_train("-sc", "query=bash", cwd=tmp_path, **environment)
    assert "config=quickstart" in result.stdout.split()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "abc"}, ["RANK is 'abc'", "whole number"]),
        ({"WORLD_SIZE": "x"}, ["WORLD_SIZE is 'x'"]),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "-1"}, ["LOCAL_WORLD_SIZE is '-1'"]),
        ({"RANK": "1"}, ["RANK is 1", "WORLD_SIZE is 1"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE is 2", "without RANK"]),
    ],
)
def test_variables_that_no_launcher_has_set_are_named(
    tmp_path: Path, model: Path, variables: dict[str, str], words: list[str]
) -> None:
    result = sapo_train("config=quickstart", f"model.path={model}", cwd=tmp_path, **variables)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert all(word in result.stderr for word in [*words, "unset"])


@pytest.mark.parametrize(
    ("imported", "module", "code"), [("hydra", "sapo_rl", 130), ("torch", "sapo_rl.run.rank", -signal.SIGINT)]
)
def test_ctrl_c_in_the_first_seconds_is_quiet(tmp_path: Path, imported: str, module: str, code: int) -> None:
    (tmp_path / f"{imported}.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", module, "config=quickstart"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (code, "", "")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [("main", ["--help"]), ("main", ["config=quickstart", "--cfg", "job"]), ("report", ["run"]), ("explain", [])],
)
def test_a_reader_that_goes_away_is_no_error(tmp_path: Path, command: str, arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    write_run(tmp_path / "run", [0.1])
    code = f"from sapo_rl.__main__ import {command}; {command}()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    asked = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(asked, env=environment, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert result.returncode == (1 if command == "report" else 141) and result.stderr == b""  # rich exits with 1


@pytest.mark.parametrize("argument", ["dry_run=true", "-m"])
def test_what_needs_no_ranks_is_refused_under_a_launcher(tmp_path: Path, argument: str) -> None:
    result = sapo_train("config=quickstart", argument, cwd=tmp_path, RANK="0", WORLD_SIZE="2")
    assert result.returncode == 2
    assert argument.partition("=")[0] in result.stderr and "without a launcher" in result.stderr
    assert "Traceback" not in result.stderr


OWN_LOSS_CLASS = """
from dataclasses import dataclass
from sapo_rl.losses import CISPOPolicyLossFn

@dataclass
class Soft(CISPOPolicyLossFn):
    neg_high: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        if self.neg_high > 1:
            raise ValueError("neg_high must be at most 1")

class Bare(CISPOPolicyLossFn):
    neg_high: float = 0.2
"""
OWN_SETTINGS = {
    "loss.args.neg_high=0.3": "",
    "+loss.args.clip_low=0.3": "",
    "loss.args.clip_low=0.3": "",
    "loss.args.neg_hihg=0.3": "loss.args.neg_hihg: unknown argument; did you mean 'neg_high'? valid: clip_high, ",
    "loss.args.neg_high=high": "loss.args.neg_high: 'high' is a str, must be float",
    "loss.args.neg_high=2": "loss.args: 'own_cispo.Soft' refuses its settings: neg_high must be at most 1",
    "+loss.args.loss_agg_mode=token-mean": "loss.args.loss_agg_mode: unknown argument",
    "loss.name=own_cispo.Bare": "loss.args.neg_high: is no field yet; write @dataclass above the class Bare",
    "loss.name=cispo": "loss.args (mine.yaml): is {'neg_high': 0.1}; cispo does not use it, a loss of your own would; ",
}


@pytest.mark.parametrize("argument", OWN_SETTINGS)
def test_a_loss_of_ones_own_has_settings_of_its_own(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, argument: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_cispo", raising=False)
    (tmp_path / "own_cispo.py").write_text(OWN_LOSS_CLASS)
    (tmp_path / "mine.yaml").write_text("loss: {name: own_cispo.Soft, args: {neg_high: 0.1}}")
    own = ("config=mine.yaml", "data=arithmetic", "reward=numeric", f"model.path={model}", "dry_run=true")
    code, out, told = inside.sapo_train(*own, argument)
    problem = OWN_SETTINGS[argument]
    assert code == (2 if problem else 0) and problem in told, told
    assert code or argument.partition("args.")[2].replace("=", ": ") in out


OWN_LOSS = "loss: {name: gspo, clip_low: 3e-4, tau_pos: 2.0}\n"


def test_a_choice_on_the_command_line_beats_what_a_recipe_sets_of_its_group(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(OWN_LOSS)
    loss = composed("config=mine.yaml", "loss=grpo", "loss.clip_high=0.28", cwd=tmp_path)["loss"]
    assert (loss["name"], loss["clip_low"], loss["clip_high"], loss["tau_pos"]) == ("grpo", 0.2, 0.28, 2.0)
    frozen = tmp_path / "run"
    frozen.mkdir()
    (frozen / "config.yaml").write_text(OWN_LOSS)
    resumed = composed(f"resume={frozen}", "loss=grpo", "launch=ddp", cwd=tmp_path)
    assert (resumed["loss"]["name"], resumed["launch"]["profile"]) == ("grpo", "ddp")


@pytest.mark.parametrize("arguments", [["loss=grpo"], ["loss=grpo", "rollout.group_size=4,8", "-m"]])
def test_a_choice_of_loss_puts_back_what_the_recipe_sets_for_another_one(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("loss: {tau_pos: 4, tau_neg: 4.2, log_ratio_clamp: 5}")
    own = ("config=mine.yaml", "data=arithmetic", "reward=numeric", f"model.path={model}", "dry_run=true")
    code, out, told = inside.sapo_train(*own, *arguments)
    assert code == 0 and "tau_pos: 1.0" in out and "tau_neg: 1.05" in out and "log_ratio_clamp: 5.0" in out, told


def test_a_sweep_over_choices_that_the_recipe_hides_is_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "mine.yaml").write_text(OWN_LOSS)
    own = ("config=mine.yaml", "data=arithmetic", "reward=numeric", f"model.path={model}")
    result = sapo_train(*own, "loss=sapo,grpo", "-m", "dry_run=true", cwd=tmp_path)
    assert result.returncode == 2
    assert "loss.name (mine.yaml): hides what loss=sapo sets it to, sapo" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("+advantage.args.scale=2", ""),
        ("+advantage.args.scael=2", "advantage.args.scael: unknown argument; did you mean 'scale'? valid: scale"),
    ],
)
def test_an_advantage_of_ones_own_is_held_to_its_signature(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, argument: str, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_median", raising=False)
    (tmp_path / "own_median.py").write_text("def centred(rewards, scale: float = 1): return [0.0 for _ in rewards]\n")
    own = ("config=default", "data=arithmetic", "reward=numeric", f"model.path={model}", "dry_run=true")
    code, out, told = inside.sapo_train(*own, "loss=grpo", "advantage.name=own_median.centred", argument)
    assert code == (2 if problem else 0) and problem in told and "own_median.centred" in out, told


LOSS_GROUPS = {
    "sapo": ("sapo", 0.2, 0.2, "seq-mean-token-mean", "group"),
    "sapo_one_side": ("sapo", 0.2, 0.2, "seq-mean-token-mean", "group"),
    "grpo": ("grpo", 0.2, 0.2, "seq-mean-token-mean", "group"),
    "dapo": ("grpo", 0.2, 0.28, "token-mean", "group"),
    "dr_grpo": ("grpo", 0.2, 0.2, "seq-mean-token-sum-norm", "none"),
    "gspo": ("gspo", 3e-4, 4e-4, "seq-mean-token-mean", "group"),
    "cispo": ("cispo", 1.0, 0.2, "token-mean", "group"),
    "reinforce": ("reinforce", 0.2, 0.2, "seq-mean-token-mean", "group"),
    "dppo": ("dppo", 0.2, 0.2, "seq-mean-token-mean", "group"),
    "dppo_kl": ("dppo_kl", 0.05, 0.05, "seq-mean-token-mean", "group"),
    "vespo": ("vespo", 0.2, 0.2, "seq-mean-token-mean", "group"),
    "gmpo": ("gmpo", 0.4, 0.4, "seq-mean-token-mean", "group"),
    "m2po": ("m2po", 0.2, 0.2, "token-mean", "group"),
    "cppo": ("cppo", 0.15, 0.15, "seq-mean-token-mean", "group"),
}


def test_every_loss_is_a_group_that_beats_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {file.stem for file in (ROOT / "configs" / "loss").glob("*.yaml")} == set(LOSS_GROUPS)
    (tmp_path / "mine.yaml").write_text("{loss: {loss_agg_mode: seq-mean-token-sum}, advantage: {scale: batch}}")
    for group, (name, low, high, mode, scale) in LOSS_GROUPS.items():
        recipes = {"mine.yaml": "batch"}
        if group in ("grpo", "dr_grpo"):  # one that leaves the scale, and one that sets it
            recipes["default"] = "group"
        for recipe, theirs in recipes.items():
            code, out, told = inside.sapo_train(f"config={recipe}", f"loss={group}", "--cfg", "job")
            assert code == 0, told
            loss, advantage = yaml.safe_load(out)["loss"], yaml.safe_load(out)["advantage"]
            found = (loss["name"], loss["clip_low"], loss["clip_high"], loss["loss_agg_mode"], advantage["scale"])
            assert found == (name, low, high, mode, "none" if scale == "none" else theirs), (recipe, group)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("learning_rate=1e-6", "trainer.learning_rate"),
        ("num_generations=8", "rollout.group_size"),
        ("trainer.lr=1e-6", "trainer.learning_rate"),
        ("loss.kl_coef=0.1", "loss.kl.coef"),
        ("beta=0.04", "loss.kl.coef"),
        ("rollout.max_tokens=64", "environment.max_tokens or rollout.max_completion_tokens"),
    ],
)
def test_keys_of_other_programs_and_of_other_sections_are_pointed_to_ours(
    tmp_path: Path, typed: str, meant: str
) -> None:
    result = sapo_train("config=quickstart", typed, cwd=tmp_path)
    assert result.returncode == 2
    assert f"no such key; did you mean {meant}?" in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["config=quickstart", "loss=gspoo"], "loss: no choice 'gspoo'; did you mean 'gspo'? valid: cispo, cppo, dapo"),
        (["config=quickstart", "model=Qwen/Qwen3-0.6B"], "model: no choice 'Qwen/Qwen3-0.6B'; valid: smollm2-135m"),
        (["config=quickstart", "model=Qwen/Qwen3-0.6B"], "your own is model.path="),
        (["again.yaml"], "'again.yaml' (command line): write config=again.yaml"),
        (["config=again.yaml"], "config: again.yaml: in `defaults`, name a recipe alone: [quickstart, _self_]"),
        (["config=over.yaml"], "config: over.yaml: in `defaults`, name a recipe alone: [quickstart, _self_]"),
    ],
)
def test_what_is_meant_is_told(tmp_path: Path, arguments: list[str], told: str) -> None:
    (tmp_path / "again.yaml").write_text("defaults: [{/config: quickstart}]\n")
    (tmp_path / "over.yaml").write_text("defaults:\n- override /config: quickstart\n")
    result = sapo_train(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert told in result.stderr and "Traceback" not in result.stderr, result.stderr
