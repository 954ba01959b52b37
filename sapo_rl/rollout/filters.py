"""Sampling filters: vLLM samples from another distribution than the one whose log-probabilities are trained."""

from __future__ import annotations

import math

from sapo_rl.config import RolloutConfig


def filter_warning(rollout: RolloutConfig, corrected: bool) -> str | None:
    """Return what to say where filters are on and nothing weighs them out; None elsewhere.

    Args:
        rollout: the sampling.
        corrected: whether each token is weighed by the trainer's probability over vLLM's.
    """
    filters = rollout.filters
    if not filters or corrected:
        return None
    named = ", ".join(f"rollout.{key}={value:g}" for key, value in filters.items())
    most = (
        f"at most {-math.log(rollout.top_p):.2g}"
        if [*filters] == ["top_p"]
        else "about 0.07 at top_k=50, 0.2 at min_p=0.1"
    )
    return (
        f"{named}: vLLM samples from a part of the distribution, the trainer scores the whole; they differ by {most} "
        "nats a token. rollout.logprobs=true measures it as mismatch/kl_k1, and loss.correction.mode=token_truncate "
        "then corrects it (docs/sapo.md)"
    )
