"""What all policy losses share: the common settings with their checks, and the table of names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from sapo_rl.losses.aggregation import check_mode
from sapo_rl.losses.metrics import ALONE, Reduction
from sapo_rl.losses.ratio import RATIO_LEVELS, log_ratio
from sapo_rl.losses.trinity import padded_loss
from sapo_rl.plugins import Registry

LARGEST_LOG_RATIO = 80.0
"""Bounds on the log ratio above this would let exp overflow in float32 (at 88.7)."""


class TokenLosses(NamedTuple):
    """A policy loss before aggregation.

    Example:
        >>> import torch
        >>> from sapo_rl.losses import clipped_token_losses
        >>> clipped_token_losses(torch.tensor([0.0, 0.5]), torch.tensor([1.0, 1.0]), clip_low=0.2, clip_high=0.2)
        TokenLosses(losses=tensor([-1.0000, -1.2000]), gradient_weight=tensor([1., 0.]))
    """

    losses: Tensor
    """`(T,)` one loss per token, differentiable in the log-probabilities."""
    gradient_weight: Tensor
    """`(T,)` detached c with d loss / d logp = -A * ratio * c: the share of the unclipped gradient that is left."""


@dataclass
class PolicyLossFn(ABC):
    """A policy loss with its settings: `token_losses` on packed tokens, and a call on padded tensors around it.

    Subclasses are dataclasses that declare their settings as fields and implement `token_losses`; registered with
    `POLICY_LOSS_FN.register_module(name)`, they are found by `build_loss`, which passes each of them the settings that
    its constructor names.

    Raises:
        ValueError: a setting out of its range.
    """

    name: ClassVar[str] = "policy"
    """Prefix of the loss's metric."""
    backend: str = "verl"
    """Kept for callers of the published class; nothing depends on it."""
    _: KW_ONLY
    loss_agg_mode: str = "token-mean"
    """One of `AGGREGATION_MODES`; only the padded call reads it, packed micro-batches bring their token weights."""
    loss_agg_norm: float | None = None
    """Divisor of `seq-mean-token-sum-norm` in the padded call; None takes the padded length T."""
    log_ratio_clamp: float = 20.0
    """Bound on |log ratio| before it is exponentiated, at most 80."""
    ratio_level: str = "token"
    """`token`, or `sequence` for the length-normalised ratio of the whole sequence."""

    def __post_init__(self) -> None:
        check_mode(self.loss_agg_mode)
        if self.ratio_level not in RATIO_LEVELS:
            raise ValueError(f"unknown ratio_level '{self.ratio_level}'; valid: {', '.join(RATIO_LEVELS)}")
        if not 0 < self.log_ratio_clamp <= LARGEST_LOG_RATIO:
            raise ValueError(f"log_ratio_clamp must be in (0, {LARGEST_LOG_RATIO:g}], found {self.log_ratio_clamp}")
        if self.loss_agg_norm is not None and not self.loss_agg_norm > 0:
            raise ValueError(f"loss_agg_norm must be above 0 or null, found {self.loss_agg_norm}")

    @abstractmethod
    def token_losses(self, logps: Tensor, log_ratios: Tensor, advantages: Tensor) -> TokenLosses:
        """Return the loss of each token from packed `(T,)` tensors; `log_ratios` are unbounded and differentiable."""

    @classmethod
    def default_args(cls) -> dict[str, Any]:
        """Return the default of every setting but `backend`."""
        return {setting.name: setting.default for setting in fields(cls) if setting.name != "backend"}

    def packed(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, sequence_ids: Tensor, num_sequences: int
    ) -> TokenLosses:
        """Return the loss of each token of a packed micro-batch: all tensors `(T,)`, ids in 0..num_sequences-1."""
        log_ratios = log_ratio(logps, old_logps, sequence_ids, num_sequences, self.ratio_level)
        return self.token_losses(logps, log_ratios, advantages)

    def __call__(
        self, logprob: Tensor, old_logprob: Tensor, action_mask: Tensor, advantages: Tensor, **kwargs: Any
    ) -> tuple[Tensor, dict[str, float]]:
        """Return `padded_loss` of this object; `kwargs` are ignored, so that callers may pass the whole batch."""
        return padded_loss(self, logprob, old_logprob, action_mask, advantages)

    def token_metrics(self, ratio: Tensor, advantages: Tensor) -> dict[str, Tensor]:
        """Return further `(T,)` quantities whose means the padded call reports."""
        return {}


@dataclass
class BatchPolicyLossFn(PolicyLossFn):
    """A policy loss whose tokens depend on all tokens of the optimiser batch, through one number, its limit.

    The trainer asks for it with the log-probabilities of the whole batch before the first of its gradients, which costs
    a forward pass; where every ratio is 1, at a first update on fresh log-probabilities, nothing.
    """

    @abstractmethod
    def batch_limit(self, log_ratios: Tensor, advantages: Tensor, across: Reduction = ALONE) -> Tensor:
        """Return the limit `()` from this rank's tokens of the optimiser batch, `(T,)`, which may be none.

        `log_ratios` are of `ratio_level`; `across` joins the ranks.
        """

    @abstractmethod
    def within(self, log_ratios: Tensor, advantages: Tensor, limit: Tensor) -> TokenLosses:
        """Return the loss of each token of any part of that batch from packed `(T,)` tensors."""

    def token_losses(self, logps: Tensor, log_ratios: Tensor, advantages: Tensor) -> TokenLosses:
        """Return the loss of each token where these tokens are the whole batch."""
        return self.within(log_ratios, advantages, self.batch_limit(log_ratios.detach(), advantages))


POLICY_LOSS_FN: Registry[type[PolicyLossFn]] = Registry("policy loss")
"""Policy losses by the name that a config gives."""
