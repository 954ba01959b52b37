"""The engine with real vLLM on the CPU: what it generates, weights that arrive, and everything that can kill it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import forked
import psutil
import pytest
import torch
from tiny import engine_settings, generate, logps_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sapo_rl.config import RolloutConfig
from sapo_rl.engines.base import Completion, Request, Sampling
from sapo_rl.engines.parity import verify
from sapo_rl.engines.process import LocalEngine
from sapo_rl.errors import EngineError, UserError
from sapo_rl.rollout.collector import Rollouts
from sapo_rl.rollout.dispatch import Answer, Dispatcher, Session
from sapo_rl.types import Prompt
from sapo_rl.weights.buckets import BucketTransport
from sapo_rl.weights.file import FileTransport, weights_folder

pytestmark = pytest.mark.e2e

GREEDY = Sampling(0.0, 1.0, 0, 0.0, 1.0, 24, False)
RANDOM = Sampling(1.0, 1.0, 0, 0.0, 1.0, 48, False)
LONG = Sampling(1.0, 1.0, 0, 0.0, 1.0, 240, False)


def child_of(engine: LocalEngine) -> psutil.Process:
    return forked.engine_with(engine.settings.log_path)


@pytest.fixture(scope="module")
def engines(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalEngine, LocalEngine]]:
    """Two engines that started side by side; the second gives up at the first failure, after 8 s without an answer."""
    logs = tmp_path_factory.mktemp("logs")
    first = LocalEngine(engine_settings(tiny_model, logs / "first.log"))
    second = LocalEngine(engine_settings(tiny_model, logs / "second.log", seed=1, timeout=8.0, max_restarts=0))
    for engine in (first, second):
        engine.start()
    for engine in (first, second):
        engine.wait_ready()
    processes = [child_of(first), child_of(second)]
    yield first, second
    processes += [child_of(first)]  # it may have been restarted
    for engine in (first, second):
        engine.close()
    assert not any(process.is_running() for process in processes)


@pytest.fixture
def engine(engines: tuple[LocalEngine, LocalEngine]) -> LocalEngine:
    return engines[0]


@pytest.fixture(scope="module")
def transport() -> Iterator[FileTransport]:
    transport = FileTransport(weights_folder(1 << 20), torch.float32)
    yield transport
    transport.close()


@pytest.fixture(scope="module")
def buckets() -> Iterator[BucketTransport]:
    """A transport whose buffer is smaller than the model."""
    memory, files = (FileTransport(weights_folder(1 << 20), torch.float32) for _ in range(2))
    transport = BucketTransport(memory, files, half=1 << 17, keep=True)
    yield transport
    transport.close()


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> PreTrainedModel:
    """The trainer's model, on the weights that the engines start with."""
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def trained(tiny_model: Path) -> PreTrainedModel:
    """The same model after a step of training: other weights in every tensor."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ids = torch.arange(4, 100)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    return model


@torch.no_grad()
def likeliest(model: PreTrainedModel, prompt: list[int], count: int, eos: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + count and ids[-1] != eos:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def tokens(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[one.token_ids for one in group] for group in groups]


def requests(seed: int | None = 11) -> list[Request]:
    return [Request([2, 30 + i, 40, 50 + i], 4, None if seed is None else seed * 1000 + 10 * i) for i in range(6)]


def test_completions_end_with_eos_or_at_the_limit(engine: LocalEngine) -> None:
    (eos,) = engine.settings.stop_token_ids
    (group,) = generate(engine, [Request([2, 30, 40], 128, seed=5)], RANDOM)
    assert len(group) == 128
    for one in group:
        assert eos not in one.token_ids[:-1]
        assert one.truncated == (one.token_ids[-1] != eos)
        assert len(one.token_ids) == RANDOM.max_tokens if one.truncated else len(one.token_ids) <= RANDOM.max_tokens
        assert one.logps is None
    assert {one.truncated for one in group} == {True, False}
    assert generate(engine, [], RANDOM) == []


def test_greedy_is_the_trainers_argmax(engine: LocalEngine, policy: PreTrainedModel) -> None:
    prompts = [[2, 30, 40], [2, 99, 98, 97, 96]]
    found = generate(engine, [Request(prompt, 1) for prompt in prompts], GREEDY)
    assert tokens(found) == [[likeliest(policy, prompt, GREEDY.max_tokens, eos=3)] for prompt in prompts]


def test_an_answer_tells_how_much_of_its_prompt_was_in_the_cache(engine: LocalEngine) -> None:
    prompt, held = [2, *range(30, 99), *range(30, 99)], []  # vLLM's cache holds whole blocks, on the CPU of 128 tokens
    for _ in range(2):
        ((one,),) = generate(engine, [Request(prompt, 1)], GREEDY)
        held.append(one.cached)
        prompt = [*prompt, *one.token_ids, 2]
    assert held == [0, 128]


def test_log_probabilities_are_of_the_distribution_sampled_from(engine: LocalEngine, policy: PreTrainedModel) -> None:
    prompt = [2, 31, 41, 51]
    (group,) = generate(engine, [Request(prompt, 4, seed=3)], Sampling(0.7, 1.0, 0, 0.0, 1.0, 32, True))
    for one in group:
        assert one.logps is not None
        expected = logps_of(policy, prompt + one.token_ids, temperature=0.7)[len(prompt) - 1 :]
        assert one.logps == pytest.approx(expected, abs=1e-4)


def test_filters_raise_log_probabilities_by_what_they_leave_out(engine: LocalEngine, policy: PreTrainedModel) -> None:
    """A sampled token's probability is the model's over the sum of those that are kept."""
    prompt = [2, 31, 41, 51]
    for sampling in (Sampling(1.0, 0.9, 0, 0.0, 1.0, 12, True), Sampling(1.0, 1.0, 20, 0.0, 1.0, 12, True)):
        ((one,),) = generate(engine, [Request(prompt, 1, seed=3)], sampling)
        logits = policy(torch.tensor([prompt + one.token_ids])).logits[0, len(prompt) - 1 : -1]
        likeliest_first, _ = logits.softmax(-1).sort(descending=True)
        reached = likeliest_first.cumsum(-1) - likeliest_first < sampling.top_p
        kept = (likeliest_first * reached)[:, : sampling.top_k or None].sum(-1)
        expected = torch.tensor(logps_of(policy, prompt + one.token_ids)[len(prompt) - 1 :]) - kept.log()
        assert one.logps == pytest.approx(expected.tolist(), abs=1e-4)
        assert kept.max() < 0.99


def test_seeded_samples_differ_and_repeat_in_any_company(engines: tuple[LocalEngine, LocalEngine]) -> None:
    first, second = engines
    expected = tokens(generate(first, requests(), RANDOM))
    everything = [tuple(one) for group in expected for one in group]
    assert len(set(everything)) == len(everything)
    generate(first, requests(seed=None), RANDOM)  # moves the engine's own stream on
    assert tokens(generate(first, requests()[::-1], RANDOM))[::-1] == expected
    assert tokens(generate(first, requests()[2:3], RANDOM)) == expected[2:3]
    assert tokens(generate(second, requests(), RANDOM)) == expected


def test_seeded_samples_of_more_prompts_than_fit_one_step_are_those_of_each_alone(engine: LocalEngine) -> None:
    """On the CPU vLLM reads 4,096 tokens in a step, and no generator there can be rewound after half a prompt."""
    many = [Request([2, 30 + number, *list(range(30, 98)) * 3], 2, 10 * number) for number in range(24)]
    brief = replace(RANDOM, max_tokens=12)
    found = tokens(generate(engine, many, brief))
    assert found == [one for request in many for one in tokens(generate(engine, [request], brief))]


def test_requests_join_while_others_are_under_way(engine: LocalEngine) -> None:
    expected = generate(engine, requests(), RANDOM)
    dispatcher = Dispatcher([engine], window=8, lost_timeout=60.0)  # two groups of four
    answers = dispatcher.submit_all(requests(), RANDOM)
    later = [dispatcher.submit(request, RANDOM, Session()) for request in requests()]
    assert [answer.result().completions for answer in answers] == expected
    assert [answer.result().completions for answer in later] == expected


def test_requests_that_are_given_up_leave_the_engine_to_others(engine: LocalEngine) -> None:
    expected = generate(engine, requests(), RANDOM)
    given_up = engine.submit(requests(seed=3), LONG)
    assert given_up[0].cancel()
    answers = engine.submit(requests(), RANDOM)
    assert all(call.cancel() for call in given_up[1:])
    assert [answer.result(60) for answer in answers] == expected
    (call,) = engine.submit([Request([2, 30], 1)], RANDOM)
    call.cancel()
    assert len(engine.score([4, 5, 6])) == 2


def test_calls_of_several_threads_each_get_their_own_answers(engine: LocalEngine, policy: PreTrainedModel) -> None:
    prompt = list(range(4, 60))
    seeds = (3, 5, 7)
    expected = [generate(engine, requests(seed), LONG) for seed in seeds]
    with ThreadPoolExecutor(len(seeds)) as pool:
        found = [pool.submit(generate, engine, requests(seed), LONG) for seed in seeds]
        assert engine.score(prompt) == pytest.approx(logps_of(policy, prompt), abs=1e-4)
        with pytest.raises(EngineError, match="256"):
            generate(engine, [Request([5] * 300, 1)], GREEDY)
        assert not any(future.done() for future in found)
        assert [future.result() for future in found] == expected


class Endless:
    """Always has completions under way."""

    def __init__(self, engine: LocalEngine) -> None:
        self.dispatcher = Dispatcher([engine], window=24, lost_timeout=60.0)
        self.taken: list[int] = []
        self.answered: list[int] = []
        self.versions: list[tuple[int, int]] = []
        self.over = threading.Event()
        self.began = threading.Event()
        self.ended = threading.Event()
        self.failure: BaseException | None = None

    def __enter__(self) -> Endless:
        for _ in range(8):
            self.ask()
        assert self.began.wait(30)
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        assert self.ended.wait(60)
        assert self.failure is None
        assert all(oldest <= newest for oldest, newest in self.versions)

    def ask(self) -> None:
        self.taken.append(len(self.taken))
        number = self.taken[-1]
        answer = self.dispatcher.submit(Request([2, 30 + len(self.taken) % 50], 4), LONG)
        answer.add_done_callback(lambda done: self.take(number, done))

    def take(self, number: int, done: Future[Answer]) -> None:
        if done.exception() is not None:
            self.failure = done.exception()
            self.ended.set()
            return
        assert len(done.result().completions) == 4
        self.versions.append((done.result().oldest_version, done.result().newest_version))
        self.answered.append(number)
        self.began.set()
        if not self.over.is_set():
            self.ask()
        elif len(self.answered) == len(self.taken):
            self.ended.set()


def test_unseeded_samples_never_repeat(engines: tuple[LocalEngine, LocalEngine]) -> None:
    groups = [one for engine in (*engines, *engines) for one in tokens(generate(engine, requests(seed=None), RANDOM))]
    everything = [tuple(one) for group in groups for one in group]
    assert len(set(everything)) == len(everything)


def test_rollouts_over_two_engines_are_those_of_one(
    engines: tuple[LocalEngine, LocalEngine], tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = ["What is 3 - 8?", "1 + 1", "two"]
    prompts = [Prompt(i, tokenizer(text)["input_ids"], text, {}) for i, text in enumerate(texts)]
    cfg = RolloutConfig(group_size=3, max_completion_tokens=16)
    one, two = (Rollouts(fleet, cfg, tokenizer, seed=7, reproducible=True) for fleet in (engines[:1], engines))
    for found, expected in zip(two.write(prompts, step=4).groups, one.write(prompts, step=4).groups, strict=True):
        assert found == expected
        assert found.samples[0].text == tokenizer.decode(found.samples[0].token_ids, skip_special_tokens=True)
    assert one.write(prompts, step=5).groups != one.write(prompts, step=4).groups
    assert one.greedy(prompts) == two.greedy(prompts)


def test_a_refused_call_says_why_and_leaves_the_engine_alive(engine: LocalEngine) -> None:
    with pytest.raises(EngineError, match="256"):
        generate(engine, [Request([5] * 300, 1)], GREEDY)
    assert len(generate(engine, [Request([5] * 3, 1)], GREEDY)[0]) == 1
    good, bad, other = engine.submit([Request([5] * 3, 1), Request([5] * 300, 1), Request([5] * 3, 1)], GREEDY)
    with pytest.raises(EngineError, match="256"):
        bad.result(60)
    assert good.result(60) == other.result(60)
    assert len(generate(engine, [Request([5] * 3, 1)], GREEDY)[0]) == 1
    assert engine.restarts == 0


def test_pushed_weights_are_the_ones_that_generate(
    engine: LocalEngine, transport: FileTransport, policy: PreTrainedModel, trained: PreTrainedModel
) -> None:
    prompt = [4 + i % 200 for i in range(200)]  # longer than a block of the key-value cache, so that it is cached
    before = tokens(generate(engine, [Request(prompt, 1)], GREEDY))
    assert before == [[likeliest(policy, prompt, GREEDY.max_tokens, eos=3)]]
    assert verify(engine, prompt, logps_of(policy, prompt), "float32") < 1e-5

    transport.push(trained.named_parameters(), [engine], version=3)
    assert engine.weight_version == 3
    after = tokens(generate(engine, [Request(prompt, 1)], GREEDY))
    assert after != before
    assert after == [[likeliest(trained, prompt, GREEDY.max_tokens, eos=3)]]
    assert verify(engine, prompt, logps_of(trained, prompt), "float32") < 1e-5
    with pytest.raises(EngineError, match=r"version 3.*disagree"):
        verify(engine, prompt, logps_of(policy, prompt), "float32")

    transport.fill(policy.named_parameters())  # what the next push begins with: it reaches no engine by itself
    assert verify(engine, prompt, logps_of(trained, prompt), "float32") < 1e-5


def test_weights_are_replaced_under_running_completions(
    engine: LocalEngine,
    transport: FileTransport,
    buckets: BucketTransport,
    policy: PreTrainedModel,
    trained: PreTrainedModel,
) -> None:
    prompt = [4 + i % 200 for i in range(200)]  # longer than a block of the key-value cache, so that it is cached
    (eos,) = engine.settings.stop_token_ids
    with Endless(engine) as others:
        for version, model in enumerate((trained, policy, trained, policy), start=4):
            done = len(others.answered)
            (transport if version < 6 else buckets).push(model.named_parameters(), [engine], version)
            assert engine.weight_version == version
            expected = likeliest(model, prompt, GREEDY.max_tokens, eos)
            for _ in range(2):  # the second time by what the cache has
                assert tokens(generate(engine, [Request(prompt, 1)], GREEDY)) == [[expected]]
            assert verify(engine, prompt, logps_of(model, prompt), "float32") < 1e-5
            assert len(others.taken) > done  # they were never all done
    assert {newest - oldest for oldest, newest in others.versions} & {1, 2, 3, 4}  # some were begun by older weights
    assert sorted(others.answered) == others.taken
    assert engine.restarts == 0


def test_a_killed_engine_comes_back_with_the_pushed_weights_and_repeats_the_call(
    engine: LocalEngine, buckets: BucketTransport, trained: PreTrainedModel
) -> None:
    buckets.push(trained.named_parameters(), [engine], version=8)
    expected = tokens(generate(engine, requests(), LONG))
    victim = child_of(engine)
    with Endless(engine) as others:
        victim.kill()
        while not engine.restarts:  # by the other thread
            time.sleep(0.001)
        with ThreadPoolExecutor(2) as pool:  # both wait until the new child has the weights
            scored = pool.submit(engine.score, list(range(4, 60)))
            assert tokens(generate(engine, requests(), LONG)) == expected
            assert scored.result() == pytest.approx(logps_of(trained, list(range(4, 60))), abs=1e-4)
    assert sorted(others.answered) == others.taken
    assert engine.restarts == 1
    assert engine.weight_version == 8
    assert child_of(engine).pid != victim.pid
    prompt = list(range(4, 60))
    assert verify(engine, prompt, logps_of(trained, prompt), "float32") < 1e-5


def test_an_engine_that_is_killed_while_weights_arrive_comes_back_with_all_of_them(
    engine: LocalEngine, buckets: BucketTransport, policy: PreTrainedModel
) -> None:
    victim, prompt = child_of(engine), list(range(4, 60))

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for index, (name, weight) in enumerate(policy.named_parameters()):
            if index == len(list(policy.parameters())) - 2:
                victim.kill()
                victim.wait(10)
            yield name, weight

    before = engine.restarts
    with Endless(engine) as others:
        buckets.push(gathered(), [engine], version=9)
        assert verify(engine, prompt, logps_of(policy, prompt), "float32") < 1e-5
    assert sorted(others.answered) == others.taken
    assert (engine.restarts, engine.weight_version) == (before + 1, 9)


def test_an_engine_whose_core_process_is_killed_in_mid_call_comes_back(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM never notices that a core in a process of its own is gone."""
    engine = LocalEngine(engine_settings(tiny_model, tmp_path / "core.log", core_process=True))
    engine.start()
    engine.wait_ready()
    (core,) = [process for process in child_of(engine).children() if process.children()]  # with vLLM's worker
    killer = threading.Timer(0.2, core.kill)
    killer.start()
    while not engine.restarts:  # a call may be quicker than the killer
        assert all(len(group) == 4 for group in generate(engine, requests(), LONG))
    killer.join()
    engine.close()
    assert "its process died" in caplog.text  # at once, and not for want of an answer


