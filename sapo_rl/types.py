"""What flows through a step: prompts, then samples, then groups of samples.

Ragged lists carry their axes in the name: P prompts of a step, G samples of a prompt, T tokens of a sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from numpy.typing import NDArray

Messages: TypeAlias = list[dict[str, str]]
"""A chat: dictionaries with the keys `role` and `content`."""

LARGEST_REWARD = 1e100
"""Sums and squares of larger rewards could overflow."""

Span: TypeAlias = tuple[int, int]
"""Places `start` to `end`, the latter exclusive."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of the dataset, tokenised once.

    Example:
        >>> prompt = Prompt(index=7, token_ids=[1, 52, 28], content="2 + 2 =", columns={"answer": "4"})
        >>> prompt.columns["answer"]
        '4'
    """

    index: int
    """Position in the dataset: stable over epochs, resumes and ranks."""
    token_ids: list[int]
    """What vLLM is given: the chat template already applied."""
    content: str | Messages
    """What reward functions see as the prompt: text, or messages where the dataset holds messages."""
    columns: dict[str, Any]
    """Every other column of the row, passed on to the reward functions by name; the answer is `answer`."""


class Stop(StrEnum):
    """Why an episode ended; the value is what completions on disk say."""

    STOP = "stop"
    """The model ended it, by its end-of-sequence token."""
    LENGTH = "length"
    """A limit on its tokens."""
    TURNS = "turns"
    """The limit on its turns."""
    ENVIRONMENT = "environment"
    """The environment said that it was over."""


class Turn(NamedTuple):
    """Where the model wrote at one of its turns: `sample.rows[row].token_ids[start:end]`.

    Example:
        >>> tokens = [5, 6, 0, 9, 9, 7, 0]  # an environment wrote the two 9
        >>> turn = Turn(start=5, end=7)
        >>> tokens[turn.start : turn.end] == [7, 0]
        True
    """

    start: int
    end: int
    row: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt and the stream of tokens after it, of which the model's own are trained on.

    Example:
        >>> row = Row([1, 2], [5, 6, 0, 9, 9, 7, 0, 9], loss_mask=[(0, 3), (5, 7)])  # 9 is what an environment wrote
        >>> row.num_trained, row.trained_until
        (5, 7)
    """

    prompt_ids: list[int]
    """At least one token, never trained on."""
    token_ids: list[int]
    """What follows, whoever wrote it, as the model saw it."""
    loss_mask: list[Span] | None = None
    """The trained tokens, as ascending spans of places in `token_ids` that do not overlap; None trains all."""
    rollout_logps: list[float] | None = None
    """vLLM's log-probabilities of the trained tokens alone, where the config asks for them."""

    @property
    def num_trained(self) -> int:
        """How many tokens are trained on."""
        return len(self.token_ids) if self.loss_mask is None else sum(end - start for start, end in self.loss_mask)

    @property
    def trained_until(self) -> int:
        """The end of the last trained token: what comes after it has no part in an update."""
        if self.loss_mask is None:
            return len(self.token_ids)
        return self.loss_mask[-1][1] if self.loss_mask else 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One episode of a prompt. A stage returns a new one with what it adds.

    An episode is one row as long as each prompt of it begins with all that came before; where the history was rewritten
    it goes on in a further row. Its rows have one advantage, and count as one sequence in a mean over sequences.

    Example:
        >>> Sample([Row([1, 2], [5, 6, 0])], Stop.STOP, versions=(3, 3), text="seven").num_trained
        3
    """

    rows: list[Row]
    """At least one; the first follows the prompt of the group, each other a prompt of its own."""
    stop: Stop
    versions: tuple[int, int]
    """First and last version of the weights that wrote it: the number of updates of vLLM's weights before it."""
    turns: list[Turn] = field(default_factory=list[Turn])
    """The model's turns in their order; empty for one turn, which is the whole row."""
    text: str = ""
    """What reward functions see: decoded, special tokens skipped."""
    messages: list[dict[str, Any]] | None = None
    """What was said after the prompt, by whom, in OpenAI's shape; None for one turn."""
    opening: list[dict[str, Any]] | None = None
    """The messages before that: the prompt's, with what an environment's `reset` added; None for one turn."""
    conversations: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = field(default_factory=list[Any])
    """Of an agent that had several: the prompt of each, and what was said after it; the last is in `opening` and
    `messages` as well. Empty where there was one."""
    info: dict[str, Any] = field(default_factory=dict[str, Any])
    """What an environment tells of it."""
    rewards: dict[str, float | None] = field(default_factory=dict[str, "float | None"])
    """Each reward function's value by its name in the config, None where it does not apply; under `name/key` further
    numbers that it has returned, which are recorded alone."""
    reward: float | None = None
    """The weighted sum of `rewards`; None where none applies."""
    advantage: float = 0.0
    """Normalised within the group, shared by all trained tokens."""

    @property
    def token_ids(self) -> list[int]:
        """Everything after the group's prompt, in the first row."""
        return self.rows[0].token_ids

    @property
    def num_trained(self) -> int:
        """How many tokens of all rows are trained on."""
        return sum(row.num_trained for row in self.rows)


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt and its G samples: the unit in which advantages are normalised, never split over ranks.

    Example:
        >>> prompt = Prompt(0, [1, 2], "2 + 2 =", {"answer": "4"})
        >>> right = Sample([Row([1, 2], [5, 0])], Stop.STOP, versions=(0, 0), text="4")
        >>> wrong = Sample([Row([1, 2], [6, 0])], Stop.STOP, versions=(0, 0), text="5")
        >>> len(Group(prompt, [right, wrong]).samples)
        2
    """

    prompt: Prompt
    samples: list[Sample]


class Place(NamedTuple):
    """Where a sample stands in a step, on all ranks together."""

    rank: int
    """Whose batch it came in; another one may train on it."""
    group: int
    """Among those of the batch."""
    sample: int
    """In the group."""


class TokenValues(NamedTuple):
    """What the last update on a sample in a step made of its tokens.

    Example:
        >>> import numpy as np
        >>> row = Row([1], [5, 6], loss_mask=[(1, 2)])
        >>> ratio = np.array([1.25], np.float32)
        >>> values = TokenValues(Place(0, 0, 0), [row], advantage=1.0, weight=0.5, columns={"ratio": ratio})
        >>> len(values.columns["ratio"])
        1
    """

    place: Place
    rows: Sequence[Row]
    """The first, and the others of which a token is trained on."""
    advantage: float
    weight: float
    """Of each trained token in the loss, as the aggregation has it."""
    columns: dict[str, NDArray[Any]]
    """(T,) float32 by name: of the trained tokens of all rows, one row after the other."""


@dataclass(frozen=True, slots=True)
class RewardStats:
    """What happened while one batch was scored; dictionaries by the function's name in the config.

    Example:
        >>> one = RewardStats(errors={"judge": 1}, not_applicable={}, failures={"judge": "HTTP 503"})
        >>> two = RewardStats(errors={"judge": 2}, not_applicable={"code": 4}, failures={"judge": "no answer"})
        >>> RewardStats.together([one, two])
        RewardStats(errors={'judge': 3}, not_applicable={'code': 4}, failures={'judge': 'HTTP 503'})
    """

    errors: dict[str, int]
    """Samples on which the function failed, and that were scored 0 or have left their group."""
    not_applicable: dict[str, int]
    """Samples for which the function returned None."""
    failures: dict[str, str]
    """The text of the first failure of each function that failed."""

    @staticmethod
    def together(parts: Iterable[RewardStats]) -> RewardStats:
        """Return what happened in several parts of a batch."""
        errors, not_applicable, failures = Counter[str](), Counter[str](), dict[str, str]()
        for part in parts:
            errors.update(part.errors)
            not_applicable.update(part.not_applicable)
            failures |= {name: text for name, text in part.failures.items() if name not in failures}
        return RewardStats(dict(errors), dict(not_applicable), failures)


class Scores(NamedTuple):
    """A batch after the reward functions.

    Example:
        >>> Scores(groups=[], stats=RewardStats({}, {}, {})).stats.errors
        {}
    """

    groups: list[Group]
    """Those that were scored, each sample with its `rewards`."""
    stats: RewardStats
    """What happened meanwhile."""


@dataclass(frozen=True)
class Usage:
    """How long the engines of a rank worked on one batch, in seconds from its start.

    Example:
        >>> usage = Usage(until=[4.0, 2.0], whole=4.0)
        >>> [usage.whole - until for until in usage.until]  # the second engine had nothing to do for two seconds
        [0.0, 2.0]
    """

    until: list[float]
    """By engine: its last answer; 0 where it gave none."""
    whole: float
    """The last answer of all."""


class PassRate(NamedTuple):
    """How often one group solved its prompt.

    Example:
        >>> PassRate(position=7, rate=0.25, samples=8)  # two of its eight samples were right
        PassRate(position=7, rate=0.25, samples=8)
    """

    position: int
    """The place of the prompt among those to train on."""
    rate: float
    """The share of its samples that are solved."""
    samples: int


class Replayed(NamedTuple):
    """A group of an earlier step."""

    group: Group
    age: int
    """Steps since the one that it was written for."""


@dataclass(frozen=True)
class Batch:
    """One rank's scored samples of a step."""

    groups: list[Group]
    """Their samples have `rewards`, and once `with_advantages` has been there `reward` and `advantage`."""
    scoring: RewardStats
    sampler_state: dict[str, Any]
    """Where the order of prompts stands after it."""
    usage: Usage
    """How long the engines wrote on it."""
    dropped: Sequence[str] = ()
    """What failed in each episode that its environment has lost."""
    written: int = 0
    """Groups that were written for it, those included that others have replaced."""
    pass_rates: Sequence[PassRate] = ()
    """Of all these groups, where a reward says what is solved."""
    replayed: Mapping[int, Replayed] = field(default_factory=dict[int, Replayed])
    """By the place of a group that teaches nothing what is trained on in its stead; with advantages as `groups`."""

    @property
    def trained(self) -> list[Group]:
        """The groups of the update."""
        return [self.replayed[place].group if place in self.replayed else one for place, one in enumerate(self.groups)]
