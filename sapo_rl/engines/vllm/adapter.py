"""Requests and completions in vLLM's terms; used where vLLM runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sapo_rl.engines.base import Completion, Request, Sampling

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.logprobs import FlatLogprobs


def sampling_params(request: Request, sampling: Sampling, stop_token_ids: list[int]) -> SamplingParams:
    """Return how vLLM is to complete one request: all completions in one answer, and no text."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=request.n,
        seed=request.seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        max_tokens=sampling.max_tokens,
        logprobs=0 if sampling.logprobs else None,
        flat_logprobs=sampling.logprobs,
        stop_token_ids=stop_token_ids,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def scoring_params() -> SamplingParams:
    """Return what makes vLLM tell the log-probabilities of a prompt."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def completions_of(output: RequestOutput) -> list[Completion]:
    """Return the completions of a finished request."""
    from vllm.logprobs import FlatLogprobs

    return [
        Completion(
            token_ids=list(one.token_ids),
            truncated=one.finish_reason == "length",
            logps=_sampled(one.logprobs) if isinstance(one.logprobs, FlatLogprobs) else None,
            cached=output.num_cached_tokens or 0,
        )
        for one in output.outputs
    ]


def scores_of(output: RequestOutput) -> list[float]:
    """Return the log-probability of each token of the prompt but the first."""
    token_ids, positions = output.prompt_token_ids or [], output.prompt_logprobs or []
    return [entry[token].logprob for token, entry in zip(token_ids, positions, strict=True) if entry]


def _sampled(flat: FlatLogprobs) -> list[float]:
    """The first entry of each position is the sampled token's."""
    return [flat.logprobs[start] for start in flat.start_indices]
