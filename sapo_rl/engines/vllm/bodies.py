"""What a rollout server takes in the bodies of calls: shapes, types, ranges. vLLM itself takes more, and hangs."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Json, ValidationError

from sapo_rl.config.fields import MOST_SAMPLES
from sapo_rl.weights.rendezvous import Rendezvous

MOST_BYTES = 64 * 2**20
"""Of a body: a million tokens take 8 MB, the layout of a hundred thousand weights 15 MB."""
MOST_STOP_TOKENS = 128
"""As many as vLLM has room for."""

Name = Annotated[str, Field(max_length=1000)]
WeightId = Annotated[str, Field(max_length=1000, pattern=r"/[0-9]{1,18}$")]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1)]


class Body(BaseModel):
    """Arguments of a call: no others, none left out, and no text or fraction in the place of a whole number."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class InfoBody(Body):
    """Of `TrainerApi.info`."""

    run: Name


def _warm_or_greedy(temperature: float) -> float:
    if 0 < temperature < 0.01:  # logits cannot be divided by any number
        raise ValueError(f"Input should be 0, or at least 0.01, not {temperature}")
    return temperature


class SamplingBody(Body):
    """`base.Sampling`, in the ranges of `RolloutConfig`; a temperature of 0 is greedy."""

    temperature: Annotated[float, Field(ge=0, le=2), AfterValidator(_warm_or_greedy)]
    top_p: Annotated[float, Field(ge=1e-6, le=1)]
    top_k: Annotated[int, Field(ge=0, lt=2**31)]
    min_p: Annotated[float, Field(ge=0, le=1)]
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    logprobs: bool


class GenerateBody(Body):
    """Of `TrainerApi.generate`."""

    weight_id: WeightId
    token_ids: Tokens
    n: Annotated[int, Field(ge=1, le=MOST_SAMPLES)]
    seed: Annotated[int, Field(ge=0, lt=2**63 - MOST_SAMPLES)] | None
    sampling: SamplingBody
    stop_token_ids: Annotated[list[Token], Field(max_length=MOST_STOP_TOKENS)]


class ScoreBody(Body):
    """Of `TrainerApi.score`."""

    weight_id: WeightId
    token_ids: Tokens


class JoinBody(Body):
    """Of `TrainerApi.join`."""

    name: Name
    meeting: Json[Rendezvous]


class LoadBody(Body):
    """Of `TrainerApi.load`."""

    meeting: Name
    weight_id: WeightId
    layout: str


class LeaveBody(Body):
    """Of `TrainerApi.leave`."""

    run: Name


def what_is_wrong(error: ValidationError) -> str:
    """Say the first mistake in a sentence: where it is, what is asked for, and what was found."""
    first: dict[str, Any] = dict(error.errors(include_url=False, include_context=False)[0])
    where = ".".join(str(part) for part in first["loc"]) or "the body"
    found = "" if first["type"] in ("missing", "json_invalid", "value_error") else f", not {str(first['input'])[:80]}"
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {first['msg'].removeprefix('Value error, ')}{found}{more}"
