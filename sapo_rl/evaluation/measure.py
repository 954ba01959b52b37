"""A set of held-out prompts answered by the weights that the engines hold, scored, and made into numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sapo_rl.config import ENVIRONMENT, Config
from sapo_rl.engines.base import Sampling
from sapo_rl.errors import SharedError, did_you_mean
from sapo_rl.evaluation.scores import Estimate, estimate, ks_of, majority, pass_at_k
from sapo_rl.evaluation.sets import EvalSet, further_functions, key_of, prefix_of
from sapo_rl.rewards import RewardPool
from sapo_rl.rollout.collector import Writer, greedy_of
from sapo_rl.types import Group, Prompt, Sample, Stop

VOTE = "vote"
"""Where a sample's `info` has the number of its answer."""


@dataclass(frozen=True)
class Answers:
    """What a set's prompts were answered, with rewards under the functions' own names."""

    greedy: list[Group]
    sampled: list[Group]
    """Their samples have the number of their answer in `info`, where answers can be compared."""

    def gathered(self, gather: Callable[[list[Group]], list[Group]]) -> Answers:
        """Return those of all ranks, without prompts of which no sample is left."""
        greedy, sampled = ([one for one in gather(groups) if one.samples] for groups in (self.greedy, self.sampled))
        return Answers(greedy, sampled)


def answers(of: EvalSet, prompts: Sequence[Prompt], step: int, writer: Writer, rewards: RewardPool) -> Answers:
    """Have prompts of a set answered and scored.

    Args:
        of: the set.
        prompts: some of its, this rank's.
        step: of the weights; the seeds of a `reproducible` run depend on it.
        writer: generates.
        rewards: scores; it knows `further_functions` of the config.
    """

    def scored(n: int, sampling: Sampling, names: list[str]) -> list[Group]:
        with rewards.scoring(names) as scoring:
            written = writer.write(prompts, -step, n, scoring.add, sampling).checked()
            return [_renamed(group, of) for group in scoring.result(written.groups).groups]

    names = list(of.jury.functions)
    greedy = scored(1, greedy_of(of.sampling), names) if of.settings.greedy else []
    voters = [of.jury.voter] if of.jury.voter else []
    return Answers(greedy, scored(of.settings.samples, of.sampling, names + voters) if of.settings.samples else [])


def _renamed(group: Group, of: EvalSet) -> Group:
    """The group with rewards under the functions' own names, and the answers' numbers in their place."""

    def own(name: str) -> str:
        called = next((key for key in of.jury.functions if name == key or name.startswith(f"{key}/")), name)
        return of.jury.functions.get(called, called) + name.removeprefix(called)

    def renamed(sample: Sample) -> Sample:
        rewards = {own(name): value for name, value in sample.rewards.items() if name != of.jury.voter}
        info = sample.info | ({VOTE: sample.rewards[of.jury.voter]} if of.jury.voter in sample.rewards else {})
        return replace(sample, rewards=rewards, info=info)

    return replace(group, samples=[renamed(sample) for sample in group.samples])


def check_judge(of: EvalSet, found: Answers) -> None:
    """Raise SharedError where no function returns the number of which a set's reward is the mean."""
    known = dict.fromkeys(name for group in found.greedy + found.sampled for name in group.samples[0].rewards)
    if known and of.jury.judge not in known:
        hint = did_you_mean(of.jury.judge, known)
        raise SharedError(f"{key_of(of.name)}.reward: no function returns '{of.jury.judge}'; {hint}")


def estimates(of: EvalSet, found: Answers) -> dict[str, Estimate]:
    """Return a set's `reward` (greedy), `avg@k`, `pass@k` and `maj@k`, as far as it is measured so."""
    samples = of.settings.samples
    return {
        name: estimate(list(scores.values()), samples if name.startswith("avg@") else 1)
        for name, scores in scores_of(of, found).items()
        if scores
    }


def scores_of(of: EvalSet, found: Answers) -> dict[str, dict[int, float]]:
    """Return what `estimates` are the means of: by name, each prompt's score by its index; none without a reward."""
    judge, samples = of.jury.judge, of.settings.samples
    greedy = {group.prompt.index: group.samples[0].rewards.get(judge) for group in found.greedy}
    scores = {"reward": {index: reward for index, reward in greedy.items() if reward is not None}}
    for group in found.sampled:
        known = [
            (reward, one.info.get(VOTE)) for one in group.samples if (reward := one.rewards.get(judge)) is not None
        ]
        if not known:
            continue
        rewards, votes = zip(*known, strict=True)
        own = {f"avg@{samples}": statistics.fmean(rewards)}
        solved = sum(reward >= of.solved_at for reward in rewards)
        own |= {f"pass@{k}": pass_at_k(len(rewards), solved, min(k, len(rewards))) for k in ks_of(samples)}
        own |= {f"maj@{samples}": majority(votes, rewards)} if of.jury.voter else {}
        for name, score in own.items():
            scores.setdefault(name, {})[group.prompt.index] = score
    return scores


def metrics(of: EvalSet, found: Answers, config: Config) -> dict[str, float]:
    """Return a set's numbers by the names that a run records them under, `eval/<set>/...`."""
    base = found.greedy or found.sampled
    numbers = {name: one.value for name, one in estimates(of, found).items()}
    numbers |= lengths(base)
    for name in config.environments:
        own = [group for group in base if group.prompt.columns[ENVIRONMENT] == name]
        numbers |= _mean(own, of.jury.judge, f"environment/{name}")
    if may_drop(config):
        numbers["dropped"] = float(len(of.prompts) - len(base))
    functions = [*of.jury.functions.values(), *([ENVIRONMENT] if ENVIRONMENT in config.rewards else [])]
    further = dict.fromkeys(name for group in base for name in group.samples[0].rewards if "/" in name)
    for name in [*(functions if len(functions) > 1 else []), *further]:
        numbers |= _mean(base, name, f"rewards/{name}")
    return {f"{prefix_of(of.name)}{name}": number for name, number in numbers.items()}


def may_drop(config: Config) -> bool:
    """Return whether prompts may lose their completions, which is counted then."""
    called = [*config.reward.functions.values(), *further_functions(config).values()]
    return any(one.on_error in ("drop", "none") for one in [*config.played.values(), *called])


def _mean(groups: Sequence[Group], name: str, told_as: str) -> dict[str, float]:
    """The mean of one reward over the samples to which it applies; nothing where it applies to none."""
    values = [sample.rewards.get(name) for group in groups for sample in group.samples]
    known = [value for value in values if value is not None]
    return {told_as: statistics.fmean(known)} if known else {}


def lengths(groups: Sequence[Group]) -> dict[str, float]:
    """Return `mean_length`, the tokens that the model wrote, and `clipped_ratio`, the share of what a limit cut."""
    samples = [sample for group in groups for sample in group.samples]
    return {
        "mean_length": statistics.fmean(sample.num_trained for sample in samples),
        "clipped_ratio": sum(sample.stop is Stop.LENGTH for sample in samples) / len(samples),
    }