def test_an_engine_that_hangs_is_given_up_after_its_timeout(engines: tuple[LocalEngine, LocalEngine]) -> None:
    second = engines[1]
    process = child_of(second)
    os.kill(process.pid, signal.SIGSTOP)
    big = [Request(list(range(4, 204)), 1) for _ in range(2000)]  # more than the socket holds
    with pytest.raises(EngineError, match=r"(?s)after 0 restarts \(rollout.max_restarts=0\).*second.log"):
        generate(second, big, GREEDY)
    assert not process.is_running()
    with pytest.raises(EngineError, match=r"(?s)after 0 restarts.*second.log"):  # whoever calls next learns why
        generate(second, requests(), GREEDY)


def test_what_cannot_start_says_what_to_change(tiny_model: Path, tmp_path: Path) -> None:
    starved = LocalEngine(engine_settings(tiny_model, tmp_path / "starved.log", cpu_kv_cache_gb=1e-6))
    lost = LocalEngine(engine_settings(tmp_path / "nowhere", tmp_path / "lost.log"))
    starved.start()
    lost.start()
    processes = psutil.Process().children(recursive=True)
    with pytest.raises(UserError, match=r"rollout.cpu_kv_cache_gb"):
        starved.wait_ready()
    with pytest.raises(UserError, match=r"(?s)did not start.*nowhere.*lost.log"):
        lost.wait_ready()
    logs = {str(one.settings.log_path) for one in (starved, lost)}
    assert not any(file.path in logs for p in processes if p.is_running() for file in p.open_files())
