"""The sets of held-out prompts of a config: who judges them, how they are answered, and their prompts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from sapo_rl.config import ENVIRONMENT, Config, RewardFunctionConfig
from sapo_rl.config.evaluation import EvalDataConfig, EvalSampling
from sapo_rl.data import build_prompts, load_set
from sapo_rl.engines.base import Sampling
from sapo_rl.environments import environment_for
from sapo_rl.environments.runner.pool import EnvironmentPool
from sapo_rl.errors import UserError
from sapo_rl.evaluation.scores import ks_of
from sapo_rl.rewards import RewardPool
from sapo_rl.rewards.registry import voter_of
from sapo_rl.rollout.collector import sampling_of
from sapo_rl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_SET = "default"
"""The name of the prompts that are held out of the training's data."""
OWN_KEYS = [field.name for field in fields(EvalDataConfig)]


@dataclass(frozen=True)
class Jury:
    """Who scores the replies to a set."""

    functions: dict[str, str]
    """The reward functions' own names by those under which a pool of functions knows them."""
    judge: str
    """The reward of which the mean is told, by its own name; empty where only an environment can give one."""
    compares: bool
    """Whether that is a function which compares the samples of a prompt."""
    further: dict[str, RewardFunctionConfig]
    """What a pool needs for it beside the functions of the training."""
    voter: str
    """That of `further` which numbers the answers of a prompt's samples for `maj@k`; empty where there is none."""


def settings_of(config: Config) -> Mapping[str, EvalSampling]:
    """Return how each set is measured, that of the training's own data first."""
    return ({DEFAULT_SET: config.eval} if config.eval.prompts else {}) | dict(config.eval.sets)


def jury(config: Config, name: str) -> Jury:
    """Return who scores the replies to the set of that name."""
    settings, key = settings_of(config)[name], key_of(name)
    own = config.eval.sets[name].functions if name in config.eval.sets else {}
    further = {f"{key}.functions.{one}": function for one, function in own.items()}
    names = dict(zip(further, own, strict=True)) or {one: one for one in config.reward.functions}
    judge = settings.reward or next(iter(own), config.judge)
    called = (own or config.reward.functions).get(judge.partition("/")[0])
    voter = voter_of(called) if called and settings.samples > 1 else None
    compares = called is not None and called.scope == "group"
    return Jury(
        names, judge, compares, further | ({f"{key}.votes": voter} if voter else {}), f"{key}.votes" if voter else ""
    )


def further_functions(config: Config) -> dict[str, RewardFunctionConfig]:
    """Return what evaluations call beside the training's reward functions, by their name in the pool."""
    return {name: one for each in settings_of(config) for name, one in jury(config, each).further.items()}


def key_of(name: str) -> str:
    """Return where a set stands in the config."""
    return "eval" if name == DEFAULT_SET else f"eval.sets.{name}"


def prefix_of(name: str) -> str:
    """Return what the names of a set's metrics begin with."""
    return "eval/" if name == DEFAULT_SET else f"eval/{name}/"


def judges_of(config: Config, members: Jury) -> list[str]:
    """Return the names under which a set is scored: its functions, and the environment where that gives rewards."""
    return [*members.functions.values(), *([ENVIRONMENT] if ENVIRONMENT in config.rewards else [])]


def goals(config: Config) -> list[str]:
    """Return the metrics of evaluations of which more is better; what functions return beside is not known before."""
    found: list[str] = []
    for name, settings in settings_of(config).items():
        members, k = jury(config, name), settings.samples
        own = ["reward"] if settings.greedy else []
        own += [f"avg@{k}", *(f"pass@{n}" for n in ks_of(k))] if k else []
        own += [f"maj@{k}"] if members.voter else []
        own += [f"environment/{one}" for one in config.environments]
        judges = judges_of(config, members)
        own += [f"rewards/{one}" for one in judges] if len(judges) > 1 else []
        found += [f"{prefix_of(name)}{one}" for one in own]
    return found


@dataclass(frozen=True)
class EvalSet:
    """A set that can be measured."""

    name: str
    prompts: list[Prompt]
    settings: EvalSampling
    sampling: Sampling
    """Of its samples."""
    jury: Jury
    solved_at: float
    """A sample passes where its reward is at least this."""
    left_out: int = 0
    """Prompts that are longer than is allowed."""


