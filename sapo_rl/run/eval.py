"""`sapo-eval`: models and checkpoints measured on sets of held-out prompts, without a training. Imports no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from sapo_rl import run_folder
from sapo_rl.config import Config
from sapo_rl.errors import PROGRAM, UserError
from sapo_rl.processes import streams
from sapo_rl.run import compose, eval_sets, explain, launch, packaged, subjects
from sapo_rl.run.earlier import recipe_of
from sapo_rl.run.start import Start, run
from sapo_rl.run.subjects import Subject

USAGE = """\
sapo-eval: measure models and checkpoints on sets of held-out prompts

  sapo-eval model=PATH config=NAME|FILE.yaml [key=value ...]    on the held-out prompts and the sets of a recipe
  sapo-eval model=runs/NAME                                     a run's final model, by the run's own config
  sapo-eval model=runs/NAME/latest/checkpoints                  all its checkpoints, in one start of vLLM
  sapo-eval model=PATH,PATH,'PATH/*'                            several models
  sapo-eval model=PATH eval.sets=[gsm8k,math500]                sets by name alone
  sapo-eval model=PATH eval.sets=[gsm8k] eval.sets.gsm8k.samples=8
  sapo-eval ... dry_run=true                                    show what would happen, and stop
  sapo-eval ... launch=ddp launch.num_processes=8               on eight GPUs
  sapo-eval ... run_dir=PATH                                    where the results shall be (else evals/NAME/<time>)

PATH is a run, a checkpoint, a folder with a Hugging Face model, or its name on the hub. docs/evaluation.md

sets: """

NOTHING = "eval.sets: names no set; e.g. eval.sets=[gsm8k,math500], or config=NAME to measure on its own data"
FORCED = ("rollout.servers=[]", "rollout.mode=sync", "rollout.sleep='0'", "rollout.gpu_memory_utilization=0.9")
"""What differs from a training unless it is typed: no trainer is beside the engines."""
BARE = (
    "data=arithmetic",
    "reward=numeric",
    "eval.prompts=0",
    "data.max_prompt_tokens=1024",
    "rollout.max_completion_tokens=2048",
)
"""What stands for a training where no recipe is given: only sets are measured."""


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    config: Config
    """That of the first model."""
    frozen: str
    """The same as YAML."""
    files: dict[str, Path]
    """The user's own files by recipe name."""
    name: str
    """Of the results' folder."""
    models: list[Subject]
    whole: str
    """The models as JSON, each with its whole section `model`."""


def usage() -> str:
    """Return the usage, and the names of the shipped sets."""
    return USAGE + ", ".join(eval_sets.shipped_names())


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the arguments say. Exit code 2 means: correct your input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(usage())
        return
    os.environ[PROGRAM] = "sapo-eval"
    try:
        _refuse(arguments)
        found = plan(arguments)
        if found.config.dry_run:
            from sapo_rl.run.preview import preview_evaluation

            preview_evaluation(found.config, found.frozen, [one.path for one in found.models])
            return
        for one in found.models:
            packaged.require(one.path)
        streams.outlive()
        run(found.config, found.frozen, Start(found.name, arguments, found.files, models=found.whole))
    except UserError as error:
        print(f"sapo-eval: {error}", file=sys.stderr)
        sys.exit(2)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode if error.returncode > 0 else 128 - error.returncode)


def _refuse(arguments: Sequence[str]) -> None:
    """Raise UserError where an argument is for a training alone."""
    launch.check_variables(os.environ)
    if "RANK" in os.environ:
        raise UserError("sapo-eval starts its own processes: call it without a launcher, with launch=ddp")
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if key in ("resume", "fork", "step", "check"):
            raise UserError(f"{key} (command line): is for sapo-train; leave it out")
        if not equals and not argument.startswith("~"):
            raise UserError(f"'{argument}' (command line) cannot be read as key=value; see sapo-eval --help")


def plan(arguments: Sequence[str]) -> Plan:
    """Return what the arguments ask for, composed and checked.

    Raises:
        UserError: a model that is not there, nothing to measure, or what cannot be composed.
    """
    named = [argument.partition("=")[2] for argument in arguments if argument.startswith("model=")]
    typed = [argument for argument in arguments if not argument.startswith("model=")]
    models = subjects.subjects_of(named)
    recipe, name = _recipe(typed, models)
    accepted: dict[tuple[str, ...], tuple[Config, str, dict[str, Path]]] = {}
    for one in models or [Subject("")]:
        key = tuple(one.overrides)
        if key not in accepted:
            accepted[key] = _accepted([*recipe, *FORCED, *key, *typed])
    config, frozen, files = next(iter(accepted.values()))
    models = models or [subjects.subject_at(config.model.path)]
    if not config.eval.prompts and not config.eval.sets:
        raise UserError(NOTHING)
    sections = [accepted[tuple(one.overrides)][0].model if named else config.model for one in models]
    return Plan(config, frozen, files, name, models, subjects.dumps(models, sections))


def _recipe(typed: Sequence[str], models: Sequence[Subject]) -> tuple[list[str], str]:
    """The arguments that choose the config, where none is typed, and the name of the results' folder."""
    if given := [argument.partition("=")[2] for argument in typed if argument.startswith("config=")]:
        return [], Path(given[-1]).stem
    run_of = next((one.run for one in models if one.run), None)
    if run_of is not None:
        return [f"config={Path(run_of) / run_folder.CONFIG}"], recipe_of(Path(run_of))
    if not models:
        raise UserError("model= or config= must be given; see sapo-eval --help")
    if not any("eval.sets" in argument for argument in typed):
        raise UserError(NOTHING)
    return list(BARE), Path(models[0].path).name


def _accepted(argv: list[str]) -> tuple[Config, str, dict[str, Path]]:
    ready = compose.Arguments(argv)
    try:
        ready = compose.register(argv)
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(compose.CONFIGS)):
            composed = hydra.compose("train", overrides=ready.argv)
        if launch.shards(composed.launch.profile):  # nothing is trained: no weights to shard
            composed.launch.profile = "ddp"
        config, frozen = compose.accept(composed, ready, ready.argv, training=False)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        raise UserError(explain.explain(error, ready)) from error
    return config, frozen, ready.files


if __name__ == "__main__":
    main()
