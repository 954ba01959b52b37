"""Held-out prompts to numbers, in the middle of a run."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate.utils import gather_object

from sapo_rl.config import Config
from sapo_rl.evaluation.measure import Answers, answers, check_judge, metrics
from sapo_rl.evaluation.sets import EvalSet
from sapo_rl.rewards import RewardPool
from sapo_rl.rollout.collector import Writer
from sapo_rl.rollout.share import Share
from sapo_rl.telemetry import Row, Telemetry, Timers
from sapo_rl.telemetry.sinks.completions import eval_rows
from sapo_rl.types import Messages

EXAMPLES = 3
"""Held-out prompts that are shown with their completions."""


class Evaluator:
    """Measures the weights that the engines hold on sets of held-out prompts.

    Args:
        sets: the same on all ranks; with none, nothing is measured.
        share: which of their prompts are this rank's.
        rollouts: generates.
        rewards: scores; it knows `further_functions` of the config.
        telemetry: gets the numbers.
        timers: times the phase `eval`.
        config: the run's.
        before: (prompt, completion) pairs of the first evaluation, where the run is resumed.
    """

    def __init__(
        self,
        sets: Sequence[EvalSet],
        share: Share,
        rollouts: Writer,
        rewards: RewardPool,
        telemetry: Telemetry,
        timers: Timers,
        config: Config,
        before: Sequence[Sequence[str]],
    ) -> None:
        self.before = [(prompt, text) for prompt, text in before]
        """(prompt, completion) pairs of the run's first evaluation."""
        self._sets, self._share = sets, share
        self._rollouts, self._rewards = rollouts, rewards
        self._telemetry, self._timers, self._config = telemetry, timers, config

    def run(self, step: int) -> dict[str, float]:
        """Measure all sets; every rank calls it, and gets the numbers by the names that they are recorded under.

        Raises:
            SharedError: no function returns the number of which a set's reward is the mean.
        """
        if not self._sets:
            return {}
        with self._timers("eval"):
            answered = [
                (one, answers(one, self._share.of(one.prompts), step, self._rollouts, self._rewards))
                for one in self._sets
            ]
        numbers: dict[str, float] = {}
        rows: list[Row] = []
        examples: list[tuple[str, str]] = []
        for one, own in answered:
            found = own.gathered(gather_object)
            check_judge(one, found)
            numbers |= metrics(one, found, self._config)
            rows += rows_of(one, found, step)
            examples = examples or _examples(found)
        self.before = self.before or examples
        self._telemetry.log_eval(step, numbers, examples, rows)
        return numbers


def rows_of(of: EvalSet, found: Answers, step: int) -> list[Row]:
    """Return what is told of each completion of a set."""
    greedy = eval_rows(step, found.greedy, of.name, of.jury.judge, greedy=True)
    return greedy + eval_rows(step, found.sampled, of.name, of.jury.judge, greedy=False)


def _examples(found: Answers) -> list[tuple[str, str]]:
    """Some prompts, each with its first completion."""
    groups = (found.greedy or found.sampled)[:EXAMPLES]
    return [(_shown(group.prompt.content), group.samples[0].text) for group in groups]


def _shown(content: str | Messages) -> str:
    """A prompt as one text: the last message of a chat."""
    return content if isinstance(content, str) else content[-1]["content"]
