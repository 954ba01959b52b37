"""Training from Python: `from sapo_rl import train`, in a script or a notebook.

The training runs in processes of its own, as the command line starts them: it leaves no GPU memory and no state behind,
and may be on several GPUs. What belongs to the session, callbacks and the functions of a notebook's cells, runs here.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import hydra
import xxhash
from omegaconf import OmegaConf

from sapo_rl import plugins, run_folder
from sapo_rl.config import Config
from sapo_rl.config.fields import MISSING
from sapo_rl.config.nested import dumps
from sapo_rl.errors import UserError, did_you_mean
from sapo_rl.rewards import RewardFunction, session
from sapo_rl.rewards.lookup import KIND
from sapo_rl.run import compose, earlier, explain, launch
from sapo_rl.run import resume as resuming
from sapo_rl.run.checks import ConfigError
from sapo_rl.run.following import Following
from sapo_rl.run.start import Start, run

if TYPE_CHECKING:
    import pandas as pd

    from sapo_rl.telemetry.metrics import Record

DATASETS = Path("runs/datasets")
"""Where rows that are given as objects are kept, by their content: a resume reads them again."""
OWN_FILE = "python.yaml"
"""Named after it are the runs of a config that has no file."""


class Callback(Protocol):
    """What is told of a run while it goes on; either method may be missing.

    The training does not wait for it: with short steps the next one may have begun.

    Example:
        >>> class Patience:
        ...     best = 0.0
        ...     def on_eval(self, step, metrics):
        ...         worse, self.best = metrics["eval/reward"] < self.best, max(self.best, metrics["eval/reward"])
        ...         return worse  # True ends the run after the step at hand, with a checkpoint
    """

    def on_step(self, step: int, metrics: dict[str, Any]) -> bool | None:
        """Take a step's metrics by name, as they stand in metrics.jsonl; return True to end the run."""
        ...

    def on_eval(self, step: int, metrics: dict[str, Any]) -> bool | None:
        """Take those of an evaluation, `eval/reward` among them; return True to end the run."""
        ...


@dataclass(frozen=True)
class Run:
    """A run in its folder, at its end or still going on.

    Example:
        >>> run = Run(Path("runs/quickstart/latest"))
        >>> run.metrics["eval/reward"].dropna()
        >>> run.completions(30).sort_values("reward")
    """

    folder: Path
    """The run folder."""

    @property
    def metrics(self) -> pd.DataFrame:
        """Return a row for each step, with a column for each metric; steps count from 1, 0 is before the first.

        Raises:
            UserError: the folder has no metrics.
        """
        import pandas as pd

        from sapo_rl.telemetry.metrics import read_metrics

        rows: dict[int, Record] = {}
        for record in read_metrics(self.folder / run_folder.METRICS):
            if "warning" not in record:
                rows.setdefault(record["step"], {}).update(record)
        return pd.DataFrame(rows.values()).set_index("step") if rows else pd.DataFrame()

    def completions(self, step: int) -> pd.DataFrame:
        """Return a row for each completion of a step: prompt, completion, reward, advantage, tokens and more.

        Raises:
            UserError: the run has not made that step.
        """
        return self._completions("step", step)

    def tokens(self, step: int) -> pd.DataFrame:
        """Return a row for each row of a completion that was trained on, with lists of its tokens' numbers.

        `sample` is the place of the completion in `completions(step)`.

        Raises:
            UserError: the run has not made that step, or not with `logging.tokens`.
        """
        return self._completions("tokens", step)

    def eval_completions(self, step: int) -> pd.DataFrame:
        """Return a row for each completion of the held-out prompts after a step; 0 is before the first.

        Raises:
            UserError: the run has not evaluated there.
        """
        return self._completions("eval", step)

    def _completions(self, kind: str, step: int) -> pd.DataFrame:
        import pandas as pd

        from sapo_rl.telemetry.sinks.completions import completions_path

        path = completions_path(self.folder, step, kind)
        if not path.is_file():
            what = {"step": "completions of", "eval": "completions of an evaluation after", "tokens": "tokens of"}[kind]
            raise UserError(f"{self.folder} has no {what} step {step}{' (logging.tokens)' * (kind == 'tokens')}")
        return pd.read_parquet(path)

    @property
    def best(self) -> Path | None:
        """Return the checkpoint with the best evaluation; None where the run keeps none, `checkpoint.keep_best`."""
        link = self.folder / run_folder.CHECKPOINTS / run_folder.BEST
        return link.parent / link.readlink() if link.is_symlink() else None

    @property
    def final(self) -> Path | None:
        """Return the folder of the trained model; None where the run is not complete, or saves none."""
        folder = self.folder / run_folder.FINAL
        return folder if folder.is_dir() else None


