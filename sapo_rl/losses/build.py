"""From a loss's name and settings to the function that the trainer calls on each packed micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sapo_rl.losses.base import POLICY_LOSS_FN, BatchPolicyLossFn, PolicyLossFn, TokenLosses
from sapo_rl.losses.correction import MismatchCorrection
from sapo_rl.losses.divergence import KLPenalty
from sapo_rl.losses.ratio import log_ratio
from sapo_rl.plugins import parameters_of


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """One packed micro-batch: T trained tokens of S whole sequences, contiguous, with ascending ids.

    A sequence is an episode: all that the model wrote in it, over whatever rows it was packed in.

    Example:
        >>> import torch
        >>> logps = torch.tensor([-0.5, -1.0, -2.0])  # two episodes, of two tokens and of one
        >>> LossInputs(
        ...     logps=logps,
        ...     old_logps=logps,
        ...     advantages=torch.tensor([1.0, 1.0, -1.0]),
        ...     sequence_ids=torch.tensor([0, 0, 1]),
        ...     num_sequences=2,
        ...     token_weights=torch.tensor([0.25, 0.25, 0.5]),
        ... ).token_weights.sum()
        tensor(1.)
    """

    logps: Tensor
    """`(T,)` float32 log-probabilities under the policy now; they carry the gradient."""
    old_logps: Tensor
    """`(T,)` the trainer's log-probabilities at rollout time."""
    advantages: Tensor
    """`(T,)`, one value a sequence."""
    sequence_ids: Tensor
    """`(T,)` int64 in 0..S-1."""
    num_sequences: int
    """S."""
    token_weights: Tensor
    """`(T,)` the aggregation: the loss is `(token_losses * token_weights).sum()`."""
    rollout_logps: Tensor | None = None
    """`(T,)` vLLM's log-probabilities, where a correction needs them."""
    ref_logps: Tensor | None = None
    """`(T,)` the reference model's log-probabilities, where there is one."""
    limit: Tensor | None = None
    """`()` what `BatchPolicyLossFn.batch_limit` found, for such a loss; None: this micro-batch is the whole batch."""


@dataclass(frozen=True, kw_only=True)
class LossOutputs:
    """What a micro-batch gives.

    Example:
        >>> import torch
        >>> now, then = torch.tensor([-0.5, -1.0]), torch.tensor([-0.5, -1.5])  # the second has grown: r = 1.65
        >>> ids, ones = torch.tensor([0, 0]), torch.ones(2)
        >>> build_loss("grpo")(
        ...     LossInputs(
        ...         logps=now,
        ...         old_logps=then,
        ...         advantages=ones,
        ...         sequence_ids=ids,
        ...         num_sequences=1,
        ...         token_weights=ones / 2,
        ...     )
        ... )
        LossOutputs(loss=tensor(-1.1000), gradient_weight=tensor([1., 0.]), kl=None, correction=None)
    """

    loss: Tensor
    """`()` to be backpropagated: this micro-batch's share of the whole batch's loss."""
    gradient_weight: Tensor
    """`(T,)` detached c with d(policy term) / d logp = -A * ratio * c, before aggregation and correction."""
    kl: Tensor | None
    """`(T,)` detached KL estimate to the reference, where there is one."""
    correction: Tensor | None
    """`(T,)` detached factor on the policy term, where a correction is set."""


@dataclass(frozen=True)
class PackedLoss:
    """A policy loss with its penalty and its correction: a pure function of a packed micro-batch.

    Example:
        >>> build_loss("grpo", kl={"coef": 0.02}).penalty
        KLPenalty(coef=0.02, kind='k3')
    """

    policy: PolicyLossFn
    penalty: KLPenalty
    correction: MismatchCorrection

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """Return policy term times correction, plus KL penalty, summed with the batch's token weights."""
        tokens = self._policy_term(inputs)
        factor = self.correction.tokens(
            inputs.logps,
            inputs.old_logps,
            inputs.advantages,
            inputs.rollout_logps,
            inputs.sequence_ids,
            inputs.num_sequences,
        )
        kl = self.penalty.tokens(inputs.logps, inputs.ref_logps)
        losses = tokens.losses if factor is None else tokens.losses * factor
        if kl is not None and self.penalty.coef > 0:
            losses = losses + self.penalty.coef * kl
        return LossOutputs(
            loss=(losses * inputs.token_weights.to(losses.dtype)).sum(),
            gradient_weight=tokens.gradient_weight,
            kl=None if kl is None else kl.detach(),
            correction=factor,
        )

    def _policy_term(self, inputs: LossInputs) -> TokenLosses:
        packed = (inputs.logps, inputs.old_logps, inputs.advantages, inputs.sequence_ids, inputs.num_sequences)
        if inputs.limit is None or not isinstance(self.policy, BatchPolicyLossFn):
            return self.policy.packed(*packed)
        log_ratios = log_ratio(
            inputs.logps, inputs.old_logps, inputs.sequence_ids, inputs.num_sequences, self.policy.ratio_level
        )
        return self.policy.within(log_ratios, inputs.advantages, inputs.limit)


def build_loss(name: str | type[PolicyLossFn], **settings: Any) -> PackedLoss:
    """Return the loss called `name` as a pure function of a packed micro-batch.

    Args:
        name: a name in `POLICY_LOSS_FN`, or a class such as those in it.
        settings: the fields of the config's group `loss`, with `kl` and `correction` as dictionaries. What this loss
            does not use is accepted and has no effect; what is left out takes the class's default, not the recipes'.
            `args` holds further fields of a class, which go before those beside it; a loss named by text takes none.

    Raises:
        UnknownNameError: no such loss.
        ValueError: a setting out of its range, or one that no loss knows.
    """
    loss_class = POLICY_LOSS_FN.get(name) if isinstance(name, str) else name
    penalty = KLPenalty(**settings.pop("kl", {}))
    correction = MismatchCorrection(**settings.pop("correction", {}))
    args = settings.pop("args", {})
    if args and isinstance(name, str):
        raise ValueError(f"loss '{name}' takes no args; its settings are keys of their own")
    own = _settings_of(loss_class)
    if unknown := sorted(args.keys() - own):
        raise ValueError(f"unknown argument '{unknown[0]}' of {loss_class.__name__}; valid: {', '.join(sorted(own))}")
    known = own.union(*(_settings_of(POLICY_LOSS_FN.get(other)) for other in POLICY_LOSS_FN))
    if unknown := sorted(settings.keys() - known):
        valid = ", ".join(sorted(known | {"kl", "correction"}))
        raise ValueError(f"unknown loss setting '{unknown[0]}'; valid: {valid}")
    policy = loss_class(**{key: value for key, value in settings.items() if key in own} | args)
    return PackedLoss(policy, penalty, correction)


def _settings_of(loss_class: type[PolicyLossFn]) -> set[str]:
    return set(parameters_of(loss_class))
