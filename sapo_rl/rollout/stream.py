"""Prompts in, groups of samples out, over all engines of a rank."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from sapo_rl.config import RolloutConfig
from sapo_rl.rollout.engine import Completion, Engine, EngineError, EngineLost, Request, Sampling
from sapo_rl.rollout.spread import Spread, Usage
from sapo_rl.types import Group, Prompt, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
"""Largest mean |difference| of vLLM's and the trainer's log-probabilities, in nats, by the dtype both compute in.

Measured on SmolLM2-135M on the CPU: 7e-6 in float32; 0.04 to 0.055 in bfloat16, where single unlikely tokens differ by
0.5 and a few updates hide in the rounding. Float32 thus shows weights that are one update old, bfloat16 those that are
several steps old.
"""


def sampling_of(cfg: RolloutConfig) -> Sampling:
    """Return the sampling that `cfg` asks for."""
    return Sampling(
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        top_k=cfg.top_k,
        min_p=cfg.min_p,
        repetition_penalty=cfg.repetition_penalty,
        max_tokens=cfg.max_completion_tokens,
        logprobs=cfg.logprobs,
    )


def request_seed(seed: int, step: int, index: int) -> int:
    """Return a seed below 2^62 for prompt `index` in `step` of a run, far from any other: vLLM counts up from it."""
    digest = hashlib.blake2b(f"{seed}/{step}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


class Written(NamedTuple):
    """What the engines answered to one call."""

    groups: list[Group]
    """In the prompts' order."""
    usage: Usage
    """How long they wrote."""


class Rollouts:
    """Generates groups with the weights that the engines hold.

    Args:
        engines: all with the same weights; each takes the next prompt whenever it has room, the samples of a prompt
            together, so that none is idle while another has a queue.
        cfg: sampling and group size.
        tokenizer: decodes completions, those of a prompt at once.
        seed: the run's.
        reproducible: seed every completion by run, step and prompt, so that the engines' number and state do not count.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        cfg: RolloutConfig,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        reproducible: bool,
    ) -> None:
        self.engines = engines
        self.group_size = cfg.group_size
        self.capacity = cfg.max_num_seqs
        self.patience = cfg.start_timeout
        self.sampling = sampling_of(cfg)
        self.tokenizer = tokenizer
        self.seed = seed
        self.reproducible = reproducible

    def generate(self, prompts: Sequence[Prompt], step: int, n: int | None = None) -> list[Group]:
        """Sample `n` completions (default: the group size) of each prompt; groups in the prompts' order."""
        return self.write(prompts, step, n).groups

    def write(
        self,
        prompts: Sequence[Prompt],
        step: int,
        n: int | None = None,
        on_group: Callable[[Group], None] = lambda group: None,
    ) -> Written:
        """Do as `generate`, which may be under way in several threads where all engines are on this machine.

        `on_group` gets each group as soon as it is finished, in the thread of the engine that wrote it.
        """
        requests = [
            Request(
                prompt.token_ids,
                n or self.group_size,
                request_seed(self.seed, step, prompt.index) if self.reproducible else None,
            )
            for prompt in prompts
        ]
        return self._run(prompts, requests, self.sampling, on_group)

    def greedy(self, prompts: Sequence[Prompt], most: int | None = None) -> list[Group]:
        """Return the likeliest completion of each prompt, token by token, `most` at most: groups of one."""
        requests = [Request(prompt.token_ids, 1) for prompt in prompts]
        limit = min(self.sampling.max_tokens, most or self.sampling.max_tokens)
        sampling = replace(self.sampling, temperature=0.0, logprobs=False, max_tokens=limit)
        return self._run(prompts, requests, sampling, lambda group: None).groups

    def sleep(self) -> None:
        """Have the engines free the GPU's memory, as far as their settings say, until the next call or weights."""
        _at_once([engine.sleep for engine in self.engines])

    def _run(
        self,
        prompts: Sequence[Prompt],
        requests: list[Request],
        sampling: Sampling,
        on_group: Callable[[Group], None],
    ) -> Written:
        finished: dict[int, Group] = {}
        if not requests:
            return Written([], Usage([], 0.0))
        # Where all fit at once each engine gets an even share; else each keeps as many waiting as it decodes.
        share = math.ceil(sum(request.n for request in requests) / len(self.engines))
        window = min(share, 2 * self.capacity)

        def answer(engine: Engine, version: int, i: int, completions: list[Completion]) -> None:
            finished[i] = self._group(prompts[i], completions, version)
            on_group(finished[i])

        usage = Spread(self.engines, requests, window, sampling, self.patience, answer).run()
        return Written([finished[i] for i in range(len(prompts))], usage)

    def _group(self, prompt: Prompt, completions: Sequence[Completion], version: int) -> Group:
        texts = self.tokenizer.batch_decode([one.token_ids for one in completions], skip_special_tokens=True)
        return Group(
            prompt,
            [
                Sample(one.token_ids, one.truncated, version, one.logps, text=text)
                for one, text in zip(completions, texts, strict=True)
            ],
        )


def _at_once(tasks: Sequence[Callable[[], None]]) -> None:
    """Run the tasks in threads of their own; raise what the first of them raised, once all have ended."""
    with ThreadPoolExecutor(max(1, len(tasks))) as pool:
        futures = [pool.submit(task) for task in tasks]
    for future in futures:
        future.result()


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