def train(
    config: str | Path | Mapping[str, Any] | Config | None = None,
    overrides: Sequence[str] = (),
    *,
    dataset: Iterable[Mapping[str, Any]] | None = None,
    eval_dataset: Iterable[Mapping[str, Any]] | None = None,
    rewards: Sequence[RewardFunction | str] | Mapping[str, RewardFunction | str] = (),
    callbacks: Sequence[Any] = (),
    resume: str | Path | Run | None = None,
) -> Run:
    """Train, and return the run once it has ended: complete, or stopped with a checkpoint.

    Args:
        config: a recipe's name, a YAML file, a mapping with the same content, or a `Config`.
        overrides: as on the command line, such as `trainer.steps=100`; they win over everything else.
        dataset: rows to train on, such as a `datasets.Dataset`, in place of the config's; JSON must know their values.
        eval_dataset: rows to hold out for evaluations, in place of some of `dataset`.
        rewards: reward functions in place of the config's: functions `f(completions, prompts, **columns)`, names of
            built-ins, or dotted paths; a mapping names them, else each goes by its own name. Weights and other settings
            are overrides: `reward.functions.NAME.weight=0.5`. A function that can be imported runs in processes that
            can be killed; one of a notebook's cell, or of the script, in a thread of this process, which cannot.
        callbacks: see `Callback`; told in this thread. What one raises ends the run after its step, and is raised here.
        resume: a run to go on with, from its last checkpoint, in place of `config`.

    Raises:
        UserError: what the command line would refuse, in the same words.
        RuntimeError: the training failed; its traceback has been printed.

    Example:
        >>> def short(completions, **columns):
        ...     return [-len(text) / 100 for text in completions]
        >>> run = train("quickstart", ["trainer.steps=5"], rewards=["numeric_answer", short])
        >>> run.metrics["reward/mean"]
    """
    launch.check_variables(os.environ)
    if "RANK" in os.environ:
        raise UserError("train() starts its own processes: call it without a launcher, with launch=ddp in overrides")
    named = _by_name(rewards)
    with tempfile.TemporaryDirectory() as scratch:
        argv = [*_source(config, resume, Path(scratch)), *_data(dataset, eval_dataset)]
        if resume is None:
            argv += [setting for name, one in named.items() for setting in _as_overrides(name, one)]
        ready, checked, frozen = _accepted([*argv, *overrides], [] if resume else list(named), scratch)
        start = Start(_recipe(ready), list(ready.argv), ready.files)
        with session.SessionFunctions(_own_functions(checked, named)) as variables:
            following = Following(start, callbacks)
            start.variables, start.follow = variables | _quiet(), following
            code = 0
            try:
                run(checked, frozen, start)
            except subprocess.CalledProcessError as error:
                code = error.returncode
            except ConfigError as error:
                raise UserError(explain.explain(error, ready)) from error
    following.end(code)
    assert start.folder is not None
    return Run(start.folder)


def _quiet() -> dict[str, str]:
    """What keeps a notebook's output plain: its kernel asks programs for colours, but shows no moving display."""
    return {} if sys.stdout.isatty() else {"TTY_COMPATIBLE": "0"}


def _accepted(given: list[str], functions: list[str], scratch: str) -> tuple[compose.Arguments, Config, str]:
    """Compose and check as the command line does, with these reward functions alone where there are any."""
    ready = compose.Arguments(given)
    if f"resume={earlier.AUTO}" in given:
        raise UserError("resume=auto is for the command line")
    try:
        ready = compose.register(given)
        with hydra.initialize_config_dir(str(compose.CONFIGS), version_base="1.3"):
            composed = hydra.compose("train", overrides=ready.argv)
        config, frozen = compose.accept(composed, ready, ready.argv, functions)
        for key, asked in (("dry_run", config.dry_run), ("check", config.check != "none")):
            if asked:
                raise ConfigError(key, "is for the command line")
        if config.launch.num_machines > 1:
            raise ConfigError("launch.num_machines", "several machines are for the command line")
        if config.resume:
            resuming.plan(config, frozen)
    except Exception as error:
        text = explain.explain(error, ready)
        raise UserError(text.replace(str(Path(scratch, OWN_FILE)), "config")) from error
    return ready, config, frozen


def _recipe(ready: compose.Arguments) -> str:
    """The name that the run folder goes under."""
    names = [argument.partition("=")[2] for argument in ready.argv if argument.startswith("config=")]
    return names[-1] if names else "default"


