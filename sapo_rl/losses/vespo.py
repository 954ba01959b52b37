"""VESPO, Variational Sequence-Level Soft Policy Optimization (arXiv 2602.10693): a soft weight on whole completions."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar

from torch import Tensor

from sapo_rl.losses.base import POLICY_LOSS_FN, PolicyLossFn, TokenLosses
from sapo_rl.losses.gates import by_sign
from sapo_rl.losses.ratio import bounded_ratio, log_ratio


def vespo_token_losses(
    logps: Tensor,
    log_ratios: Tensor,
    log_weights: Tensor,
    advantages: Tensor,
    *,
    k_pos: float,
    lambda_pos: float,
    k_neg: float,
    lambda_neg: float,
    log_ratio_clamp: float = 20.0,
) -> TokenLosses:
    """Return -phi(W) A logp of each packed token, all tensors `(T,)`, with phi held constant.

    W is the ratio of the whole completion, the product of its tokens' without any mean over its length, and phi(W) =
    W^k exp(lambda (1 - W)): 1 at W = 1, largest at W = k / lambda, and 0 at both ends. d loss / d logp = -A phi(W).

    Args:
        logps: log-probabilities now; the gradient flows through them only.
        log_ratios: log r of each token.
        log_weights: log W of its completion.
        advantages: one value a sequence, repeated.
        k_pos: k where A > 0.
        lambda_pos: lambda where A > 0.
        k_neg: k elsewhere.
        lambda_neg: lambda elsewhere.
        log_ratio_clamp: bound on |log r| and on |log W|.
    """
    ratio, _ = bounded_ratio(log_ratios.detach(), log_ratio_clamp)
    log_w = log_weights.detach().clamp(-log_ratio_clamp, log_ratio_clamp)
    k = by_sign(advantages, k_pos, k_neg)
    decay = by_sign(advantages, lambda_pos, lambda_neg)
    phi = (k * log_w + decay * (1 - log_w.exp())).exp()
    return TokenLosses(-phi * advantages * logps, phi / ratio)


@POLICY_LOSS_FN.register_module("vespo")
@dataclass
class VESPOPolicyLossFn(PolicyLossFn):
    """VESPO with the paper's k and lambda.

    Raises:
        ValueError: a k or lambda that is not above 0.

    Example:
        >>> import torch
        >>> log_ratios = torch.tensor([0.5, 1.0, 1.5]).log()  # of one completion with advantage 1
        >>> old, advantages, sequence_ids = torch.zeros(3), torch.ones(3), torch.tensor([0, 0, 0])
        >>> VESPOPolicyLossFn().packed(log_ratios, old, advantages, sequence_ids, 1).gradient_weight
        tensor([2.3816, 1.1908, 0.7939])
    """

    name: ClassVar[str] = "vespo"
    ratio_level: str = field(default="token", init=False)
    """Of the gradient weight and the metrics; the loss itself takes the product over the completion."""
    _: KW_ONLY
    k_pos: float = 2.0
    """Exponent where the advantage is positive."""
    lambda_pos: float = 3.0
    """Decay where the advantage is positive."""
    k_neg: float = 3.0
    """Exponent where it is not."""
    lambda_neg: float = 2.0
    """Decay where it is not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("k_pos", "lambda_pos", "k_neg", "lambda_neg"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key} must be above 0, found {getattr(self, key)}")

    def packed(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, sequence_ids: Tensor, num_sequences: int
    ) -> TokenLosses:
        """Return the loss of each token of a packed micro-batch: all tensors `(T,)`, ids in 0..num_sequences-1."""
        log_ratios = log_ratio(logps, old_logps, sequence_ids, num_sequences, "token").detach()
        bounded = log_ratios.clamp(-self.log_ratio_clamp, self.log_ratio_clamp)
        log_weights = bounded.new_zeros(num_sequences).index_add(0, sequence_ids, bounded)
        return self._losses(logps, log_ratios, log_weights[sequence_ids], advantages)

    def token_losses(self, logps: Tensor, log_ratios: Tensor, advantages: Tensor) -> TokenLosses:
        """Return the losses of completions of one token each."""
        return self._losses(logps, log_ratios, log_ratios, advantages)

    def _losses(self, logps: Tensor, log_ratios: Tensor, log_weights: Tensor, advantages: Tensor) -> TokenLosses:
        return vespo_token_losses(
            logps,
            log_ratios,
            log_weights,
            advantages,
            k_pos=self.k_pos,
            lambda_pos=self.lambda_pos,
            k_neg=self.k_neg,
            lambda_neg=self.lambda_neg,
            log_ratio_clamp=self.log_ratio_clamp,
        )
