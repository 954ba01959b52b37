"""The training loop: prompts, rollout, rewards, advantages, K updates, weights back to vLLM, and again."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from accelerate.utils import gather_object

from sapo_rl import run_folder
from sapo_rl.advantages import advantages
from sapo_rl.config import Config
from sapo_rl.data import PromptSampler
from sapo_rl.errors import SharedError
from sapo_rl.losses import inert_temperature_warning
from sapo_rl.policy import checkpoint
from sapo_rl.policy.model import Policy
from sapo_rl.policy.trainer import PolicyTrainer
from sapo_rl.rewards import Inbox, RewardPool, RewardStats
from sapo_rl.rollout.ahead import Producer
from sapo_rl.rollout.engine import Engine
from sapo_rl.rollout.spread import Usage, idle_fraction
from sapo_rl.rollout.stream import Rollouts, Written, verify_all
from sapo_rl.rollout.weights.base import WeightTransport
from sapo_rl.telemetry import Row, Telemetry, Timers, rows, sample_metrics
from sapo_rl.types import Group, Messages, Prompt

T = TypeVar("T")

PROBE_TOKENS = 64
"""Of the reply by which weights are verified; a longer one would cost seconds."""


class Begun(NamedTuple):
    """A batch that is being written."""

    writing: Future[Written]
    finished: Inbox
    """Gets its groups one by one."""
    sampler_state: dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """One rank's scored completions of a step."""

    groups: list[Group]
    scoring: RewardStats
    sampler_state: dict[str, Any]
    """Where the order of prompts stands after it."""
    usage: Usage
    """How long the engines wrote on it."""


class Told(NamedTuple):
    """What a rank tells the others of its step."""

    groups: list[list[Row]]
    errors: dict[str, int]
    """Samples that a reward function could not score, by its name."""
    usage: Usage
    restarts: int
    """Of its engines, so far."""
    peak: float
    """Its trainer's peak memory in GiB."""


@dataclass
class Run:
    """The parts of one rank's run, and how far it has come."""

    config: Config
    folder: Path
    prompts: list[Prompt]
    held_out: list[Prompt]
    sampler: PromptSampler
    engines: Sequence[Engine]
    rollouts: Rollouts
    rewards: RewardPool
    trainer: PolicyTrainer
    transport: WeightTransport
    telemetry: Telemetry
    timers: Timers
    step: int = 0
    """The last step done."""
    sampler_state: dict[str, Any] = field(default_factory=dict)
    """Where the order of prompts stands after the last step done; the sampler itself may be one step ahead."""
    stop_asked: bool = False
    """Set by a signal: finish the step, save, leave."""
    mute: set[str] = field(default_factory=set)
    """Reward functions of which it has been said that they applied to nothing."""
    flat: bool = False
    """Whether it has been said of a step that it taught nothing."""
    before: list[tuple[str, str]] = field(default_factory=list)
    """Held-out prompts with their first greedy completions, for the table at the end."""
    frozen: str = ""
    """The config as YAML, which a checkpoint keeps: a resume is compared with it."""


def train(run: Run) -> None:
    """Run the steps that are left; every rank calls it with its own engines and its share of the prompts."""
    if run.step == 0:
        verify_weights(run)
        evaluate(run)
    warn_of_inert_temperatures(run)
    producer = make_producer(run)
    try:
        while run.step < run.config.trainer.steps and not stopping(run):
            take_step(run, producer)
    finally:
        producer.close()
    finish(run)


def take_step(run: Run, producer: Producer[Begun, Batch]) -> None:
    """Train on the next batch, bring the weights to vLLM, and do what is due after it."""
    run.step += 1
    batch = producer.take(run.step)
    assign_advantages(run, batch.groups)
    run.rollouts.sleep()  # gives the trainer vLLM's memory, where both do not fit; the push wakes it
    stats = run.trainer.train_on(batch.groups, run.timers)
    producer.make_way()
    stop_if_diverged(run, batch, stats)
    publish_weights(run)
    run.sampler_state = batch.sampler_state
    report(run, batch, stats | {"time/wait": producer.take_waited()})
    if due(run, run.config.rollout.verify_every):
        verify_weights(run)
    if due(run, run.config.eval.every) or run.step == run.config.trainer.steps:
        producer.wait()
        evaluate(run)
    if due(run, run.config.checkpoint.every):
        save(run)


def make_producer(run: Run) -> Producer[Begun, Batch]:
    """Return what makes the batches; with overlap, while those before are trained on."""
    rollout = run.config.rollout
    return Producer(
        lambda step: begin_batch(run, step),
        lambda begun: finish_batch(run, begun),
        last=run.config.trainer.steps,
        ahead=rollout.max_staleness if rollout.overlaps else 0,
        in_flight=run.config.in_flight,
    )


def begin_batch(run: Run, step: int) -> Begun:
    """Draw prompts and have them completed."""
    prompts, finished = next_prompts(run), Inbox()
    writing = in_thread(lambda: run.rollouts.write(prompts, step, on_group=finished.put), finished.close)
    return Begun(writing, finished, run.sampler.state_dict())


