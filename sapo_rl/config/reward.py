"""The schema of reward functions; docs/rewards.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from sapo_rl.config.fields import LONGEST_WAIT, MISSING, choice, number

BATCH = "batch"
"""The scope of reward functions that are called on a whole batch."""

VERL = "verl"
"""The style of reward functions that are called as verl does it."""


@dataclass
class RewardFunctionConfig:
    """One reward function.

    Example:
        '+reward.functions.brief={function: length_limit, weight: 0.1, args: {max_tokens: 400}}'
    """

    function: str = MISSING
    """A built-in's name, or the dotted path of your own `f(completions, prompts, **columns)`: `package.module.name`."""
    weight: float = 1.0
    """Factor in the weighted sum of rewards; 0 logs the reward without training on it."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments passed to the function at every call."""
    style: str = choice("trl", "trl", VERL)
    """How it is called: with lists, for all samples of a prompt, as TRL does it (`trl`), or once for each sample as
    verl's `compute_score(data_source, solution_str, ground_truth, extra_info)` (`verl`); docs/rewards.md."""
    scope: str = choice("sample", "sample", "group", BATCH)
    """What its result for a sample depends on: that sample alone (`sample`), all samples of its prompt, which it is
    called with and which fail together (`group`), or all samples of this rank in a step, once they are all there
    (`batch`)."""
    timeout: float = number(30.0, above=0, most=LONGEST_WAIT)
    """Seconds that one sample may take, or one call where `scope` is not `sample`; then the call is ended, if need be
    with its worker, and has failed."""
    on_error: str = choice("raise", "raise", "zero", "none")
    """A failed sample ends the run with its text (`raise`), or is counted, and either scores 0 (`zero`) or leaves its
    group as if it had not been written (`none`)."""
    retries: int = number(0, least=0, most=100)
    """How often a failed call is made again before it counts, after pauses of 1, 2, 4 ... seconds, 60 at most: for
    what asks a server."""
    concurrency: Optional[int] = number(None, least=1)
    """Calls of it that a worker has under way at once; null takes 64 for an `async def`, as many as there are
    processors for `code`, and 1 for any other function, which cannot have more."""


@dataclass
class RewardConfig:
    """How completions are scored."""

    functions: dict[str, RewardFunctionConfig] = field(default_factory=dict)
    """Reward functions by the name under which they are logged."""
    workers: int = number(1, least=1)
    """Processes that score in parallel, for each rank."""
    start_timeout: float = number(120.0, above=0, most=LONGEST_WAIT)
    """Seconds that importing one function may take; then it is tried once more in a fresh process."""
    env: list[str] = field(default_factory=list)
    """Environment variables named like a key, token or password that functions and environments see nevertheless:
    `[JUDGE_API_KEY]`."""


def key_of(name: str) -> str:
    """Return the key of a reward function in the config; one of a set of evaluations goes by its key anyhow."""
    return name if name.startswith("eval.") else f"reward.functions.{name}"
