"""A batch's groups on their way from whoever finishes them to their rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType

from sapo_rl.errors import UserError
from sapo_rl.types import Group, RewardStats, Scores


class Scoring:
    """Has each group of a batch scored as soon as it is finished; a context manager, whose exit gives the rest up.

    Args:
        submit: has a group scored.
        submit_batch: has functions score all groups together, after that.
        names: of all functions, as the config has them.

    Example:
        >>> with pool.scoring() as scoring:
        ...     groups, stats = scoring.result(rollouts.write(prompts, step, on_group=scoring.add).groups)
    """

    def __init__(
        self,
        submit: Callable[[Group], Future[Scores]],
        submit_batch: Callable[[Sequence[Group]], Future[Scores]],
        names: Sequence[str],
    ) -> None:
        self._submit, self._submit_batch, self._names = submit, submit_batch, names
        self._futures: dict[int, Future[Scores]] = {}
        """By the identity of the group: a prompt may be in a batch twice."""
        self._open: list[tuple[object, Future[Scores]]] = []
        """All that was submitted, with its future; so no identity is used again."""
        self._failure: BaseException | None = None

    def __enter__(self) -> Scoring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give up what is not scored yet."""
        for _, future in [*self._open]:
            future.cancel()

    def add(self, group: Group) -> Future[Scores]:
        """Have a finished group scored, and return the future of that; from any thread.

        Raises:
            UserError: an earlier one could not be.
        """
        if self._failure is not None:
            raise self._failure
        future = self._futures[id(group)] = self._submit(group)
        self._open.append((group, future))
        future.add_done_callback(self._note)
        return future

    def result(self, groups: Sequence[Group]) -> Scores:
        """Wait for the scores of these groups, all of them added; functions of scope `batch` get them together.

        Raises:
            UserError: a failed sample of a function whose `on_error` is `raise`; or of samples that were added none is
                left, because functions have failed on all.
        """
        found = [self._futures[id(group)].result() for group in groups]
        future = self._submit_batch([group for one in found for group in one.groups])
        self._open.append((groups, future))
        scored = future.result()
        nothing = dict.fromkeys(self._names, 0)  # where there is no group
        parts = [RewardStats(nothing, nothing, {}), *(one.stats for one in found), scored.stats]
        stats = RewardStats.together(parts)
        if stats.failures and not any(group.samples for group in scored.groups):
            raise UserError(f"no sample is left: {next(iter(stats.failures.values()))}")
        return Scores(scored.groups, stats)

    def _note(self, future: Future[Scores]) -> None:
        if not future.cancelled():
            self._failure = self._failure or future.exception()
