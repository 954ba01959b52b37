"""What an evaluation says of held-out prompts: real reward functions, and an engine that writes what it is told."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import make_tokenizer

from sapo_rl.config import Config, EnvironmentConfig, RewardFunctionConfig
from sapo_rl.config.evaluation import EvalDataConfig, EvalSetConfig
from sapo_rl.engines.base import Completion, Request, Sampling
from sapo_rl.errors import SharedError
from sapo_rl.evaluation.evaluator import Evaluator
from sapo_rl.evaluation.measure import answers, estimates
from sapo_rl.evaluation.scores import estimate
from sapo_rl.evaluation.sets import default_set, further_functions, named_sets
from sapo_rl.rewards import RewardPool
from sapo_rl.rollout.collector import Rollouts
from sapo_rl.rollout.share import Share
from sapo_rl.types import Group, Prompt, Row, Sample, Stop

TOKENIZER = make_tokenizer()
NUMBER = {"right": RewardFunctionConfig("numeric_answer")}


@dataclass
class Told:
    """An engine that writes what it is told for a prompt: the first text greedily, then one after the other."""

    texts: dict[str, list[str]]
    sampling: list[Sampling] = field(default_factory=list)
    weight_version: int = 0
    restarts: int = 0
    asleep: bool = False

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> list[Future[list[Completion]]]:
        self.sampling.append(sampling)
        return [self.answered(request) for request in requests]

    def answered(self, request: Request) -> Future[list[Completion]]:
        asked = TOKENIZER.decode(request.token_ids)
        texts = next(texts for prompt, texts in self.texts.items() if prompt in asked)
        future: Future[list[Completion]] = Future()
        ids: list[Any] = [TOKENIZER(text)["input_ids"] for text in texts[: request.n]]
        future.set_result([Completion(one, truncated=len(one) > 7) for one in ids])
        return future


def with_set(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Config:
    file = folder / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Config()
    found.data.max_prompt_tokens = 200
    found.eval.prompts = 0
    found.eval.sets = {"own": EvalSetConfig(data=EvalDataConfig(path=str(file)), **settings)}
    return found


@contextmanager
def parts(cfg: Config, texts: dict[str, list[str]]) -> Iterator[tuple[Rollouts, RewardPool, Told]]:
    engine: Any = Told(texts)
    rollouts = Rollouts([engine], cfg.rollout, TOKENIZER, cfg.seed, cfg.reproducible)
    with RewardPool(cfg.reward, further=further_functions(cfg)) as rewards:
        yield rollouts, rewards, engine


SUMS = [{"prompt": "What is 1 + 1?", "answer": "2"}, {"prompt": "What is 5 + 6?", "answer": "11"}]
REPLIES = {"1 + 1": ["2", "It is 2.", "3", "no idea"], "5 + 6": ["It is 12", "12", "11", "12.0"]}


def test_the_numbers_of_a_set_are_those_of_its_samples(tmp_path: Path) -> None:
    cfg = with_set(tmp_path, SUMS, samples=4, temperature=0.5, top_p=0.9, max_completion_tokens=7, functions=NUMBER)
    logged: list[Any] = []
    telemetry: Any = SimpleNamespace(log_eval=lambda *told: logged.append(told))
    timers: Any = lambda phase: nullcontext()  # noqa: E731
    with parts(cfg, REPLIES) as (rollouts, rewards, engine):
        sets = named_sets(cfg, TOKENIZER)
        Evaluator(sets, Share(0, 1), rollouts, rewards, telemetry, timers, cfg, []).run(3)
    ((step, metrics, examples, rows),) = logged
    assert step == 3
    assert metrics == {
        "eval/own/reward": 0.5,
        "eval/own/avg@4": pytest.approx((2 / 4 + 1 / 4) / 2),
        "eval/own/pass@2": pytest.approx((5 / 6 + 1 / 2) / 2),  # pairs of 4 samples, 1 of 6 without one that is right
        "eval/own/pass@4": 1.0,
        "eval/own/maj@4": 0.5,  # 2, twice, and 12, three times, of which one is written 12.0
        "eval/own/mean_length": pytest.approx((1 + 8) / 2),
        "eval/own/clipped_ratio": 0.5,
    }
    assert [(one.temperature, one.top_p, one.max_tokens) for one in engine.sampling] == [(0.0, 0.9, 7), (0.5, 0.9, 7)]
    assert examples == [("What is 1 + 1?", "2"), ("What is 5 + 6?", "It is 12")]
    kept = [(row["set"], row["greedy"], row["prompt_index"], row["completion"], row["reward"]) for row in rows]
    assert kept[:3] == [("own", True, 0, "2", 1.0), ("own", True, 1, "It is 12", 0.0), ("own", False, 0, "2", 1.0)]
    assert [json.loads(row["info"])["vote"] for row in rows[2:]] == [1, 1, 2, 0, 1, 1, 2, 1]
    assert rows[0]["rewards/right"] == 1.0


def test_intervals_are_over_prompts(tmp_path: Path) -> None:
    cfg = with_set(tmp_path, SUMS, samples=4, functions=NUMBER)
    with parts(cfg, REPLIES) as (rollouts, rewards, _):
        (own,) = named_sets(cfg, TOKENIZER)
        found = estimates(own, answers(own, own.prompts, 0, rollouts, rewards))
    assert list(found) == ["reward", "avg@4", "pass@2", "pass@4", "maj@4"]
    assert found["reward"] == estimate([1.0, 0.0]) and found["avg@4"] == estimate([0.5, 0.25], samples=4)


def test_a_set_may_be_sampled_alone_and_passes_from_its_threshold_on(tmp_path: Path) -> None:
    digits = {"digits": RewardFunctionConfig("numeric_digits")}
    cfg = with_set(tmp_path, SUMS, greedy=False, samples=2, solved_at=0.6, functions=digits)
    with parts(cfg, REPLIES) as (rollouts, rewards, engine):
        (own,) = named_sets(cfg, TOKENIZER)
        found = estimates(own, answers(own, own.prompts, 0, rollouts, rewards))
    assert len(engine.sampling) == 1
    assert {name: one.value for name, one in found.items()} == {
        "avg@2": pytest.approx((1 + 2 / 3) / 2),  # of 12 for 11 the sign and one digit are right
        "pass@2": 1.0,
        "maj@2": pytest.approx((1 + 2 / 3) / 2),
    }


def test_a_set_without_functions_is_judged_by_those_of_the_training(tmp_path: Path) -> None:
    cfg = with_set(tmp_path, SUMS)
    cfg.reward.functions = NUMBER | {"short": RewardFunctionConfig("length_limit", args={"max_tokens": 5})}
    with parts(cfg, REPLIES) as (rollouts, rewards, _):
        (own,) = named_sets(cfg, TOKENIZER)
        found = answers(own, own.prompts, 0, rollouts, rewards)
    assert [group.samples[0].rewards for group in found.greedy] == [
        {"right": 1.0, "short": 0.0},
        {"right": 0.0, "short": -1.0},
    ]


def test_a_number_that_no_function_returns_is_told_with_those_that_are(tmp_path: Path) -> None:
    cfg = with_set(tmp_path, SUMS, reward="right/acc", functions=NUMBER)
    timers: Any = lambda phase: nullcontext()  # noqa: E731
    with parts(cfg, REPLIES) as (rollouts, rewards, _):
        nothing: Any = None
        evaluator = Evaluator(named_sets(cfg, TOKENIZER), Share(0, 1), rollouts, rewards, nothing, timers, cfg, [])
        with pytest.raises(SharedError, match=r"^eval\.sets\.own\.reward: no function returns 'right/acc'; .*right"):
            evaluator.run(0)


@pytest.mark.parametrize(("on_error", "told"), [("drop", {"eval/dropped": 2.0}), ("raise", {})])
def test_prompts_whose_episode_was_dropped_are_counted(on_error: str, told: dict[str, float]) -> None:
    prompts = [Prompt(number, [1], "Go.", {}) for number in range(5)]
    logged: list[dict[str, float]] = []

    def write(own: list[Prompt], step: int, n: int, on_group: Any, sampling: Sampling) -> Any:
        assert (n, sampling.temperature) == (1, 0.0)
        sample = Sample([Row([1], [2])], Stop.STOP, (0, 0), text="a", rewards={"environment": 0.5})
        groups = [Group(one, [sample] if one.index < 3 else []) for one in own]
        return SimpleNamespace(checked=lambda: SimpleNamespace(groups=groups))

    scoring = SimpleNamespace(add=None, result=lambda groups: SimpleNamespace(groups=groups))
    parts: Any = SimpleNamespace(
        write=write,
        scoring=lambda names: nullcontext(scoring),
        log_eval=lambda step, metrics, examples, samples: logged.append(metrics),
    )
    cfg = Config(environment=EnvironmentConfig("guess", on_error=on_error))
    timers: Any = lambda phase: nullcontext()  # noqa: E731
    Evaluator([default_set(cfg, prompts)], Share(0, 1), parts, parts, parts, timers, cfg, []).run(0)
    assert logged == [{"eval/reward": 0.5, "eval/mean_length": 1.0, "eval/clipped_ratio": 0.0} | told]
