"""A check that an engine runs the trainer's weights: both score the same tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from sapo_rl.engines.base import Engine
from sapo_rl.errors import EngineError, EngineLost

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
"""Largest mean |difference| of vLLM's and the trainer's log-probabilities, in nats, by the dtype both compute in.

Measured on SmolLM2-135M on the CPU: 7e-6 in float32; 0.04 to 0.055 in bfloat16, where single unlikely tokens differ by
0.5 and a few updates hide in the rounding. Float32 thus shows weights that are one update old, bfloat16 those that are
several steps old.
"""


def verify(engine: Engine, token_ids: list[int], trainer_logps: Sequence[float], dtype: str, first: int = 1) -> float:
    """Return the mean |difference| of the engine's log-probabilities of `token_ids` from the trainer's, in nats.

    In bfloat16 compare likely tokens, such as a greedy completion: the rounding of the logits shows in the others.

    Args:
        engine: holds, it is claimed, the trainer's weights.
        token_ids: T tokens, T > 1.
        trainer_logps: T - 1 values at temperature 1, those of the tokens after the first.
        dtype: `float32` or `bfloat16`, in which both compute.
        first: position of the first token that counts.

    Raises:
        EngineError: the mean is beyond `TOLERANCE`: vLLM runs other weights, or computes otherwise.
    """
    pairs = list(zip(engine.score(token_ids), trainer_logps, strict=True))[first - 1 :]
    differences = [abs(a - b) for a, b in pairs]
    mean, largest = sum(differences) / len(differences), max(differences)
    if not mean <= TOLERANCE[dtype]:  # NaN fails too
        raise EngineError(
            f"vLLM (weight version {engine.weight_version}) and the trainer disagree on the log-probabilities of "
            f"{len(pairs)} tokens: mean |difference| {mean:.3g}, largest {largest:.3g}; "
            f"in {dtype} the mean should be below {TOLERANCE[dtype]:g}"
        )
    return mean


def verify_all(
    engines: Sequence[Engine], token_ids: list[int], trainer_logps: Sequence[float], dtype: str, first: int = 1
) -> list[float]:
    """Return what `verify` says of each engine that can be reached. Raises EngineError as `verify` does."""
    found: list[float] = []
    for engine in engines:
        with contextlib.suppress(EngineLost):  # a server that is away gets the weights before it writes again
            found.append(verify(engine, token_ids, trainer_logps, dtype, first))
    return found
