"""The interface of Trinity-RFT's losses, for those who compare or call them: padded `(B, T)` tensors and a mask.

The trainer never calls it; its micro-batches are packed and bring the weights of their tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sapo_rl.losses.aggregation import token_weights
from sapo_rl.losses.ratio import bounded_ratio, log_ratio

if TYPE_CHECKING:
    from sapo_rl.losses.base import PolicyLossFn


def padded_loss(
    policy: PolicyLossFn, logprob: Tensor, old_logprob: Tensor, action_mask: Tensor, advantages: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Return the aggregated loss `()` of a padded batch, and its metrics as plain floats.

    Tokens are gathered by the mask before anything is computed, so masked positions may hold inf or NaN.

    Args:
        policy: the loss with its settings.
        logprob: `(B, T)` log-probabilities under the policy, which carry the gradient.
        old_logprob: `(B, T)` log-probabilities under the policy of the rollouts; no gradient flows into them.
        action_mask: `(B, T)` bool, int or float; not 0 marks completion tokens.
        advantages: `(B, T)`, `(B, 1)` or `(B,)`.
    """
    live = action_mask.bool()
    rows, width = logprob.shape
    columns = advantages.unsqueeze(-1) if advantages.dim() == 1 else advantages
    dtype = torch.promote_types(logprob.dtype, torch.float32)
    logps, old_logps = logprob[live].to(dtype), old_logprob.detach()[live].to(dtype)
    packed_advantages = columns.detach().expand(rows, width)[live].to(dtype)
    sequence_ids = torch.arange(rows, device=live.device).unsqueeze(-1).expand(rows, width)[live]

    tokens = policy.packed(logps, old_logps, packed_advantages, sequence_ids, rows)
    weights = padded_token_weights(live, policy.loss_agg_mode, policy.loss_agg_norm).to(dtype)[sequence_ids]
    loss = (tokens.losses * weights).sum()

    log_ratios = log_ratio(logps.detach(), old_logps, sequence_ids, rows, policy.ratio_level)
    ratio, _ = bounded_ratio(log_ratios, policy.log_ratio_clamp)
    means = {
        "ppo_kl": old_logps - logps.detach(),
        "avg_ratio": ratio,
        "pos_adv_frac": (packed_advantages > 0).to(dtype),
        **policy.token_metrics(ratio, packed_advantages),
    }
    count = max(logps.numel(), 1)
    metrics = {f"{policy.name}_loss": loss.detach()} | {key: value.sum() / count for key, value in means.items()}
    return loss, dict(zip(metrics, map(float, torch.stack(list(metrics.values())).cpu()), strict=True))


def padded_token_weights(mask: Tensor, mode: str, normalizer: float | None = None) -> Tensor:
    """Return `(B,)` token weights of a padded `(B, T)` batch taken as the whole batch, in Trinity-RFT's convention.

    Every row counts in a mean over sequences, fully masked ones included. `seq-mean-token-sum-norm` is, as there, the
    sum of all token losses over `normalizer` (T where None): unlike `token_weights`, it does not divide by the number
    of rows.
    """
    lengths = mask.sum(-1)
    summed = mode == "seq-mean-token-sum-norm"
    return token_weights(
        lengths,
        mode,
        num_sequences=1 if summed else lengths.numel(),
        num_tokens=int(lengths.sum()),
        normalizer=mask.shape[-1] if normalizer is None else normalizer,
    )


def aggregate_loss(
    values: Tensor, mask: Tensor, loss_agg_mode: str = "token-mean", normalizer: float | None = None
) -> Tensor:
    """Return the aggregate `()` of padded token losses `(B, T)` where `mask` (bool, int or float) is not 0.

    Values under the mask may be inf or NaN: they reach neither the result nor its gradient with respect to `values`.
    Rows and normaliser count as `padded_token_weights` says.

    Raises:
        ValueError: an unknown mode.
    """
    live = mask.bool()
    weights = padded_token_weights(live, loss_agg_mode, normalizer).to(values.dtype)
    return (torch.where(live, values, 0) * weights.unsqueeze(-1)).sum()


def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """Return the mean of `values` where `mask` (same shape; bool, int or float) is not 0; 0 where nothing is.

    Over everything, or over `axis`. The mean is exact: Trinity-RFT adds 1e-8 to the count, so the two differ by a few
    1e-9.
    """
    live = mask.bool()
    kept = torch.where(live, values, 0)
    if axis is None:
        return kept.sum() / live.sum().clamp(min=1)
    return kept.sum(axis) / live.sum(axis).clamp(min=1)
