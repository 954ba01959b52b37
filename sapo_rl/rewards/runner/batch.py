"""A batch's groups on their way from whoever finishes them to their rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType

from sapo_rl.types import Group, RewardStats, Scores


class Scoring:
    """Has each group of a batch scored as soon as it is finished; a context manager, whose exit gives the rest up.

    Args:
        submit: has a group scored.
        names: of all functions, as the config has them.

    Example:
        >>> with pool.scoring() as scoring:
        ...     groups, stats = scoring.result(rollouts.write(prompts, step, on_group=scoring.add).groups)
    """

    def __init__(self, submit: Callable[[Group], Future[Scores]], names: Sequence[str]) -> None:
        self._submit, self._names = submit, names
        self._futures: dict[int, tuple[Group, Future[Scores]]] = {}
        """By the identity of the group: a prompt may be in a batch twice."""
        self._failure: BaseException | None = None

    def __enter__(self) -> Scoring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give up what is not scored yet."""
        for _, future in [*self._futures.values()]:
            future.cancel()

    def add(self, group: Group) -> None:
        """Have a finished group scored; from any thread.

        Raises:
            UserError: an earlier one could not be.
        """
        if self._failure is not None:
            raise self._failure
        future = self._submit(group)
        self._futures[id(group)] = group, future
        future.add_done_callback(self._note)

    def result(self, groups: Sequence[Group]) -> Scores:
        """Wait for the scores of these groups, all of them added.

        Raises:
            UserError: a failed sample of a function whose `on_error` is `raise`.
        """
        found = [self._futures[id(group)][1].result() for group in groups]
        zeros = dict.fromkeys(self._names, 0)
        stats = RewardStats(zeros, dict(zeros), {})
        for _, own in found:
            for name in self._names:
                stats.errors[name] += own.errors[name]
                stats.not_applicable[name] += own.not_applicable[name]
            stats.failures.update({name: text for name, text in own.failures.items() if name not in stats.failures})
        return Scores([group for scored, _ in found for group in scored], stats)

    def _note(self, future: Future[Scores]) -> None:
        if not future.cancelled():
            self._failure = self._failure or future.exception()