def default_set(config: Config, prompts: list[Prompt]) -> EvalSet:
    """Return the set of the prompts that are held out of the training's data."""
    return _made(config, DEFAULT_SET, prompts)


def named_sets(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[EvalSet]:
    """Read and word the prompts of `eval.sets`.

    Raises:
        UserError: naming the set: its data cannot be read, or its prompts cannot be made.
    """
    found = []
    for name, settings in config.eval.sets.items():
        data = settings.data.beside(config.data)
        with reading_set(name):
            prompts, left_out = build_prompts(load_set(data, settings.prompts), data, tokenizer)
        if config.has_episodes and data.system_prompt != config.data.system_prompt:
            prompts = [_as_chat(prompt, data.system_prompt) for prompt in prompts]
        found.append(_made(config, name, prompts, left_out))
    return found


def check_set(config: Config, one: EvalSet, rewards: RewardPool, environments: Sequence[EnvironmentPool]) -> None:
    """Refuse a set whose columns do not suit those who need them. Raises UserError."""
    source = "the held-out data" if one.name == DEFAULT_SET else f"{key_of(one.name)}.data"
    columns = one.prompts[0].columns  # all have the same
    for prompt in one.prompts:
        environment_for(config, prompt.columns, prompt.index)
    rewards.check_columns(columns, source, list(one.jury.functions))
    for pool in environments:
        pool.check_columns(columns, source)


def set_warnings(sets: Sequence[EvalSet], trained_on: Sequence[Prompt]) -> list[str]:
    """Return what to tell of prompts of sets that are left out, or are trained on too."""
    known = {str(prompt.content) for prompt in trained_on}
    found = []
    for one in sets:
        if one.left_out:
            found.append(
                f"{key_of(one.name)}: {one.left_out} prompts are longer than its max_prompt_tokens: they are left out"
            )
        if seen := sum(str(prompt.content) in known for prompt in one.prompts):
            found.append(f"{key_of(one.name)}: {seen} of its {len(one.prompts)} prompts are trained on too")
    return found


@contextmanager
def reading_set(name: str) -> Iterator[None]:
    """Have errors of a set's data name the set's keys, not those of the training's data."""
    try:
        yield
    except UserError as error:
        own = "|".join(OWN_KEYS)
        text = re.sub(rf"\bdata\.(?=({own})\b)", f"{key_of(name)}.data.", str(error))
        text = text.replace("eval.prompts", f"{key_of(name)}.prompts")
        raise UserError(text if key_of(name) in text else f"{key_of(name)}: {text}") from error


def comparison_warnings(config: Config) -> list[str]:
    """Return what to tell a user whose evaluations are judged by a function that compares the samples of a prompt."""
    return [
        f"{key_of(name)}.reward: {one.judge} is of scope group, and {prefix_of(name)}reward is its mean over single "
        f"replies, which it cannot compare; name another function, or look at {prefix_of(name)}avg@8 with "
        f"{key_of(name)}.samples=8"
        for name, settings in settings_of(config).items()
        if (one := jury(config, name)).compares and settings.greedy
    ]


def _made(config: Config, name: str, prompts: list[Prompt], left_out: int = 0) -> EvalSet:
    settings = settings_of(config)[name]
    solved_at = config.data.pass_rate.solved_at if settings.solved_at is None else settings.solved_at
    return EvalSet(name, prompts, settings, _sampling(config, settings), jury(config, name), solved_at, left_out)


def _sampling(config: Config, settings: EvalSampling) -> Sampling:
    own = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "max_tokens": settings.max_completion_tokens,
        "logprobs": False,
    }
    return replace(sampling_of(config.rollout), **{key: value for key, value in own.items() if value is not None})


def _as_chat(prompt: Prompt, system: str | None) -> Prompt:
    """The same prompt with its own system message in it: an episode would begin with the training's."""
    if not isinstance(prompt.content, str):
        return prompt
    opening = [] if system is None else [{"role": "system", "content": system}]
    return replace(prompt, content=[*opening, {"role": "user", "content": prompt.content}])
