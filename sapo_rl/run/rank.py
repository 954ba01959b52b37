"""One rank of a run: `python -m sapo_rl.run.rank RUN_FOLDER` builds the parts and hands them to the loop."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import FrameType

from sapo_rl import processes

if __name__ == "__main__":
    processes.begin()
    for name in ("torchao", "torch.utils._pytree"):  # transformers imports the first, where it is; both would warn
        logging.getLogger(name).setLevel(logging.ERROR)
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError

from sapo_rl import run_folder
from sapo_rl.config import Config
from sapo_rl.data import repetition_warning
from sapo_rl.data.pass_rates import PassRates, read_pass_rates
from sapo_rl.data.weighted import build_sampler
from sapo_rl.engines.build import build_transport
from sapo_rl.errors import UserError, first_line
from sapo_rl.evaluation.evaluator import Evaluator
from sapo_rl.evaluation.sets import comparison_warnings, further_functions
from sapo_rl.policy import checkpoint
from sapo_rl.policy.checkpointer import Checkpointer
from sapo_rl.policy.model import DTYPES, Policy, load_policy
from sapo_rl.policy.parallel import loads_weights
from sapo_rl.policy.saved import trainable_shapes
from sapo_rl.policy.trainer import PolicyTrainer, Reference
from sapo_rl.processes import streams
from sapo_rl.rewards import isolation_warning
from sapo_rl.rollout.filters import filter_warning
from sapo_rl.rollout.publisher import WeightPublisher
from sapo_rl.rollout.queue import BatchQueue
from sapo_rl.run import ranks, resume
from sapo_rl.run.check_data import check_data
from sapo_rl.run.evaluating import evaluate
from sapo_rl.run.export import final_card
from sapo_rl.run.writing import Rank, meet, read_prompts, read_sets, start_writing, wait_for
from sapo_rl.sizing import NO_BFLOAT16, has_bfloat16
from sapo_rl.telemetry import Telemetry, Timers
from sapo_rl.telemetry.sinks.pieces import Pieces
from sapo_rl.train import Parts, train

OUT_OF_MEMORY = (
    "the trainer does not fit into the GPU's memory beside vLLM; lower trainer.tokens_per_micro_batch or "
    "rollout.gpu_memory_utilization or rollout.sync_buffer_gb, or set rollout.sleep=1"
)
SIGNAL_DEBOUNCE_SECONDS = 1.0
"""Seconds in which a second SIGINT or SIGTERM counts as a duplicate (schedulers signal every process of a run) and does
not force an immediate exit."""


def main(folder: Path | None) -> None:
    """Run this rank to its end; `folder` is None on ranks that learn it from rank 0. A user's mistake exits with 2."""
    processes.imports_are_done()
    stops = Stops()
    streams.outlive()
    os.environ.update(streams.UTF8)  # for the processes that this one starts
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        with contextlib.ExitStack() as stack:
            rank = meet(folder, stack)
            if (rank.folder / run_folder.MODELS).is_file():
                evaluate(rank)
                return
            if rank.config.check == "data":
                check_data(rank, stack)
                return
            parts = build(rank, stack, stops)
            stops.watch(parts.telemetry)
            complete = train(parts)
    except torch.OutOfMemoryError as error:
        ranks.fail(UserError(f"{OUT_OF_MEMORY}\nIt said: {first_line(error)}"))
    except Exception as error:
        ranks.fail(worded(error, folder))
    except KeyboardInterrupt:
        ranks.quit_now(128 + signal.SIGINT)
    if not complete:
        sys.exit(128 + signal.SIGINT)


