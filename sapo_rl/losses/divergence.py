"""Estimators of the KL divergence from samples, and the penalty on the distance to the reference model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

KL_KINDS = ("k1", "k2", "k3")
"""Schulman's three estimators."""


def kl_estimate(logps: Tensor, other_logps: Tensor, kind: str, bound: float = 20.0) -> Tensor:
    """Return per-token estimates of KL(p || q), with p the policy of `logps` (which drew the tokens) and q the other.

    With d = log q - log p, bounded to +-`bound`: `k1` = -d, unbiased, of either sign; `k2` = d^2 / 2, biased, never
    negative; `k3` = exp(d) - 1 - d, unbiased and never negative.

    Args:
        logps: any shape.
        other_logps: same shape.
        kind: `k1`, `k2` or `k3`.
        bound: bound on |d|, at which the gradient stops.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KL_KINDS:
        raise ValueError(f"unknown KL kind '{kind}'; valid: {', '.join(KL_KINDS)}")
    difference = (other_logps - logps).clamp(-bound, bound)
    if kind == "k1":
        return -difference
    if kind == "k2":
        return difference**2 / 2
    return difference.expm1() - difference


@dataclass(frozen=True)
class KLPenalty:
    """`coef` times the KL estimate to the reference model, added to the policy loss of each token.

    It is added after any importance weight or mismatch correction, which concern the policy term alone.

    Raises:
        ValueError: a negative coefficient, or an unknown kind.

    Example:
        >>> import torch
        >>> KLPenalty(coef=0.02).tokens(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0]))
        tensor([0.0000, 0.7183])
    """

    coef: float = 0.0
    kind: str = "k3"

    def __post_init__(self) -> None:
        if not self.coef >= 0:
            raise ValueError(f"kl.coef must be 0 or more, found {self.coef}")
        if self.kind not in KL_KINDS:
            raise ValueError(f"unknown kl.kind '{self.kind}'; valid: {', '.join(KL_KINDS)}")

    def tokens(self, logps: Tensor, ref_logps: Tensor | None) -> Tensor | None:
        """Return the KL estimate `(T,)` of each token, not yet times `coef`; None without a reference.

        Raises:
            ValueError: `coef` is above 0 and there is no reference.
        """
        if ref_logps is None:
            if self.coef > 0:
                raise ValueError("kl.coef is above 0, but the batch has no ref_logps")
            return None
        return kl_estimate(logps, ref_logps.detach(), self.kind)
