"""Random ragged batches, and their loss and gradient under any cut into micro-batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sapo_rl.losses import BatchPolicyLossFn, LossInputs, PackedLoss, Reduction, build_loss, token_weights

Rows = list[int]
ALONE = Reduction()
SETTINGS: dict[str, dict[str, Any]] = {
    "sapo": {"gradient": "paper"},
    "sapo-detached": {"name": "sapo", "gradient": "detached"},
    "sapo-sequence": {"name": "sapo", "gradient": "paper", "ratio_level": "sequence"},
    "sapo-erf": {"name": "sapo", "gradient": "paper", "gate": "erf", "tau_pos": 3.0, "tau_neg": 4.0},
    "sapo-arctan": {"name": "sapo", "gradient": "paper", "gate": "arctan", "tau_pos": 3.0, "tau_neg": 4.0},
    "sapo-softsign": {"name": "sapo", "gradient": "paper", "gate": "softsign", "tau_pos": 3.0, "tau_neg": 4.0},
    "sapo-one": {"name": "sapo", "gradient": "paper", "sides": "one"},
    "sapo-one-sequence": {"name": "sapo", "gradient": "paper", "sides": "one", "ratio_level": "sequence"},
    "sapo-one-erf": {"name": "sapo", "gradient": "paper", "sides": "one", "gate": "erf", "tau_neg": 4.0},
    "grpo": {},
    "grpo-dual": {"name": "grpo", "clip_high": 0.28, "dual_clip": 1.5},
    "gspo": {"clip_low": 0.05, "clip_high": 0.08},
    "gmpo": {"clip_low": 0.2, "clip_high": 0.3},
    "cispo": {},
    "reinforce": {},
    "dppo": {"clip_low": 0.05, "clip_high": 0.08},
    "dppo_kl": {"clip_low": 0.01, "clip_high": 0.02},
    "vespo": {},
    "m2po": {"m2_threshold": 0.02},
    "cppo": {"clip_low": 0.05, "clip_high": 0.08, "prefix_budget": 0.01, "weight_floor": 0.5},
}
"""Every loss of the family at least once."""


@dataclass(frozen=True)
class Batch:
    """Sequences of a whole optimiser batch, packed; float64."""

    logps: Tensor
    old_logps: Tensor
    advantages: Tensor
    rollout_logps: Tensor
    ref_logps: Tensor
    lengths: Tensor

    @property
    def sequence_ids(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)

    def tokens_of(self, rows: Rows) -> Tensor:
        """Positions of the tokens of `rows`, in the order of `rows`."""
        ids = self.sequence_ids
        return torch.cat([(ids == row).nonzero().flatten() for row in rows] or [torch.empty(0, dtype=torch.long)])


def make_batch(lengths: list[int], seed: int, drift: float = 0.3) -> Batch:
    """A batch with one advantage a sequence, whose log ratios have standard deviation `drift`."""
    draw = torch.Generator().manual_seed(seed)
    count = sum(lengths)

    def noise(scale: float, size: int = count) -> Tensor:
        return scale * torch.randn(size, generator=draw, dtype=torch.float64)

    lengths_S = torch.tensor(lengths)
    old = -0.1 - noise(1.0).abs()
    return Batch(
        logps=old + noise(drift),
        old_logps=old,
        advantages=noise(1.0, len(lengths)).repeat_interleave(lengths_S),
        rollout_logps=old + noise(0.2),
        ref_logps=old + noise(0.5),
        lengths=lengths_S,
    )


def inputs_of(batch: Batch, logps: Tensor, rows: Rows, mode: str, normalizer: float = 16.0) -> LossInputs:
    """The packed micro-batch that holds `rows` of the batch, weighted as part of the whole."""
    tokens, lengths = batch.tokens_of(rows), batch.lengths[rows]
    weights = token_weights(
        lengths,
        mode,
        num_sequences=len(batch.lengths),
        num_tokens=int(batch.lengths.sum()),
        normalizer=normalizer,
    )
    ids = torch.repeat_interleave(torch.arange(len(rows)), lengths)
    return LossInputs(
        logps=logps[tokens],
        old_logps=batch.old_logps[tokens],
        advantages=batch.advantages[tokens],
        sequence_ids=ids,
        num_sequences=len(rows),
        token_weights=weights[ids],
        rollout_logps=batch.rollout_logps[tokens],
        ref_logps=batch.ref_logps[tokens],
    )


def limit_of(loss: PackedLoss, batch: Batch, rows: Rows, across: Reduction) -> Tensor | None:
    """What the loss has to know of the whole batch, of which these are a rank's own rows; None for most."""
    if not isinstance(loss.policy, BatchPolicyLossFn):
        return None
    tokens = batch.tokens_of(rows)
    return loss.policy.batch_limit((batch.logps - batch.old_logps)[tokens], batch.advantages[tokens], across)


def loss_and_gradient(
    batch: Batch, micro_batches: list[Rows], mode: str, name: str, across: Reduction = ALONE, **settings: Any
) -> tuple[Tensor, Tensor]:
    """Summed loss `()` and gradient `(T,)` of the batch, or of a rank's rows of it, cut into `micro_batches`."""
    loss_fn = build_loss(**({"name": name} | SETTINGS[name] | settings))
    logps = batch.logps.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    limit = limit_of(loss_fn, batch, [row for rows in micro_batches for row in rows], across)
    for rows in micro_batches:
        loss = loss_fn(replace(inputs_of(batch, logps, rows, mode), limit=limit)).loss
        loss.backward()
        total += loss.detach()
    assert logps.grad is not None
    return total, logps.grad


def permuted(batch: Batch, order: Rows) -> Batch:
    """The same batch with its sequences in another order."""
    tokens = batch.tokens_of(order)
    names = ("logps", "old_logps", "advantages", "rollout_logps", "ref_logps")
    return replace(batch, lengths=batch.lengths[order], **{name: getattr(batch, name)[tokens] for name in names})
