"""SAPO, Soft Adaptive Policy Optimization (arXiv 2511.20347)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sapo_rl.losses.base import POLICY_LOSS_FN, PolicyLossFn, TokenLosses
from sapo_rl.losses.gates import by_sign, find_gate, gate_rise, gate_value, gate_weight
from sapo_rl.losses.ratio import bounded_ratio, check_dual_clip

GRADIENTS = ("paper", "detached")
"""How the gradient passes the gate."""
SIDES = ("both", "one")
"""Where the gate damps: on both sides of r = 1 (the paper), or where a token has moved with its advantage."""


def sapo_token_losses(
    logps: Tensor,
    log_ratios: Tensor,
    advantages: Tensor,
    *,
    tau_pos: float,
    tau_neg: float,
    gate: str = "sigmoid",
    gradient: str = "paper",
    sides: str = "both",
    dual_clip: float | None = None,
    log_ratio_clamp: float = 20.0,
) -> TokenLosses:
    """Return SAPO's loss of each packed token.

    With r = exp(log_ratios), tau by the advantage's sign, f the gate and w = f' its slope:

    * `paper`: loss -f(r) A, differentiated through the gate, so d loss / d logp = -A w r (equations 5-8);
    * `detached`: loss -A f(r) logp with f held constant, so d loss / d logp = -A f(r), as Trinity-RFT publishes it.
      That is 2 / tau times the paper's gradient at r = 1, and it grows with r where the paper's vanishes.

    With `sides` = `one` the loss is that of `one_sided_token_losses`, and `gradient` must be `paper`.

    Args:
        logps: `(T,)` log-probabilities now; only `detached` reads them.
        log_ratios: `(T,)` log r, differentiable, by token or by sequence.
        advantages: `(T,)`.
        tau_pos: temperature where A > 0.
        tau_neg: temperature where A <= 0.
        gate: one of `GATES`.
        gradient: `paper` or `detached`.
        sides: `both` or `one`.
        dual_clip: with `sides` = `one`, see there; else None.
        log_ratio_clamp: bound on |log r|.

    Raises:
        ValueError: `sides` = `one` with another gradient than `paper`.
    """
    if sides == "one":
        check_sides(sides, gradient)
        return one_sided_token_losses(
            log_ratios,
            advantages,
            tau_pos=tau_pos,
            tau_neg=tau_neg,
            gate=gate,
            dual_clip=dual_clip,
            log_ratio_clamp=log_ratio_clamp,
        )
    ratio, inside = bounded_ratio(log_ratios, log_ratio_clamp)
    tau = by_sign(advantages, tau_pos, tau_neg)
    value = gate_value(ratio, tau, gate)
    if gradient == "paper":
        return TokenLosses(-value * advantages, gate_weight(ratio.detach(), tau, gate) * inside)
    coefficient = value.detach()
    return TokenLosses(-advantages * coefficient * logps, coefficient / ratio.detach())


def one_sided_token_losses(
    log_ratios: Tensor,
    advantages: Tensor,
    *,
    tau_pos: float,
    tau_neg: float,
    gate: str = "sigmoid",
    dual_clip: float | None = None,
    log_ratio_clamp: float = 20.0,
) -> TokenLosses:
    """Return -min(r A, (1 + f(r) - f(1)) A) of each packed token, all tensors `(T,)`.

    Both terms are A with slope A at r = 1, and the slope of the second is w(r) A with w <= 1. The minimum is therefore
    the gated term where the token has moved with its advantage (A > 0 and r > 1, or A < 0 and r < 1), with weight w,
    and the plain ratio where it has moved against it, with weight 1: PPO's clip with a soft edge. As there,
    d loss / d logp = -A r has no bound where A < 0 and r is large, short of `log_ratio_clamp`; with `dual_clip` = c
    (arXiv 1912.09729) the loss is -c A above r = c, and the gradient 0.
    """
    ratio, inside = bounded_ratio(log_ratios, log_ratio_clamp)
    ceiling = float("inf") if dual_clip is None else dual_clip
    tau = by_sign(advantages, tau_pos, tau_neg)
    now = ratio.detach()
    # chosen by its sign, as the minimum would be, but free of rounding where the two terms nearly agree
    moved_with = torch.where(advantages > 0, now > 1, now < 1)
    plain = torch.where(advantages > 0, ratio, ratio.clamp(max=ceiling))
    gated = torch.where(moved_with, 1 + gate_rise(ratio, tau, gate), plain)
    whole = ((advantages > 0) | (now <= ceiling)).to(now.dtype)
    weight = torch.where(moved_with, gate_weight(now, tau, gate), whole)
    return TokenLosses(-gated * advantages, weight * inside)


def check_sides(sides: str, gradient: str, dual_clip: float | None = None) -> None:
    """Raise ValueError unless `sides` is one of `SIDES`, and `both` where the gradient is `detached`.

    A dual clip must be above 1, and is for `one`.
    """
    if sides not in SIDES:
        raise ValueError(f"unknown sides '{sides}'; valid: {', '.join(SIDES)}")
    if sides == "one" and gradient != "paper":
        raise ValueError(f"sides 'one' needs gradient 'paper', found '{gradient}'")
    if dual_clip is not None and sides != "one":
        raise ValueError(f"dual_clip needs sides 'one', found '{sides}'; both sides of the gate have a bound already")
    check_dual_clip(dual_clip)


def check_temperatures(tau_pos: float, tau_neg: float, *, strict: bool) -> None:
    """Raise ValueError unless both temperatures are above 0 and finite and, where `strict`, tau_neg >= tau_pos."""
    for key, tau in (("tau_pos", tau_pos), ("tau_neg", tau_neg)):
        if not 0 < tau < float("inf"):
            raise ValueError(f"{key} must be above 0 and finite, found {tau}")
    if strict and tau_neg < tau_pos:
        raise ValueError(
            f"tau_neg ({tau_neg}) is below tau_pos ({tau_pos}), which the paper found the least stable; "
            "raise tau_neg, or set strict_temperatures to false"
        )


@POLICY_LOSS_FN.register_module("sapo")
@dataclass
class SAPOPolicyLossFn(PolicyLossFn):
    """SAPO's loss with the published Trinity-RFT class's defaults; recipes set what the paper says instead.

    The defaults here, `gradient="detached"` and `loss_agg_mode="token-mean"`, reproduce that class. The paper's
    objective is `gradient="paper"` and `loss_agg_mode="seq-mean-token-mean"`, which every recipe in `configs/loss`
    sets.

    In the padded call a mean over sequences counts every row, fully masked ones included, as Trinity-RFT does;
    `token-mean` divides by the live tokens alone, and `seq-mean-token-sum-norm` by `loss_agg_norm` alone. Metrics:
    `sapo_loss`, `ppo_kl` (mean of old - new log-probability), `avg_soft_gate`, `avg_ratio`, `pos_adv_frac`.

    Raises:
        ValueError: a temperature that is not above 0; `tau_neg < tau_pos` under `strict_temperatures`; an unknown gate,
            gradient, aggregation, ratio level or choice of sides; one side with the detached gradient; a dual clip that
            is not above 1, or with both sides.

    Example:
        >>> logps, mask = torch.tensor([[-0.5, -1.0]]), torch.tensor([[1, 1]])
        >>> SAPOPolicyLossFn(tau_pos=1.0, tau_neg=1.05)(logps, logps, mask, torch.tensor([2.0]))[0]
        tensor(3.)
    """

    name: ClassVar[str] = "sapo"
    tau_pos: float = 1.0
    """Temperature of tokens with positive advantage."""
    tau_neg: float = 1.05
    """Temperature of all other tokens."""
    _: KW_ONLY
    gradient: str = "detached"
    """`paper` or `detached`; see `sapo_token_losses`."""
    gate: str = "sigmoid"
    """One of `GATES`."""
    sides: str = "both"
    """`both`, or `one` for `one_sided_token_losses`."""
    dual_clip: float | None = None
    """With `one`: bound on the ratio where the advantage is negative, above 1; None is off."""
    strict_temperatures: bool = True
    """Refuse `tau_neg < tau_pos`, the least stable order in the paper's ablation (which runs 0.95)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperatures(self.tau_pos, self.tau_neg, strict=self.strict_temperatures)
        if self.gradient not in GRADIENTS:
            raise ValueError(f"unknown gradient '{self.gradient}'; valid: {', '.join(GRADIENTS)}")
        find_gate(self.gate)
        check_sides(self.sides, self.gradient, self.dual_clip)

    @classmethod
    def default_args(cls) -> dict[str, Any]:
        """Return the defaults of the settings that the published class has."""
        return {"tau_pos": 1.0, "tau_neg": 1.05, "loss_agg_mode": "token-mean"}

    def soft_gate_function(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """Return f(ratio), by default `sigmoid(tau (ratio - 1)) * 4 / tau`; shapes broadcast, A = 0 takes `tau_neg`."""
        return gate_value(ratio, by_sign(advantages.to(ratio.dtype), self.tau_pos, self.tau_neg), self.gate)

    def token_losses(self, logps: Tensor, log_ratios: Tensor, advantages: Tensor) -> TokenLosses:
        """Return `sapo_token_losses` with this object's settings."""
        return sapo_token_losses(
            logps,
            log_ratios,
            advantages,
            tau_pos=self.tau_pos,
            tau_neg=self.tau_neg,
            gate=self.gate,
            gradient=self.gradient,
            sides=self.sides,
            dual_clip=self.dual_clip,
            log_ratio_clamp=self.log_ratio_clamp,
        )

    def token_metrics(self, ratio: Tensor, advantages: Tensor) -> dict[str, Tensor]:
        """Return the gate's value per token, reported as `avg_soft_gate`; it is 2 / tau, not 1, on-policy."""
        return {"avg_soft_gate": self.soft_gate_function(ratio, advantages)}
