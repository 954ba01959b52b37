"""The sections on advantages and the objective."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Optional

from sapo_rl.config.fields import choice, number


@dataclass
class AdvantageConfig:
    """How rewards of a group become advantages."""

    name: str = choice("group", "group", own="advantage function")
    """`group` normalises within the group by the keys below, or the dotted path of your own `f(rewards, **args)`: the
    weighted rewards of one group, None where none applies, to a number each. Of the other keys yours reads `args`,
    `skip_zero_spread` (of its numbers, all 0) and `mask_truncated`."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of an advantage function of your own."""
    scale: str = choice("group", "group", "batch", "none")
    """Divide by the standard deviation of the group, of the whole batch, or not at all."""
    baseline: str = choice("mean", "mean", "leave_one_out")
    """Subtract the group's mean, or the mean of the other samples."""
    combine: str = choice("sum", "sum", "normalize")
    """Several rewards: weighted sum, then normalised; or each normalised, then summed by weight (GDPO)."""
    eps: float = number(1e-6, above=0)
    """Added to the standard deviation."""
    skip_zero_spread: bool = True
    """Leave groups whose rewards are all equal out of the update. The gradient is the same, the time is saved."""
    mask_truncated: bool = False
    """Leave completions that the length limit cut out of the update; their rewards still enter the group's mean."""


@dataclass
class KLConfig:
    """Penalty on the distance to the model that training started from.

    Example:
        >>> KLConfig(coef=0.02).kind
        'k3'
    """

    coef: float = number(0.0, least=0)
    """Weight of the penalty; 0 keeps no reference model."""
    kind: str = choice("k3", "k1", "k2", "k3")
    """Estimator: `k1` log-ratio, `k2` half its square, `k3` low-variance and positive."""


@dataclass
class CorrectionConfig:
    """Correction of the mismatch between vLLM's and the trainer's log-probabilities; needs `rollout.logprobs`.

    Example:
        >>> CorrectionConfig(mode="token_truncate", high=2.0).low
        0.5
    """

    mode: str = choice("none", "none", "token_truncate", "token_mask", "sequence_mask")
    """Truncated importance sampling by token, or tokens (IcePop) or sequences masked outside the range."""
    low: float = number(0.5, least=0)
    """Smallest trainer/vLLM ratio that the masks keep."""
    high: float = number(2.0, above=0)
    """Largest ratio: the truncation, or what the masks keep."""
    stale_negative_kl: Optional[float] = None
    """Drop sequences of negative advantage whose mean log-ratio old - now is above this; null keeps all."""

    @property
    def by_token(self) -> bool:
        """Whether each token is weighed by the trainer's probability over vLLM's."""
        return self.mode in ("token_truncate", "token_mask")


SAPO = ("sapo",)
CLIPPED = ("grpo", "gspo", "gmpo", "cispo", "dppo", "dppo_kl", "cppo")
LEVELLED = ("sapo", "grpo", "cispo", "reinforce")
"""Built-in losses that read a key; a key without `users` is read by all."""


@dataclass
class LossConfig:
    """The objective of an update.

    Example:
        >>> LossConfig(name="sapo", tau_pos=4.0, tau_neg=4.2).sides
        'both'
    """

    name: str = choice(
        "sapo",
        *("sapo", "grpo", "gspo", "gmpo", "cispo", "reinforce", "dppo", "dppo_kl", "cppo", "m2po", "vespo"),
        own="policy loss",
    )
    """Policy loss, or the dotted path of a class of your own: `package.module.Name`; docs/sapo.md."""
    args: dict[str, Any] = field(default_factory=dict, metadata={"users": ("",)})
    """Settings of a loss of your own: fields of its class by name. Built-in losses take the keys below."""
    tau_pos: float = number(1.0, above=0, users=SAPO)
    """SAPO's temperature where the advantage is positive. The gradient's weight halves at |ratio - 1| = 1.763 / tau."""
    tau_neg: float = number(1.05, above=0, users=SAPO)
    """SAPO's temperature for the other tokens; the paper takes it above `tau_pos`."""
    tau_target_kl: Optional[float] = field(default=None, metadata={"users": SAPO})
    """Experimental, in no paper: a bound on `policy/kl_gated`. Each step multiplies both temperatures by 1 to 64, as
    the tokens of the step before would have kept to it; null leaves them as they are."""
    strict_temperatures: bool = field(default=True, metadata={"users": SAPO})
    """Refuse `tau_neg < tau_pos`, which the paper found to be the least stable."""
    gradient: str = choice("paper", "paper", "detached", users=SAPO)
    """`paper` differentiates through the gate; `detached` is the published Trinity-RFT form."""
    gate: str = choice("sigmoid", "sigmoid", "erf", "arctan", "softsign", users=SAPO)
    """Shape of SAPO's gate."""
    sides: str = choice("both", "both", "one", users=SAPO)
    """Sides of ratio 1 that SAPO's gate damps: `both` (the paper), or `one`, where a token moves with its advantage."""
    ratio_level: str = choice("token", "token", "sequence", users=LEVELLED)
    """Ratio of each token, or the length-normalised ratio of its sequence."""
    log_ratio_clamp: float = number(20.0, above=0, most=80)
    """Bound on |log ratio| before it is exponentiated; float32 overflows at 88.7."""
    clip_low: float = number(0.2, least=0, users=CLIPPED)
    """Lower clip range of grpo, gspo and cispo; bound on -log ratio of gmpo (where 0.4 is usual), on the divergence of
    dppo, dppo_kl (where 0.05 is) and cppo (0.15)."""
    clip_high: float = number(0.2, least=0, users=CLIPPED)
    """Upper clip range, or bound where the advantage is positive."""
    prefix_budget: float = number(0.02, least=0, users=("cppo",))
    """CPPO's bound on the mean divergence of the tokens before a token; above it the token's own bound shrinks."""
    weight_floor: float = number(0.8, above=0, most=1, users=("cppo",))
    """CPPO's weight of a completion's last token, which falls linearly from 1 at the first."""
    m2_threshold: float = number(0.04, above=0, users=("m2po",))
    """M2PO's bound on the mean of log^2 r over the tokens of an update that have moved with their advantage."""
    dual_clip: Optional[float] = field(default=None, metadata={"users": ("grpo", "gspo", *SAPO)})
    """Bound on the ratio of negative advantages in grpo, gspo, and sapo with `sides` = `one`; above 1, null is off."""
    loss_agg_mode: str = choice(
        "seq-mean-token-mean", "seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
    )
    """How token losses become one number, over the whole batch of an update and all ranks."""
    loss_agg_norm: Optional[float] = None
    """Divisor of `seq-mean-token-sum-norm`; null takes `rollout.max_completion_tokens`, with an
    environment or tools `environment.max_tokens`."""
    old_logps: str = choice("recompute", "recompute", "rollout", "decoupled")
    """What the ratio is taken against: the trainer's log-probabilities before the step's first update (`recompute`),
    vLLM's when it sampled (`rollout`), or the former with a correction towards the latter (`decoupled`)."""
    kl: KLConfig = field(default_factory=KLConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)


CHOSEN_KEYS: dict[str, tuple[str, ...]] = {
    key.name: key.metadata["users"] for key in fields(LossConfig) if key.metadata.get("users")
}
"""Keys that some built-in losses do not read, with the names of those that do."""


def unread(name: str) -> dict[str, Any]:
    """Return the keys that the built-in loss `name` does not read, with their defaults; none for one of the user's."""
    defaults = LossConfig()
    return {key: getattr(defaults, key) for key, users in CHOSEN_KEYS.items() if "." not in name and name not in users}
