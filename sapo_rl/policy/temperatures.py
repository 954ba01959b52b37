"""SAPO's temperatures over the steps of a run, where they set themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from sapo_rl.config import Config
from sapo_rl.config.loss import LossConfig
from sapo_rl.losses import GatedKL, Reduction, inert_temperature_warning
from sapo_rl.policy.trace import Trace, packed


class Temperatures:
    """What multiplies `loss.tau_pos` and `loss.tau_neg`, from the tokens of the step before; equal on all ranks.

    A step goes half the way, in the logarithm, to the scale that would have kept the step before to the budget: with
    other temperatures its tokens would have drifted otherwise.

    Example:
        >>> Temperatures(LossConfig(tau_target_kl=0.01)).loss.tau_pos
        1.0
    """

    def __init__(self, config: LossConfig) -> None:
        self._config = config
        self.scale = 1.0

    @property
    def adapt(self) -> bool:
        """Whether they set themselves."""
        return self._config.tau_target_kl is not None

    @property
    def loss(self) -> LossConfig:
        """The settings of the loss in the step that follows."""
        if not self.adapt:
            return self._config
        return replace(
            self._config, tau_pos=self._config.tau_pos * self.scale, tau_neg=self._config.tau_neg * self.scale
        )

    def observe(self, traces: Sequence[Trace], device: torch.device, across: Reduction) -> dict[str, float]:
        """Choose those of the next step from what this one left on all ranks; return what this one had."""
        target, config = self._config.tau_target_kl, self._config
        if target is None:
            return {}
        now = self.loss
        drift = GatedKL(
            *packed(traces, device),
            tau_pos=config.tau_pos,
            tau_neg=config.tau_neg,
            gate=config.gate,
            sides=config.sides,
            ratio_level=config.ratio_level,
            log_ratio_clamp=config.log_ratio_clamp,
            across=across,
        )
        found = torch.stack([drift(drift.tokens.new_tensor(self.scale)), drift.scale(target), drift.tokens])
        gated, wanted, tokens = found.tolist()
        if tokens:
            self.scale = math.sqrt(self.scale * wanted)
        return {"policy/tau_pos": now.tau_pos, "policy/tau_neg": now.tau_neg, "policy/kl_gated": gated}


def temperature_warning(config: Config) -> str | None:
    """Return what to tell where SAPO's temperatures cannot do their work in this run, else None."""
    loss, updates = config.loss, config.trainer.updates_per_rollout
    if loss.name != "sapo" or loss.gradient != "paper" or (loss.tau_target_kl is not None and updates > 1):
        return None
    stale = config.rollout.overlaps or config.rollout.replay.size > 0
    fresh = loss.old_logps != "rollout" or not stale  # else the ratio is taken against an older policy
    return inert_temperature_warning(updates, loss.tau_pos, loss.tau_neg, fresh_rollouts=fresh)
