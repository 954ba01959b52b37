"""Groups that teach nothing replaced by those of further prompts (DAPO's dynamic sampling, arXiv 2503.14476)."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from sapo_rl.rewards import Scoring
from sapo_rl.rollout.collector import RolloutResult, Writer
from sapo_rl.types import Group, Prompt, Scores, Usage


def write_refilled(
    writer: Writer,
    prompts: Sequence[Prompt],
    further: Sequence[Prompt],
    step: int,
    scoring: Scoring,
    keeps: Callable[[Group], bool],
) -> RolloutResult:
    """Write the groups of `prompts`, and for each that is not kept that of the next of `further`, as long as there are.

    A group is replaced as soon as its rewards are known, while others are still being written. Which of `further` are
    taken does not depend on what is ready first: as many as there are groups that are not kept, theirs included.

    Args:
        writer: writes.
        prompts: of a rank's batch.
        further: taken from the front.
        step: whose batch it is.
        scoring: has each group scored, and waits for the scores of all that are returned.
        keeps: whether a scored group stays.

    Returns:
        All groups that were written, those of `prompts` first.

    Raises:
        UserError: a failed sample, as `Scoring.result`. What an engine raises ends the whole call.
    """
    start, left = time.perf_counter(), list(further)
    begun: list[tuple[float, Future[RolloutResult]]] = []
    ready: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
    pool = ThreadPoolExecutor(1 + len(left), thread_name_prefix="refill")

    def write(some: Sequence[Prompt]) -> RolloutResult:
        return writer.write(some, step, on_group=lambda group: scoring.add(group).add_done_callback(ready.put))

    def begin(some: Sequence[Prompt]) -> None:
        future = pool.submit(write, some)
        begun.append((time.perf_counter() - start, future))
        future.add_done_callback(ready.put)  # for its error: without its groups nothing else would come

    try:
        begin(prompts)
        unknown = len(prompts)
        while unknown:
            found = ready.get().result()
            if isinstance(found, Scores):
                unknown -= 1
                if left and not all(map(keeps, found.groups)):
                    begin([left.pop(0)])
                    unknown += 1
        return _joined([(offset, future.result()) for offset, future in begun])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def kept(groups: Sequence[Group], count: int, keeps: Callable[[Group], bool]) -> list[Group]:
    """Return `count` of the groups: the first of those that stay, then, where these are too few, of the others.

    Those without samples are the last to be taken. The order stays as it is: sorted, the last of several mini-batches
    would get most groups that teach nothing.
    """
    ranked = sorted(range(len(groups)), key=lambda place: (not keeps(groups[place]), not groups[place].samples))
    return [groups[place] for place in sorted(ranked[:count])]


def _joined(results: Sequence[tuple[float, RolloutResult]]) -> RolloutResult:
    """One result of several, each with the seconds at which it was begun."""
    groups = [group for _, one in results for group in one.groups]
    dropped = [text for _, one in results for text in one.dropped]
    until = [
        max(offset + seconds if seconds else 0.0 for (offset, _), seconds in zip(results, column, strict=True))
        for column in zip(*(one.usage.until for _, one in results), strict=True)
    ]
    return RolloutResult(groups, Usage(until, max(until, default=0.0)), dropped)