def worded(error: Exception, folder: Path | None) -> Exception:
    """Say in a sentence that the disk is full or a folder is gone; other errors stay as they are."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    told = isinstance(error, UserError)  # with the file and what helps
    if not told and (full or "No space left on device" in str(error)):  # safetensors has an error of its own
        return UserError(f"{error} (the run folder is {folder}); free some of it, then resume")
    try:
        os.getcwd()
    except FileNotFoundError:
        return UserError(f"the folder that the run was started in does not exist any more: {error}")
    gone = folder is not None and not (folder / run_folder.CONFIG).is_file()
    if gone and isinstance(error, OSError | SafetensorError | UserError):
        return UserError(
            f"the run folder '{folder}' was deleted or moved while the run was going on: {first_line(error)}\n"
            "  start the run anew, or, where it was moved, resume it there"
        )
    return error


def build(rank: Rank, stack: contextlib.ExitStack, stops: Stops) -> Parts:
    """Build the parts of the loop, vLLM beside the others; a mistake ends it. `stack` closes them in reverse."""
    config, folder, accelerator = rank.config, rank.folder, rank.accelerator
    resumed = _last_checkpoint(config, folder, accelerator) if config.resume else None
    transport = build_transport(config, rank.facts, rank.device, rank.token, accelerator.is_main_process)
    stack.callback(transport.close)  # after the engines, which may have its memory mapped
    writing = start_writing(rank, stack, resumed.name if resumed else "")
    # Prompts and the trainer's copy of the model are made while vLLM starts.
    prompts, held_out, dropped = read_prompts(rank, writing)
    sets, told = read_sets(rank, writing, prompts, held_out)
    per_step = config.rollout.batch_size // config.rollout.group_size
    rates = PassRates(len(prompts), config.data, config.prefetch)
    sampler = build_sampler(config.data, rates, len(prompts), per_step, config.seed)
    trainer = PolicyTrainer(*_models(config, not loads_weights(accelerator)), config, accelerator)
    step, state = checkpoint.load(resumed, trainer) if resumed else (0, {})
    if resumed:
        if accelerator.is_main_process:
            run_folder.record.add_to_start(folder, {"after_step": step})
        sampler.load_state_dict(state["sampler"])
        rates.load_state_dict(state["sampler"]["pass_rates"])
    elif config.data.pass_rate.path:
        rates.begin_with(read_pass_rates(config.data.pass_rate.path, [prompt.content for prompt in prompts]))
    pieces = Pieces(rank.tokenizer) if config.logging.tokens else None
    is_main = accelerator.is_main_process
    telemetry = Telemetry(config, folder, is_main, step if resumed else None, rank.header, pieces)
    stack.enter_context(telemetry)
    for text in _warnings(config, dropped, repetition_warning(len(prompts), per_step), told):
        telemetry.warn(text)
    timers = Timers(partial(torch.cuda.Event, enable_timing=True) if accelerator.device.type == "cuda" else None)
    share, writer, rewards = rank.share, writing.writer, rank.rewards
    publisher = WeightPublisher(
        trainer, transport, writing.engines, writing.rollouts, prompts[0], config.model.dtype, timers
    )
    stopping = stops.asked_anywhere
    batches = BatchQueue(prompts, sampler, rates, share, writer, rewards, timers, config, step, stopping, gather_object)
    if resumed:
        batches.load_replay(checkpoint.loop_files(resumed))
    parts = Parts(
        config=config,
        frozen=rank.frozen,
        batches=batches,
        trainer=trainer,
        weights=publisher,
        evaluator=Evaluator(sets, share, writer, rewards, telemetry, timers, config, state.get("before", [])),
        checkpoints=Checkpointer(
            folder, trainer, rank.tokenizer, config.checkpoint, state, partial(final_card, folder)
        ),
        telemetry=telemetry,
        timers=timers,
    )
    if resumed:
        for line in _how_it_goes_on(resumed, trainer, resume.changes(state["config"], rank.frozen)):
            telemetry.note(line)
    wait_for(writing.engines, rank, telemetry.note)
    # Servers may still hold the weights of an earlier run; whether vLLM takes adapters shows when it gets some.
    if resumed or config.rollout.servers or config.model.lora.alone:
        publisher.publish(step)
    return parts


def _last_checkpoint(config: Config, folder: Path, accelerator: Accelerator) -> Path:
    """Find what to go on from, and look it through before anything is started."""
    found = run_folder.latest_checkpoint(folder / run_folder.CHECKPOINTS)
    checkpoint.check(found, trainable_shapes(config.model), accelerator)
    return found


def _how_it_goes_on(resumed: Path, trainer: PolicyTrainer, changes: dict[str, str]) -> Iterator[str]:
    settings, rate = trainer.config.trainer, trainer.schedule.get_last_lr()[0]
    yield f"goes on from {resumed}, after step {run_folder.step_of(resumed)}"
    rising = f", rising until update {settings.warmup_updates}" if trainer.updates < settings.warmup_updates else ""
    yield (
        f"learning rate {rate:.3g} after update {trainer.updates} of {trainer.planned}, schedule {settings.schedule} "
        f"with a peak of {settings.learning_rate:g}{rising}"
    )
    if changes:
        yield "changed since: " + ", ".join(f"{key} {text}" for key, text in changes.items())


def _models(config: Config, empty: bool) -> tuple[Policy, Reference | None]:
    """Load the policy, and what a KL penalty keeps to: with adapters the policy without them."""
    policy = load_policy(config.model, config.trainer.gradient_checkpointing, empty)
    if config.model.lora.rank:
        from sapo_rl.policy.lora import LoraPolicy

        adapted = LoraPolicy(policy, config.model.lora, config.seed, config.model.path)
        return adapted, adapted.without_adapters if config.loss.kl.coef else None
    if not config.loss.kl.coef:
        return policy, None
    return policy, load_policy(config.model, empty=empty).to(DTYPES[config.model.dtype])


def _warnings(config: Config, dropped: int, repetition: str | None, of_sets: list[str]) -> list[str]:
    left_out = f"{dropped} prompts are longer than data.max_prompt_tokens: they are left out" if dropped else None
    filtered = filter_warning(config.rollout, config.loss.correction.by_token)
    isolated = isolation_warning(config.reward.functions | further_functions(config))
    on_cpu = config.model.dtype == "bfloat16" and not torch.cuda.is_available()
    slow = NO_BFLOAT16 if on_cpu and not has_bfloat16() else None
    found = (left_out, repetition, *of_sets, filtered, isolated, slow, *comparison_warnings(config))
    return [text for text in found if text]


class Stops:
    """What Ctrl-C, SIGTERM and SIGHUP do in this rank, from its making on.

    Before training they end it at once. Then the first ends the run after its step, with a checkpoint, and a second one
    at once; what comes within `SIGNAL_DEBOUNCE_SECONDS` seconds of the first is the first once more.
    """

    def __init__(self) -> None:
        self.asked = False
        """Whether to end after the step at hand."""
        self._first: float | None = None
        self._telemetry: Telemetry | None = None
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]
        for number in processes.stopping_signals():
            signal.signal(number, self._heard)

    def watch(self, telemetry: Telemetry) -> None:
        """Stop the run from now on, not the process; at once, where a library has swallowed an earlier interrupt."""
        self._telemetry = telemetry
        self.asked = self._first is not None

    def asked_anywhere(self) -> bool:
        """Return whether any rank was asked to stop; every rank calls it."""
        return any(gather_object([self.asked]))

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._leave_terminal()
        now = time.monotonic()
        if self._first is not None and now - self._first <= SIGNAL_DEBOUNCE_SECONDS:
            return
        again, self._first = self._first is not None, now
        if again or self._telemetry is None:
            raise KeyboardInterrupt
        self.asked = True
        self._telemetry.warn("stopping after this step; once more stops at once")

    def _leave_terminal(self) -> None:
        """Write to nowhere instead of to a terminal that has been closed: an error there would end the run."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for fd in self._terminals:
            if not os.isatty(fd):
                os.dup2(nowhere, fd)
        os.close(nowhere)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