def finish_batch(run: Run, begun: Begun) -> Batch:
    """Score the groups of a batch, while others of it are being written."""
    with run.timers("rollout"):
        run.rewards.follow(begun.finished)
        written = begun.writing.result()
    with run.timers("reward"):
        scoring = run.rewards.finish()
    return Batch(written.groups, scoring, begun.sampler_state, written.usage)


def in_thread(work: Callable[[], T], at_end: Callable[[], None]) -> Future[T]:
    """Start `work` in a thread of its own, then `at_end`, whether it succeeded or not."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    future.add_done_callback(lambda _: at_end())
    pool.shutdown(wait=False)  # of new work
    return future


def due(run: Run, every: int) -> bool:
    """Return whether something that happens `every` so many steps happens after this one; 0 is never."""
    return every > 0 and run.step % every == 0


def stopping(run: Run) -> bool:
    """Return whether any rank was asked to stop."""
    return any(gather_object([run.stop_asked]))


def next_prompts(run: Run) -> list[Prompt]:
    """Draw the step's prompts, the same on all ranks, and return this rank's share."""
    return shard(run, [run.prompts[index] for index in run.sampler.next()])


def shard(run: Run, items: list[Prompt]) -> list[Prompt]:
    """Return this rank's share of a list that all ranks hold; nothing where it shares the engine of another."""
    ranks, rank = run.trainer.accelerator.num_processes, run.trainer.accelerator.process_index
    if not run.config.rollout.servers:
        sharing = run.config.rollout.tensor_parallel
        ranks, (rank, lent) = ranks // sharing, divmod(rank, sharing)
        if lent:
            return []
    return items[rank * len(items) // ranks : (rank + 1) * len(items) // ranks]


def assign_advantages(run: Run, groups: list[Group]) -> None:
    """Fill in each sample's weighted reward and its advantage within the group."""
    functions, settings = run.config.reward.functions, run.config.advantage
    values_PGR = [[[sample.rewards[name] for name in functions] for sample in group.samples] for group in groups]
    rewards_PG, advantages_PG = advantages(
        values_PGR,
        [function.weight for function in functions.values()],
        scale=settings.scale,
        baseline=settings.baseline,
        combine=settings.combine,
        eps=settings.eps,
        batch_PGR=gather_object(values_PGR) if settings.scale == "batch" else None,
    )
    for group, rewards_G, advantages_G in zip(groups, rewards_PG, advantages_PG, strict=True):
        for sample, reward, advantage in zip(group.samples, rewards_G, advantages_G, strict=True):
            sample.reward, sample.advantage = reward, advantage


def stop_if_diverged(run: Run, batch: Batch, stats: dict[str, float]) -> None:
    """End the run, on all ranks, where the step's loss or gradient is not finite: its weights are of no use.

    Raises:
        SharedError: naming the step, the number and what to change.
    """
    settings = run.config.trainer
    for name, value in (("loss", stats["policy/loss"]), ("gradient norm", stats["policy/grad_norm"])):
        if not math.isfinite(value):
            report(run, batch, stats)
            raise SharedError(
                f"step {run.step}: the {name} is {value}; it is not saved, and checkpoints before it are untouched\n"
                f"  lower trainer.learning_rate (is {settings.learning_rate:g}) or trainer.max_grad_norm "
                f"(is {settings.max_grad_norm:g}), or raise trainer.warmup_updates (is {settings.warmup_updates})"
            )


def publish_weights(run: Run) -> None:
    """Bring the trainer's weights into every engine of this rank, under the version `step`."""
    with run.timers("sync"):
        run.transport.push(run.trainer.policy.named_weights(), run.engines, run.step)


def verify_weights(run: Run) -> None:
    """Prove that vLLM runs the trainer's weights: both score what vLLM answers to a fixed prompt."""
    if not run.config.rollout.verify_every:
        return
    prompt = run.prompts[0].token_ids
    groups = run.rollouts.greedy(run.prompts[:1], PROBE_TOKENS) if run.engines else []
    reply = groups[0].samples[0].token_ids if groups else prompt  # the trainer's ranks compute together
    token_ids = [*prompt, *reply]
    expected = run.trainer.score(token_ids)
    found = verify_all(run.engines, token_ids, expected, run.config.model.dtype, len(prompt))
    if found:
        run.telemetry.record(run.step, {"mismatch/probe_logp_diff": max(found)})


def report(run: Run, batch: Batch, stats: dict[str, float]) -> None:
    """Write the step's numbers and completions, of all ranks together."""
    scoring = batch.scoring
    own_groups = [rows(run.step, group) for group in batch.groups]
    restarts, peak = sum(engine.restarts for engine in run.engines), run.trainer.take_peak_memory()
    everyone: list[Told] = gather_object([Told(own_groups, scoring.errors, batch.usage, restarts, peak)])
    groups = [group for rank in everyone for group in rank.groups]
    for name, text in scoring.failures.items():
        run.telemetry.warn(f"{text} (reward {name}: {scoring.errors[name]} samples scored 0)")
    metrics = sample_metrics(groups)
    for name in [name for name in scoring.errors if f"rewards/{name}/mean" not in metrics and name not in run.mute]:
        run.mute.add(name)
        run.telemetry.warn(f"reward {name} applied to no completion of step {run.step}: it returned None for all")
    if metrics["group/zero_spread_fraction"] == 1 and not run.flat:
        run.flat = True
        run.telemetry.warn(f"step {run.step} teaches nothing: the samples of each group all have the same reward")
    phases = run.timers.take()
    tokens = sum(row["tokens"] for group in groups for row in group)
    own = {
        "perf/tokens_per_second": tokens / phases["time/step"],
        "perf/completion_tokens": float(tokens),
        "perf/peak_memory_gib": max(rank.peak for rank in everyone),
        "rollout/engine_restarts": float(sum(rank.restarts for rank in everyone)),
        "rollout/staleness": run.step - 1.0 - min(row["weight_version"] for group in groups for row in group),
    } | {f"rewards/{name}/errors": float(sum(rank.errors[name] for rank in everyone)) for name in scoring.errors}
    if not run.config.in_flight:  # else an engine without work for this batch has work for the next
        own["rollout/idle_fraction"] = idle_fraction([rank.usage for rank in everyone])
    run.telemetry.log_step(run.step, {**metrics, **own, **stats, **phases}, groups)


def evaluate(run: Run) -> None:
    """Measure greedy accuracy on the held-out prompts, and the mean of several samples where asked for."""
    if not run.held_out:
        return
    settings, functions = run.config.eval, run.config.reward.functions
    judge = settings.reward or next(iter(functions))
    with run.timers("eval"):
        greedy = run.rollouts.greedy(shard(run, run.held_out))
        run.rewards.score(greedy)
        sampled: list[Group] = []
        if settings.samples:
            sampled = run.rollouts.generate(shard(run, run.held_out), -run.step, settings.samples)
            run.rewards.score(sampled)
    greedy, sampled = gather_object(greedy), gather_object(sampled)
    metrics = {"eval/accuracy": mean_reward(greedy, judge), "eval/mean_length": mean_length(greedy)}
    if len(functions) > 1:
        metrics |= {f"eval/rewards/{name}": mean_reward(greedy, name) for name in functions}
    if sampled:
        metrics["eval/reward_mean"] = mean_reward(sampled, judge)
    examples = [(show(group.prompt.content), group.samples[0].text) for group in greedy[:3]]
    run.before = run.before or examples
    run.telemetry.log_eval(run.step, metrics, examples)


def show(content: str | Messages) -> str:
    """Return a prompt as one text: the last message of a chat."""
    return content if isinstance(content, str) else content[-1]["content"]


def mean_reward(groups: list[Group], name: str) -> float:
    """Return the mean of one reward over the samples to which it applies; 0 where it applies to none."""
    values = [sample.rewards[name] for group in groups for sample in group.samples]
    scored = [value for value in values if value is not None]
    return sum(scored) / max(1, len(scored))


def mean_length(groups: list[Group]) -> float:
    """Return the mean number of completion tokens."""
    lengths = [len(sample.token_ids) for group in groups for sample in group.samples]
    return sum(lengths) / len(lengths)


def warn_of_inert_temperatures(run: Run) -> None:
    """Say once where SAPO's gate cannot act, or is known not to hold."""
    loss, settings = run.config.loss, run.config.trainer
    text = inert_temperature_warning(settings.updates_per_rollout, loss.tau_pos, loss.tau_neg)
    if loss.name == "sapo" and loss.gradient == "paper" and text:
        run.telemetry.warn(text)


def save(run: Run) -> None:
    """Write a checkpoint from which `resume=` continues as if nothing had happened."""
    state: dict[str, Any] = {
        "sampler": run.sampler_state,
        "wandb_id": run.telemetry.wandb_id,
        "before": run.before,
        "config": run.frozen,
    }
    folder = run.folder / run_folder.CHECKPOINTS
    checkpoint.save(folder, run.step, run.trainer, state, run.config.checkpoint.keep_last)


def finish(run: Run) -> None:
    """Leave the trained model, or, where the run was stopped, the checkpoint to resume from."""
    complete = run.step == run.config.trainer.steps
    if run.config.checkpoint.every and run.step % run.config.checkpoint.every:
        save(run)
    if complete and run.config.checkpoint.save_final:
        is_main = run.trainer.accelerator.is_main_process
        export(run.trainer.policy, run.rollouts.tokenizer, run.folder / run_folder.FINAL, is_main)
    run.telemetry.finish(complete=complete, before=run.before)


def export(policy: Policy, tokenizer: Any, folder: Path, is_main: bool) -> None:
    """Write the model as a Hugging Face folder, whole or not at all; one from before a resume is replaced."""
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        policy.export(partial, is_main)
        if is_main:
            tokenizer.save_pretrained(partial)
            run_folder.open_up(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    finally:
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)  # of what a full disk has stopped
