"""Held-out prompts to numbers."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate.utils import gather_object

from sapo_rl.config import ENVIRONMENT, Config
from sapo_rl.errors import SharedError, did_you_mean
from sapo_rl.rewards import RewardPool
from sapo_rl.rollout.collector import Writer
from sapo_rl.rollout.share import Share
from sapo_rl.telemetry import Telemetry, Timers
from sapo_rl.telemetry.sinks.completions import eval_rows
from sapo_rl.types import Group, Messages, Prompt

DEFAULT_SET = "default"
"""The name of the held-out prompts."""
EXAMPLES = 3
"""Held-out prompts that are shown with their completions."""


class Evaluator:
    """Measures the weights that the engines hold on the held-out prompts.

    Args:
        held_out: the prompts, the same on all ranks; with none, nothing is measured.
        share: which of them are this rank's.
        rollouts: generates.
        rewards: scores.
        telemetry: gets the numbers.
        timers: times the phase `eval`.
        config: the run's.
        before: (prompt, greedy completion) pairs of the first evaluation, where the run is resumed.
    """

    def __init__(
        self,
        held_out: Sequence[Prompt],
        share: Share,
        rollouts: Writer,
        rewards: RewardPool,
        telemetry: Telemetry,
        timers: Timers,
        config: Config,
        before: Sequence[Sequence[str]],
    ) -> None:
        self.before = [(prompt, text) for prompt, text in before]
        """(prompt, greedy completion) pairs of the run's first evaluation."""
        self._any, self._own = bool(held_out), share.of(held_out)
        self._rollouts, self._rewards = rollouts, rewards
        self._telemetry, self._timers = telemetry, timers
        self._functions, self._samples = list(config.rewards), config.eval.samples
        self._environments = list(config.environments)
        failing = [*config.played.values(), *config.reward.functions.values()]
        self._drops = any(one.on_error in ("drop", "none") for one in failing)
        self._judge = config.judge

    def run(self, step: int) -> None:
        """Measure the greedy completions, and the mean of several samples where asked for; every rank calls it."""
        if not self._any:
            return
        with self._timers("eval"), self._rewards.scoring() as scoring:
            greedy = self._rollouts.greedy(self._own, on_group=scoring.add)
            sampled: list[Group] = []
            if self._samples:
                written = self._rollouts.write(self._own, -step, self._samples, on_group=scoring.add)
                sampled = written.checked().groups
            greedy, sampled = scoring.result(greedy).groups, scoring.result(sampled).groups
        greedy, sampled = ([one for one in gather_object(groups) if one.samples] for groups in (greedy, sampled))
        self._check_judge(greedy)
        metrics = {"eval/reward": mean_reward(greedy, self._judge), "eval/mean_length": mean_length(greedy)}
        metrics |= self._by_environment(greedy)
        if self._drops:
            metrics["eval/dropped"] = float(sum(gather_object([len(self._own)])) - len(greedy))
        told = [name for name in self._functions if name != ENVIRONMENT or _applies(greedy, name)]
        further = dict.fromkeys(name for group in greedy for name in group.samples[0].rewards if "/" in name)
        told = [*(told if len(self._functions) > 1 else []), *further]
        metrics |= {f"eval/rewards/{name}": mean_reward(greedy, name) for name in told}
        if sampled:
            metrics["eval/reward_mean"] = mean_reward(sampled, self._judge)
        examples = [(_shown(group.prompt.content), group.samples[0].text) for group in greedy[:EXAMPLES]]
        self.before = self.before or examples
        kept = eval_rows(step, greedy, DEFAULT_SET, self._judge, greedy=True)
        kept += eval_rows(step, sampled, DEFAULT_SET, self._judge, greedy=False)
        self._telemetry.log_eval(step, metrics, examples, kept)

    def _check_judge(self, groups: Sequence[Group]) -> None:
        """Raise UserError where no function returns the number of which `eval/reward` is the mean."""
        known = dict.fromkeys(name for group in groups for name in group.samples[0].rewards)
        if known and self._judge not in known:
            raise SharedError(f"eval.reward: no function returns '{self._judge}'; {did_you_mean(self._judge, known)}")

    def _by_environment(self, groups: Sequence[Group]) -> dict[str, float]:
        """The reward of each of several environments, where there is one."""
        found = {}
        for name in self._environments:
            own = [group for group in groups if group.prompt.columns[ENVIRONMENT] == name]
            if _applies(own, self._judge):
                found[f"eval/environment/{name}"] = mean_reward(own, self._judge)
        return found


def mean_reward(groups: Sequence[Group], name: str) -> float:
    """Return the mean of one reward over the samples to which it applies; 0 where it applies to none."""
    values = [sample.rewards.get(name) for group in groups for sample in group.samples]
    scored = [value for value in values if value is not None]
    return sum(scored) / max(1, len(scored))


def mean_length(groups: Sequence[Group]) -> float:
    """Return the mean number of tokens that the model wrote."""
    lengths = [sample.num_trained for group in groups for sample in group.samples]
    return sum(lengths) / len(lengths)


def _applies(groups: Sequence[Group], name: str) -> bool:
    """Whether there is such a reward: an environment of tools alone gives none."""
    return any(sample.rewards.get(name) is not None for group in groups for sample in group.samples)


def _shown(content: str | Messages) -> str:
    """A prompt as one text: the last message of a chat."""
    return content if isinstance(content, str) else content[-1]["content"]
