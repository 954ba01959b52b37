"""Who is at fault where a call of a reward function fails: some of its samples, the group as a whole, or nobody.

A failed call on a group is repeated sample by sample, but for functions that compare samples: of these a call is never
split. A worker may also die or stop by no fault of the function, where
memory is short or somebody kills it, so a function is blamed for a death or a timeout only when it happens again. Where
a worker dies with several calls under way, nobody knows whose fault it was: each is repeated with no other beside it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sapo_rl.config import RewardFunctionConfig
from sapo_rl.rewards.registry import SLOW, Score
from sapo_rl.rewards.runner.sheet import Place, Sheet

_LONGEST_PAUSE = 60.0  # seconds before a call is made again


@dataclass(slots=True, eq=False)
class Call:
    """A reward function to be called on samples: on a group or a batch or, in a search, on one."""

    name: str
    """The function's name in the config."""
    sheet: Sheet
    """Where its scores are taken down."""
    places: list[Place]
    """The samples."""
    repeated: bool = False
    """Whether the same call has taken a worker down before, or was too late."""
    patient: bool = False
    """Whether the time limit is that of one sample for each of its samples."""
    alone: bool = False
    """Whether its worker may have no other call under way."""
    retries: int = 0
    """How often it was made again because the config asks for it."""
    not_before: float = 0.0
    """When it may be made, on the monotonic clock."""
    search: _Search | None = None
    """The search that the call is a part of."""


@dataclass(slots=True)
class Outcome:
    """How a call ended."""

    scores: list[Score] | None
    """One for each sample; None where the call failed."""
    cause: str = ""
    """What happened, where it failed."""
    dead: bool = False
    """Whether the worker is gone or of no use any more."""
    late: bool = False
    """Whether the time limit was over; the worker lives on where it could cancel the call."""
    shared: bool = False
    """Whether the dead worker had other calls under way, so that any of them may be at fault."""


@dataclass(slots=True)
class Verdict:
    """What follows from an outcome."""

    first: list[Call] = field(default_factory=list)
    """Calls to make before all others."""
    last: list[Call] = field(default_factory=list)
    """Calls to make after all others."""
    retry: list[Call] = field(default_factory=list)
    """Calls to make after a pause."""
    failed: Call | None = None
    """The call whose samples have failed, for good."""
    cause: str = ""
    """Why they have."""


@dataclass(slots=True)
class _Search:
    """A failed call on a group that is being repeated sample by sample, to find which samples are at fault."""

    whole: Call
    outcome: Outcome
    """How the call on the whole group ended."""
    unanswered: int
    """Samples of which it is not known yet whether they fail alone."""
    failed: int = 0
    """Samples that failed alone."""


class Blame:
    """Says for each call that ends which further calls follow, and whether its samples have failed.

    Samples that fail alone have failed. Where none of a failed group does, a call that was late is repeated with the
    time limit for each sample, and so are all later calls of that function: it is slow, it does not hang. Of the
    built-ins that are known to be slow it is so from the first call on. One that took
    its worker down is repeated once. Any other failure is that of all samples of the group.

    Args:
        functions: by name.
    """

    def __init__(self, functions: Mapping[str, RewardFunctionConfig]) -> None:
        self._functions = functions
        self._slow = {name for name, one in functions.items() if one.function in SLOW}

    def limit(self, call: Call) -> float:
        """Return how many seconds a call may take that is about to be made."""
        call.patient = call.name in self._slow
        return self._functions[call.name].timeout * (len(call.places) if call.patient else 1)

    def after(self, call: Call, outcome: Outcome) -> Verdict:
        """Return what follows from the end of `call`."""
        failed = outcome.scores is None
        if outcome.shared:
            return Verdict(first=[replace(call, alone=True)])
        if failed and len(call.places) > 1 and self._functions[call.name].scope == "sample":
            search = _Search(call, outcome, len(call.places))
            one = Call(call.name, call.sheet, [], alone=call.alone, search=search)
            return Verdict(first=[replace(one, places=[place]) for place in call.places])
        if failed and (outcome.dead or outcome.late) and not call.repeated:
            return Verdict(first=[replace(call, repeated=True)])
        if failed and call.retries < self._functions[call.name].retries:
            return Verdict(retry=[_after_a_pause(call)])
        search = call.search
        if search is not None:
            search.unanswered -= 1
            search.failed += failed
            if not search.unanswered and not search.failed:
                return self._after_search(search.whole, search.outcome)
        return Verdict(failed=call, cause=outcome.cause) if failed else Verdict()

    def _after_search(self, whole: Call, outcome: Outcome) -> Verdict:
        """Return what follows where a call failed on a group and on none of its samples alone."""
        if outcome.late and not whole.patient:
            self._slow.add(whole.name)
            return Verdict(last=[whole])
        if outcome.dead and not whole.repeated:
            return Verdict(last=[replace(whole, repeated=True)])
        if whole.retries < self._functions[whole.name].retries:
            return Verdict(retry=[_after_a_pause(whole)])
        return Verdict(failed=whole, cause=f"{outcome.cause}, called on the whole group; on none of its samples alone")


def _after_a_pause(call: Call) -> Call:
    """The same call once more, after a pause that doubles each time."""
    pause = min(2.0**call.retries, _LONGEST_PAUSE)
    return replace(call, retries=call.retries + 1, not_before=time.monotonic() + pause)
