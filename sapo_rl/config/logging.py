"""What a run shows, and where its numbers go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from sapo_rl.config.fields import choice, number

TRACKERS = ("mlflow", "tensorboard", "trackio", "wandb")
"""Trackers that are built in: each is the name of its package, and of the extra that installs it."""


@dataclass
class LoggingConfig:
    """What is shown and where.

    Example:
        >>> LoggingConfig(trackers=["wandb", "tensorboard"], project="sums").trackers
        ['wandb', 'tensorboard']
    """

    console: str = choice("auto", "auto", "live", "plain", "none")
    """A live panel on a terminal, else one line a step (`auto`); or one of them always."""
    trackers: list[str] = field(default_factory=lambda: ["wandb"])
    """Where the numbers go besides the run folder: `wandb`, `tensorboard`, `trackio`, `mlflow`, or dotted paths of your
    own, several at once; docs/metrics.md."""
    wandb: str = choice("auto", "auto", "online", "offline", "off")
    """Weights & Biases, where it is one of `trackers`: online where an API key is set, else offline files (`auto`)."""
    project: str = "sapo-train"
    """Project of W&B and trackio, experiment of MLflow."""
    name: Optional[str] = None
    """The run's name in trackers; null takes its recipe, what was set beside it, and its folder's name."""
    entity: Optional[str] = None
    """W&B user or team; null takes the default of the account."""
    group: Optional[str] = None
    """Runs that belong together, in trackers; null is none, and in a sweep the sweep."""
    job_type: Optional[str] = None
    """W&B job type, e.g. `train`."""
    tags: list[str] = field(default_factory=list)
    """Tags, for W&B and MLflow."""
    completions: int = number(8, least=0)
    """Completions in each table of a tracker; all of them are in the run folder."""
    tokens: bool = False
    """Keep of every token that is trained on its log-probabilities, ratio and gradient weight, for `sapo-report` to
    colour completions by: `completions/tokens_<step>.parquet` in the run folder."""