def _source(config: Any, resumed: Any, scratch: Path) -> list[str]:
    """The argument that chooses a recipe, a file or a run; what has no file gets one in `scratch`."""
    if (config is None) == (resumed is None):
        raise UserError("train() takes either config or resume")
    if resumed is not None:
        return [f"resume={resumed.folder if isinstance(resumed, Run) else resumed}"]
    if isinstance(config, str | Path):
        return [f"config={config}"]
    if isinstance(config, Config):
        config = OmegaConf.to_container(OmegaConf.structured(config))
    if not isinstance(config, Mapping):
        raise UserError(f"config: is a {type(config).__name__}, must be a name, a path, a mapping or a Config")
    file = scratch / OWN_FILE
    file.write_text(dumps(_plain(config)), encoding="utf-8")
    return [f"config={file}"]


def _plain(node: Any) -> Any:
    """The same in what YAML knows; a value that must be given is left out."""
    if isinstance(node, Mapping):
        return {str(key): _plain(value) for key, value in node.items() if value != MISSING}
    if isinstance(node, list | tuple):
        return [_plain(value) for value in node]
    return str(node) if isinstance(node, Path) else node


def _data(rows: Iterable[Mapping[str, Any]] | None, held_out: Iterable[Mapping[str, Any]] | None) -> list[str]:
    if rows is None and held_out is None:
        return []
    if rows is None:
        raise UserError("eval_dataset needs dataset: rows of other sources are held out by data.eval_path")
    found = ["data=file", f"data.path={earlier.quoted(_kept('dataset', rows))}"]
    return found if held_out is None else [*found, f"data.eval_path={earlier.quoted(_kept('eval_dataset', held_out))}"]


def _kept(name: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write rows into a file that is named by their content; return its path."""
    lines = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise UserError(f"{name}: row {number} is a {type(row).__name__}, must be a mapping of columns to values")
        for key, value in row.items():
            try:
                json.dumps({key: value}, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise UserError(f"{name}: row {number}, column '{key}' is nothing that JSON knows: {error}") from error
        lines.append(json.dumps(dict(row)))
    text = "".join(f"{line}\n" for line in lines)
    path = DATASETS.absolute() / f"{xxhash.xxh3_128_hexdigest(text.encode())}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    run_folder.write_atomic(path, text)
    return str(path)


def _by_name(rewards: Sequence[Any] | Mapping[str, Any]) -> dict[str, RewardFunction | str]:
    """Name the functions that have no name yet."""
    if isinstance(rewards, Mapping):
        named = dict(rewards)
    else:
        named = {}
        for one in [rewards] if isinstance(rewards, str) or callable(rewards) else rewards:
            name = one.rpartition(".")[2] if isinstance(one, str) else getattr(one, "__name__", type(one).__name__)
            name = "reward" if name == "<lambda>" else name
            if name in named:
                raise UserError(f"rewards: two are called '{name}'; name them: rewards={{'a': ..., 'b': ...}}")
            named[name] = one
    for name, one in named.items():
        if not isinstance(one, str) and not callable(one):
            raise UserError(f"rewards: '{name}' is a {type(one).__name__}, must be a function, a name or a dotted path")
    return named


def _as_overrides(name: str, function: RewardFunction | str) -> list[str]:
    """What makes a reward function known to the config."""
    key = f"+reward.functions.{name}"
    if isinstance(function, str):
        return [f"{key}.function={function}"]
    dotted = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
    if _is_importable(dotted, function):
        return [f"{key}.function={dotted}"]
    return [f"{key}.function={session.path_to(function)}", f"{key}.args.session_function={name}"]


def _is_importable(dotted: str, function: RewardFunction) -> bool:
    """Whether a worker that imports the dotted path gets the same function."""
    if dotted.startswith("__main__.") or dotted.count(".") < 1 or "<" in dotted:
        return False
    with contextlib.suppress(UserError):
        plugins.check(KIND, dotted)
        return plugins.find(KIND, dotted) is function
    return False


def _own_functions(config: Config, named: Mapping[str, RewardFunction | str]) -> dict[str, RewardFunction]:
    """The functions of this session that the config calls. Raises UserError where one is not given."""
    found = {}
    for name, one in config.reward.functions.items():
        if session.is_path(one.function):
            function = named.get(name)
            if function is None or isinstance(function, str):
                raise UserError(
                    f"reward.functions.{name}: is a function of the Python session that started the run; give it "
                    f"again, as rewards={{'{name}': ...}}; {did_you_mean(name, named)}"
                )
            found[name] = function
    return found
