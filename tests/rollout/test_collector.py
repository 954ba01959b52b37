"""Prompts over engines and back as groups."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from tiny import make_tokenizer

from sapo_rl.config import RolloutConfig
from sapo_rl.engines.base import Completion, Request, Sampling
from sapo_rl.engines.parity import TOLERANCE, verify
from sapo_rl.errors import EngineError
from sapo_rl.rollout.collector import Rollouts, seed_of
from sapo_rl.types import Group, Prompt, Stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass
class Echo:
    """An engine whose completions say what it was asked: the prompt's tokens, then EOS, truncated where n is odd.

    It answers one request after the other.
    """

    eos: int
    weight_version: int = 0
    restarts: int = 0
    requests: list[Request] = field(default_factory=list)
    sampling: Sampling | None = None
    logps: list[float] = field(default_factory=list)
    asleep: bool = False
    pause: float = 0.001
    load: int = 0
    most: int = 0
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> list[Future[list[Completion]]]:
        self.sampling = sampling
        self.requests += requests
        self.load += sum(request.n for request in requests)
        self.most = max(self.most, self.load)
        return [self.thread.submit(self.answer, request, sampling) for request in requests]

    def answer(self, request: Request, sampling: Sampling) -> list[Completion]:
        time.sleep(self.pause)
        logps = [-1.0] if sampling.logprobs else None
        self.load -= request.n
        return [Completion([*request.token_ids, self.eos], i % 2 == 1, logps) for i in range(request.n)]

    def load_weights(self, layout: str, version: int) -> None:
        self.weight_version = version

    def sleep(self) -> None:
        self.asleep = True

    def score(self, token_ids: list[int]) -> list[float]:
        return self.logps

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def prompts(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Prompt]:
    return [Prompt(10 + i, tokenizer(text)["input_ids"], text, {}) for i, text in enumerate(texts)]


@pytest.mark.parametrize("engines", [1, 2, 3, 7])
def test_groups_come_back_whole_and_in_order(tokenizer: PreTrainedTokenizerFast, engines: int) -> None:
    fleet = [Echo(tokenizer.eos_token_id, weight_version=5 + i) for i in range(engines)]
    asked = prompts(tokenizer, ["1 + 1", "two", "3", "four 4", "5"])
    groups = (
        Rollouts(fleet, RolloutConfig(group_size=4), tokenizer, seed=0, reproducible=False).write(asked, step=1).groups
    )
    assert [group.prompt for group in groups] == asked
    for i, group in enumerate(groups):
        assert [sample.text for sample in group.samples] == [asked[i].content] * 4
        assert [sample.stop for sample in group.samples] == [Stop.STOP, Stop.LENGTH, Stop.STOP, Stop.LENGTH]
        assert all(sample.token_ids[-1] == tokenizer.eos_token_id for sample in group.samples)
        assert all(sample.rows[0].prompt_ids == group.prompt.token_ids for sample in group.samples)
        assert len({sample.versions for sample in group.samples}) == 1
        assert all(sample.rows[0].rollout_logps is None for sample in group.samples)
    assert max(one.most for one in fleet) < math.ceil(4 * len(asked) / engines) + 4  # an even share, in whole groups
    assert {sample.versions for group in groups for sample in group.samples} <= {(5 + i, 5 + i) for i in range(engines)}
    assert all(request.seed is None for one in fleet for request in one.requests)


def test_each_group_is_handed_over_decoded_when_it_is_finished(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = Echo(tokenizer.eos_token_id)
    seen: list[tuple[str, int]] = []
    rollouts = Rollouts([engine], RolloutConfig(group_size=2, max_num_seqs=2), tokenizer, seed=0, reproducible=False)
    groups = rollouts.write(
        prompts(tokenizer, list("abcdefgh")),
        step=1,
        on_group=lambda group: seen.append((group.samples[0].text, len(engine.requests))),
    ).groups
    assert [text for text, _ in seen] == [group.samples[0].text for group in groups] == list("abcdefgh")
    assert seen[0][1] < 8  # the last prompts were not even asked yet


def test_an_engine_with_room_takes_more_and_none_takes_all(tokenizer: PreTrainedTokenizerFast) -> None:
    slow, quick = Echo(tokenizer.eos_token_id, pause=0.2), Echo(tokenizer.eos_token_id, pause=0.01)
    asked = prompts(tokenizer, [str(i) for i in range(40)])
    cfg = RolloutConfig(group_size=2, max_num_seqs=4)
    groups = Rollouts([slow, quick], cfg, tokenizer, seed=0, reproducible=False).write(asked, step=1).groups
    assert [group.prompt for group in groups] == asked
    assert slow.most == quick.most == 8  # twice what an engine decodes, in whole groups
    assert 4 <= len(slow.requests) < len(quick.requests)


def test_sleep_reaches_every_engine(tokenizer: PreTrainedTokenizerFast) -> None:
    fleet = [Echo(tokenizer.eos_token_id) for _ in range(3)]
    Rollouts(fleet, RolloutConfig(), tokenizer, seed=0, reproducible=False).sleep()
    assert all(engine.asleep for engine in fleet)


def test_an_engine_that_fails_ends_the_call_and_what_the_others_do_for_it(tokenizer: PreTrainedTokenizerFast) -> None:
    class Patient(Echo):
        def submit(self, requests: Sequence[Request], sampling: Sampling) -> list[Future[list[Completion]]]:
            self.calls: list[Future[Any]] = [Future() for _ in requests]
            return self.calls

    class Failing(Echo):
        def answer(self, request: Request, sampling: Sampling) -> list[Completion]:
            raise EngineError("gone")

    fleet = [Patient(tokenizer.eos_token_id), Failing(tokenizer.eos_token_id)]
    with pytest.raises(EngineError, match="gone"):
        Rollouts(fleet, RolloutConfig(), tokenizer, 0, False).write(prompts(tokenizer, ["a", "b", "c"]), step=1)
    assert [call.cancelled() for call in fleet[0].calls] == [True, True]


def test_what_a_handed_over_group_raises_ends_the_call(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = Echo(tokenizer.eos_token_id, pause=0.02)
    rollouts = Rollouts([engine], RolloutConfig(group_size=2), tokenizer, seed=0, reproducible=False)

    def stop(group: Group) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rollouts.write(prompts(tokenizer, list("abcdefgh")), step=1, on_group=stop)
    engine.thread.shutdown()
    assert engine.load >= 2 * 6  # what had not begun was never answered


def test_seeds_depend_on_run_step_and_prompt_but_not_on_the_engines(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = prompts(tokenizer, ["a", "b", "c"])

    def seeds(count: int, seed: int, step: int) -> dict[tuple[int, ...], int | None]:
        fleet = [Echo(tokenizer.eos_token_id) for _ in range(count)]
        Rollouts(fleet, RolloutConfig(), tokenizer, seed, reproducible=True).write(asked, step)
        return {tuple(request.token_ids): request.seed for one in fleet for request in one.requests}

    assert seeds(1, 0, 1) == seeds(3, 0, 1)
    everything = [*seeds(1, 0, 1).values(), *seeds(1, 0, 2).values(), *seeds(1, 1, 1).values()]
    assert len(set(everything)) == 9


def test_seeds_are_far_apart_and_fit_64_bits() -> None:
    seeds = sorted(seed_of(run, step, index) for run in range(3) for step in range(20) for index in range(50))
    assert seeds[0] >= 0
    assert seeds[-1] < 2**62
    assert min(b - a for a, b in itertools.pairwise(seeds)) > 1_000_000  # vLLM counts up by one a sample


def test_the_config_decides_how_is_sampled(tokenizer: PreTrainedTokenizerFast) -> None:
    cfg = RolloutConfig(
        group_size=3,
        temperature=0.7,
        top_p=0.9,
        top_k=20,
        min_p=0.1,
        repetition_penalty=1.1,
        max_completion_tokens=9,
        logprobs=True,
    )
    engine = Echo(tokenizer.eos_token_id)
    rollouts = Rollouts([engine], cfg, tokenizer, seed=0, reproducible=False)
    groups = rollouts.write(prompts(tokenizer, ["x"]), step=0).groups
    assert engine.sampling == Sampling(0.7, 0.9, 20, 0.1, 1.1, 9, True)
    assert [sample.rows[0].rollout_logps for sample in groups[0].samples] == [[-1.0]] * 3
    assert len(rollouts.write(prompts(tokenizer, ["x"]), step=0, n=5).groups[0].samples) == 5


def test_greedy_is_one_completion_without_log_probabilities(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = Echo(tokenizer.eos_token_id)
    rollouts = Rollouts([engine], RolloutConfig(logprobs=True), tokenizer, seed=0, reproducible=True)
    groups = rollouts.greedy(prompts(tokenizer, ["x", "y"]))
    assert engine.sampling is not None
    assert engine.sampling.temperature == 0.0
    assert engine.sampling.max_tokens == RolloutConfig().max_completion_tokens
    rollouts.greedy(prompts(tokenizer, ["x"]), most=7)
    assert engine.sampling.max_tokens == 7
    assert [[sample.text for sample in group.samples] for group in groups] == [["x"], ["y"]]
    assert groups[0].samples[0].rows[0].rollout_logps is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parity_is_the_mean_difference_and_fails_beyond_the_tolerance(dtype: str) -> None:
    limit = TOLERANCE[dtype]
    engine = Echo(eos=3, weight_version=4, logps=[-1.0, -2.0])
    assert verify(engine, [5, 6, 7], [-1.0, -2.0 - limit], dtype) == pytest.approx(limit / 2)
    with pytest.raises(EngineError, match=r"weight version 4.*largest"):
        verify(engine, [5, 6, 7], [-1.0 - 2 * limit, -2.0 - limit], dtype)
    with pytest.raises(EngineError, match="nan"):
        verify(engine, [5, 6, 7], [math.nan, -2.0], dtype)
