"""From rewards to group-relative advantages: pure functions on ragged lists, in float64; or the user's function.

Axes: P prompts, G samples of a prompt (may differ between prompts), R reward functions. None marks a reward that does
not apply to a sample; such rewards are left out of every sum, mean and standard deviation.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from sapo_rl import plugins
from sapo_rl.config import RewardFunctionConfig
from sapo_rl.config.loss import AdvantageConfig
from sapo_rl.errors import UserError, described
from sapo_rl.types import Batch, Group

OwnFunction: TypeAlias = Callable[..., Any]
"""`f(rewards_G, **args) -> advantages_G`: weighted rewards of one group, None where none applies, to a float each."""

SCALES = ("group", "batch", "none")
"""What deviations from the baseline are divided by."""
BASELINES = ("mean", "leave_one_out")
"""What is subtracted from a reward."""
COMBINES = ("sum", "normalize")
"""Whether several rewards are summed before or after they are normalised."""
SPREAD_TOLERANCE = 1e-9
"""Rewards that differ by no more than this share of the largest count as equal: sums of floats are not exact."""


def advantages(
    rewards_P_G_R: list[list[list[float | None]]],
    weights_R: list[float],
    *,
    scale: str = "group",
    baseline: str = "mean",
    combine: str = "sum",
    eps: float = 1e-6,
    batch_P_G_R: list[list[list[float | None]]] | None = None,
) -> tuple[list[list[float | None]], list[list[float]]]:
    """Return each sample's weighted reward (None where no function applies) and its advantage (0 there).

    With b the baseline of the group (its mean, or for each sample the mean of the others) and d the Bessel-corrected
    standard deviation of the group or of the batch, an advantage is (R - b) / (d + eps), or R - b for `scale="none"`
    (SAPO, equations 1-2, without eps). A group whose rewards are all equal, or with fewer than two of them, gets
    exactly 0.

    `combine="sum"` does so to the weighted sum of the rewards; `combine="normalize"` does so to each reward function
    on its own and adds up the results by weight, so that no function drowns another by its spread (GDPO, without that
    paper's final division of the whole batch by one number).

    Args:
        rewards_P_G_R: rewards of each sample by each function.
        weights_R: weight of each function.
        scale: `group`, `batch` or `none`.
        baseline: `mean` or `leave_one_out`.
        combine: `sum` or `normalize`.
        eps: added to the standard deviation.
        batch_P_G_R: the rewards of all ranks, over which `scale="batch"` takes its deviation; None takes
            `rewards_P_G_R`.

    Raises:
        ValueError: an unknown option, rewards that do not match the weights, or a reward that is not finite.
    """
    options = (("scale", scale, SCALES), ("baseline", baseline, BASELINES), ("combine", combine, COMBINES))
    for option, value, valid in options:
        if value not in valid:
            raise ValueError(f"unknown {option} '{value}'; valid: {', '.join(valid)}")
    rewards_P_G = _weighted_sums(rewards_P_G_R, weights_R)
    batch = rewards_P_G_R if batch_P_G_R is None else batch_P_G_R
    if combine == "sum":
        terms = [(1.0, rewards_P_G, _weighted_sums(batch, weights_R))]
    else:
        terms = [(weight, _column(rewards_P_G_R, r), _column(batch, r)) for r, weight in enumerate(weights_R)]
    totals_P_G = [[0.0] * len(group) for group in rewards_P_G]
    for weight, term_PG, batch_PG in terms:
        batch_std = _std([value for group in batch_PG for value in group if value is not None])
        for total_G, term_G in zip(totals_P_G, term_PG, strict=True):
            for g, value in enumerate(_normalised(term_G, scale, baseline, eps, batch_std)):
                total_G[g] += weight * value
    return rewards_P_G, totals_P_G


def zero_spread(values_P_G: list[list[float | None]] | list[list[float]]) -> list[bool]:
    """Return for each group whether its values are all equal, up to a relative 1e-9, or fewer than two are given.

    Under `combine="normalize"`, where equal sums of rewards may hide unequal rewards, pass the advantages to learn
    which groups have no gradient; under `combine="sum"` rewards and advantages agree.
    """
    return [_is_flat([value for value in group if value is not None]) for group in values_P_G]


def has_spread(
    group: Group, functions: dict[str, RewardFunctionConfig], combine: str = "sum", least: float = 0.0
) -> bool:
    """Return whether a scored group's samples differ by more than `least` in what they earn, and so teach something.

    With `combine="normalize"` it is enough that they differ in the weighted reward of one function.
    """
    values_G_R = [[sample.rewards[name] for name in functions] for sample in group.samples]
    weights_R = [function.weight for function in functions.values()]
    if combine == "sum":
        terms = _weighted_sums([values_G_R], weights_R)
    else:
        terms = [_weighted_sums([[[one[r]] for one in values_G_R]], [weight])[0] for r, weight in enumerate(weights_R)]
    found = [[value for value in term_G if value is not None] for term_G in terms]
    return any(not _is_flat(known) and max(known) - min(known) > least for known in found)


def _is_flat(values: list[float]) -> bool:
    if len(values) < 2:
        return True
    return max(values) - min(values) <= SPREAD_TOLERANCE * max(abs(value) for value in values)


def _weighted_sums(rewards_P_G_R: list[list[list[float | None]]], weights_R: list[float]) -> list[list[float | None]]:
    return [
        [_weighted_sum(rewards_R, weights_R, f"sample {g} of prompt {p}") for g, rewards_R in enumerate(rewards_GR)]
        for p, rewards_GR in enumerate(rewards_P_G_R)
    ]


def _weighted_sum(rewards_R: list[float | None], weights_R: list[float], where: str) -> float | None:
    if len(rewards_R) != len(weights_R):
        raise ValueError(f"{where} has {len(rewards_R)} reward(s) for {len(weights_R)} weights")
    parts = [weight * reward for reward, weight in zip(rewards_R, weights_R, strict=True) if reward is not None]
    if not all(math.isfinite(part) for part in parts):
        raise ValueError(f"rewards must be finite; {where} has {rewards_R}")
    return math.fsum(parts) if parts else None


def _column(rewards_P_G_R: list[list[list[float | None]]], r: int) -> list[list[float | None]]:
    return [[rewards_R[r] for rewards_R in rewards_GR] for rewards_GR in rewards_P_G_R]


def _normalised(rewards_G: list[float | None], scale: str, baseline: str, eps: float, batch_std: float) -> list[float]:
    """Return one group's deviations from the baseline over the scale; 0 for None and for groups without spread."""
    known = [reward for reward in rewards_G if reward is not None]
    if _is_flat(known):
        return [0.0] * len(rewards_G)
    mean = _mean(known)
    # r - mean of the others = (r - mean of all) n / (n - 1)
    factor = len(known) / (len(known) - 1) if baseline == "leave_one_out" else 1.0
    divisor = {"group": _std(known) + eps, "batch": batch_std + eps, "none": 1.0}[scale]
    return [0.0 if reward is None else (reward - mean) / divisor * factor for reward in rewards_G]


def _mean(values: list[float]) -> float:
    return math.fsum(value / len(values) for value in values)  # divided first: the sum of huge rewards would overflow


def _std(values: list[float]) -> float:
    """Return the Bessel-corrected standard deviation; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return math.hypot(*(value - mean for value in values)) / math.sqrt(len(values) - 1)  # squares could overflow


def own_function(settings: AdvantageConfig) -> OwnFunction | None:
    """Return the user's function that `settings` name, held to its signature; None for the built-in.

    Raises:
        UserError: it cannot be imported, is no function of one group's rewards, or does not take `args`.
    """
    if "." not in settings.name:
        return None
    try:
        found = plugins.find("advantage function", settings.name)
        if not callable(found) or isinstance(found, type):
            raise UserError(f"'{settings.name}' is a {type(found).__name__}, not a function")
    except UserError as error:
        raise UserError(f"advantage.name: {error}") from error
    parameters = list(plugins.parameters_of(found).values())
    if not parameters or parameters[0].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
        raise UserError(f"advantage.name: '{settings.name}' must take a group's rewards first: f(rewards, **args)")
    plugins.check_arguments("advantage.args", found, settings.args, parameters[1:])
    return found


def own_advantages(
    rewards_G: list[float | None], function: OwnFunction, name: str, args: dict[str, Any]
) -> list[float]:
    """Return what the user's `function` makes of one group's rewards, checked; zeros where no reward applies at all.

    Raises:
        UserError: naming the function: it failed, or returned something else than one finite number a sample.
    """
    if all(reward is None for reward in rewards_G):
        return [0.0] * len(rewards_G)
    try:
        returned = function(list(rewards_G), **args)
    except Exception as error:  # the user's function may raise anything
        raise UserError(f"advantage.name: '{name}' failed on the rewards {rewards_G}: {described(error)}") from error
    try:
        numbers = [float(value) for value in returned if not isinstance(value, str)]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != len(rewards_G) or not all(map(math.isfinite, numbers)):
        raise UserError(
            f"advantage.name: '{name}' must return {len(rewards_G)} finite numbers, one a sample; for the rewards "
            f"{rewards_G} it returned {returned!r}"
        )
    return numbers


def with_advantages(
    batch: Batch,
    functions: dict[str, RewardFunctionConfig],
    settings: AdvantageConfig,
    gather: Callable[[list[Any]], list[Any]],
) -> Batch:
    """Return the batch with each sample's weighted reward, and its advantage within the group.

    Args:
        batch: this rank's, scored by all `functions`. The deviation of `scale="batch"` is that of its own groups, which
            holds for replayed ones, too.
        functions: the reward functions by name.
        settings: how rewards become advantages.
        gather: joins a list over the ranks; called only for `scale="batch"`.

    Raises:
        UserError: a function of the user's own failed or returned what cannot be.
    """
    whole = gather(_values(batch.groups, functions)) if settings.scale == "batch" and "." not in settings.name else None
    earlier = _judged([one.group for one in batch.replayed.values()], functions, settings, whole)
    pairs = zip(batch.replayed.items(), earlier, strict=True)
    return replace(
        batch,
        groups=_judged(batch.groups, functions, settings, whole),
        replayed={place: one._replace(group=group) for (place, one), group in pairs},
    )


def _values(groups: Sequence[Group], functions: dict[str, RewardFunctionConfig]) -> list[list[list[float | None]]]:
    return [[[sample.rewards[name] for name in functions] for sample in group.samples] for group in groups]


def _judged(
    groups: Sequence[Group],
    functions: dict[str, RewardFunctionConfig],
    settings: AdvantageConfig,
    batch_P_G_R: list[list[list[float | None]]] | None,
) -> list[Group]:
    """Return groups with rewards and advantages; `batch_P_G_R` are the rewards of all ranks for `scale="batch"`."""
    values_P_G_R, weights_R = _values(groups, functions), [function.weight for function in functions.values()]
    own = own_function(settings)
    if own:
        rewards_P_G = _weighted_sums(values_P_G_R, weights_R)
        advantages_P_G = [own_advantages(rewards_G, own, settings.name, settings.args) for rewards_G in rewards_P_G]
    else:
        rewards_P_G, advantages_P_G = advantages(
            values_P_G_R,
            weights_R,
            scale=settings.scale,
            baseline=settings.baseline,
            combine=settings.combine,
            eps=settings.eps,
            batch_P_G_R=batch_P_G_R,
        )
    return [_with_advantages(*triple) for triple in zip(groups, rewards_P_G, advantages_P_G, strict=True)]


def _with_advantages(group: Group, rewards_G: list[float | None], advantages_G: list[float]) -> Group:
    triples = zip(group.samples, rewards_G, advantages_G, strict=True)
    return replace(group, samples=[replace(one, reward=reward, advantage=own) for one, reward, own in triples])
