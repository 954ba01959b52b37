"""The training loop. Every rank runs it, with its own engines and its share of the prompts.

    prompts -> completions (vLLM) -> rewards -> group advantages -> K updates -> weights to vLLM, as version + 1 -> next
    '------------- BatchQueue -------------'                       PolicyTrainer  WeightPublisher

With overlap the left half works on the next batches while the right half trains on this one.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from accelerate.utils import gather_object

from sapo_rl.advantages import with_advantages
from sapo_rl.config import Config
from sapo_rl.errors import SharedError
from sapo_rl.evaluation.evaluator import Evaluator
from sapo_rl.policy.checkpointer import Checkpointer
from sapo_rl.policy.temperatures import temperature_warning
from sapo_rl.policy.trainer import PolicyTrainer, divergence
from sapo_rl.rollout.publisher import WeightPublisher
from sapo_rl.rollout.queue import BatchQueue
from sapo_rl.telemetry import Telemetry, Timers
from sapo_rl.telemetry.steps import StepLog


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a rank trains with."""

    config: Config
    frozen: str
    """The config as YAML, which a checkpoint keeps: a resume is compared with it."""
    batches: BatchQueue
    trainer: PolicyTrainer
    weights: WeightPublisher
    evaluator: Evaluator
    checkpoints: Checkpointer
    telemetry: Telemetry
    timers: Timers


def train(parts: Parts) -> bool:
    """Run the steps that are left; return whether the run is complete, and was not asked to stop before.

    Raises:
        SharedError: the loss or the gradient is not finite; nothing of that step is saved or published.
    """
    config, batches, trainer, telemetry = parts.config, parts.batches, parts.trainer, parts.telemetry
    log = StepLog(telemetry, parts.timers, config)
    if batches.step == 0:
        verify(parts, 0)
        parts.checkpoints.is_best(0, parts.evaluator.run(0))
    if text := temperature_warning(config):
        telemetry.warn(text)
    with contextlib.closing(batches):
        for step, batch in batches:
            batch = with_advantages(batch, config.rewards, config.advantage, gather_object)
            batches.sleep()
            stats = trainer.train_on(batch.trained, parts.timers)
            batches.ready_for_new_weights()
            problem = divergence(step, stats, config.trainer)
            if not problem:
                parts.weights.publish(step)
                stats |= batches.metrics()
            log.log(step, batch, stats, parts.weights.restarts, trainer.take_peak_memory(), trainer.tokens)
            if problem:
                raise SharedError(problem)
            if due(step, config.rollout.verify_every):
                verify(parts, step)
            best = False
            if due(step, config.eval.every) or step == config.trainer.steps:
                batches.wait()
                best = parts.checkpoints.is_best(step, parts.evaluator.run(step))
            if best or due(step, config.checkpoint.every):
                parts.checkpoints.save(step, state_of(parts), batches.replay_state())
                telemetry.keep_pass_rates(batches.pass_rates)
    complete = batches.step == config.trainer.steps
    parts.checkpoints.finish(batches.step, state_of(parts), batches.replay_state(), complete)
    telemetry.keep_pass_rates(batches.pass_rates)
    telemetry.finish(complete=complete, before=parts.evaluator.before)
    return complete


def due(step: int, every: int) -> bool:
    """Return whether something that happens `every` so many steps happens after this one; 0 is never."""
    return every > 0 and step % every == 0


def verify(parts: Parts, step: int) -> None:
    """Prove that vLLM runs the trainer's weights, where the config asks for it, and record by how much they differ."""
    if parts.config.rollout.verify_every and (found := parts.weights.verify()):
        parts.telemetry.record(step, found)


def state_of(parts: Parts) -> dict[str, Any]:
    """Return what a checkpoint keeps beside the trainer's own state."""
    return {
        "sampler": parts.batches.state_dict(),
        "before": parts.evaluator.before,
        "config": parts.frozen,
    }
