"""One rank of a run: `python -m sapo_rl.rank RUN_FOLDER` builds the parts and hands them to the loop."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import FrameType

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from sapo_rl import compose, run_folder
from sapo_rl.config import Config
from sapo_rl.data import PromptSampler, build_prompts, load_rows
from sapo_rl.errors import UserError
from sapo_rl.loop import Run, publish_weights, train
from sapo_rl.policy import checkpoint
from sapo_rl.policy.model import DTYPES, load_policy, load_tokenizer, stop_tokens
from sapo_rl.policy.trainer import PolicyTrainer
from sapo_rl.rewards import RewardPool
from sapo_rl.rollout.engine import EngineSettings
from sapo_rl.rollout.local import LocalEngine
from sapo_rl.rollout.stream import Rollouts
from sapo_rl.rollout.weights.file import FileTransport, weights_folder
from sapo_rl.telemetry import Telemetry, Timers
from sapo_rl.types import Prompt


def main(folder: Path | None) -> None:
    """Run this rank to its end; `folder` is None on ranks that learn it from rank 0. A user's mistake exits with 2."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        with contextlib.ExitStack() as stack:
            run = build(folder, stack)
            _stop_on_signals(run)
            train(run)
    except UserError as error:
        print(f"sapo-train: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    if run.step < run.config.trainer.steps:
        sys.exit(128 + signal.SIGINT)


def build(folder: Path | None, stack: contextlib.ExitStack) -> Run:
    """Build the parts, cheapest first, so that a mistake costs seconds; `stack` closes them in reverse."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    stack.callback(leave, accelerator)
    shared = [str(folder)]
    broadcast_object_list(shared)
    folder = Path(shared[0])
    config = compose.load(folder / run_folder.CONFIG)
    _seed(config, accelerator.process_index)
    if accelerator.is_main_process:
        run_folder.add_device(folder, _device_facts(accelerator))

    tokenizer = load_tokenizer(config.model)
    prompts, held_out, dropped = _prompts(config, tokenizer)
    sampler = PromptSampler(
        len(prompts), config.rollout.batch_size // config.rollout.group_size, config.seed, config.data.shuffle
    )
    rewards = stack.enter_context(RewardPool(config.reward))
    resumed = checkpoint.latest(folder / run_folder.CHECKPOINTS) if config.resume else None
    engine = LocalEngine(_engine_settings(config, folder, tokenizer, accelerator, resumed))
    stack.callback(engine.close)
    engine.start()  # it starts while this process loads its own copy of the model

    policy = load_policy(config.model, config.trainer.gradient_checkpointing)
    reference = load_policy(config.model).to(DTYPES[config.model.dtype]) if config.loss.kl.coef else None
    trainer = PolicyTrainer(policy, reference, config, accelerator)
    step, state = checkpoint.load(resumed, trainer) if resumed else (0, {})
    dtype = DTYPES[config.model.dtype]
    size = sum(weight.numel() for _, weight in policy.named_weights()) * dtype.itemsize
    transport = FileTransport(weights_folder(size), dtype)
    stack.callback(transport.close)
    telemetry = Telemetry(
        config,
        folder,
        is_main=accelerator.is_main_process,
        resume_step=step if resumed else None,
        wandb_id=state.get("wandb_id"),
        header=_device_facts(accelerator),
    )
    stack.enter_context(telemetry)
    if dropped:
        limit = config.data.max_prompt_tokens
        telemetry.warn(f"{dropped} prompts longer than data.max_prompt_tokens = {limit} are left out")
    rollouts = Rollouts([engine], config.rollout, tokenizer, config.seed, config.reproducible)
    run = Run(
        config, folder, prompts, held_out, sampler, [engine], rollouts, rewards, trainer, transport, telemetry, Timers()
    )
    engine.wait_ready()
    if resumed:
        run.step, run.sampler_state = step, state["sampler"]
        run.before = [(prompt, text) for prompt, text in state["before"]]
        sampler.load_state_dict(state["sampler"])
        publish_weights(run)
    return run


def leave(accelerator: Accelerator) -> None:
    """End this rank's part in the process group.

    The destructor of a gloo group holds the interpreter's lock while it joins a thread that may still need that lock to
    free the last collective's tensors (torch 2.13); the pause lets it, or the process would hang for good.
    """
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        time.sleep(0.2)
    accelerator.end_training()


def _prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Prompt], list[Prompt], int]:
    rows, held_out_rows = load_rows(config.data, config.eval.prompts, config.seed)
    prompts, dropped = build_prompts(rows, config.data, tokenizer)
    held_out, also_dropped = build_prompts(held_out_rows, config.data, tokenizer) if held_out_rows else ([], 0)
    return prompts, held_out, dropped + also_dropped


def _engine_settings(
    config: Config, folder: Path, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, resumed: Path | None
) -> EngineSettings:
    rollout, rank = config.rollout, accelerator.process_index
    on_gpu = accelerator.device.type == "cuda"
    return EngineSettings(
        model=config.model.path,
        dtype=config.model.dtype,
        max_model_len=config.data.max_prompt_tokens + rollout.max_completion_tokens,
        max_num_seqs=rollout.max_num_seqs,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        cpu_kv_cache_gb=rollout.cpu_kv_cache_gb,
        enforce_eager=rollout.enforce_eager or not on_gpu,
        stop_token_ids=stop_tokens(config.model, tokenizer),
        seed=_stream_seed(config.seed, rank, resumed),
        device=f"cuda:{accelerator.local_process_index}" if on_gpu else "cpu",
        trust_remote_code=config.model.trust_remote_code,
        revision=config.model.revision,
        start_timeout=rollout.start_timeout,
        timeout=rollout.timeout,
        max_restarts=rollout.max_restarts,
        log_path=folder / "logs" / f"vllm_rank{rank}.log",
    )


def _stream_seed(seed: int, rank: int, resumed: Path | None) -> int:
    """A seed of vLLM's own stream that neither another rank nor the part of the run before a resume has used."""
    return random.Random(f"{seed}/{rank}/{resumed.name if resumed else ''}").getrandbits(31)


def _seed(config: Config, rank: int) -> None:
    random.seed(config.seed + rank)
    np.random.seed((config.seed + rank) % 2**32)
    torch.manual_seed(config.seed + rank)
    if config.reproducible:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _device_facts(accelerator: Accelerator) -> dict[str, str | int | float]:
    facts: dict[str, str | int | float] = {"device": "cpu", "processes": accelerator.num_processes}
    if accelerator.device.type == "cuda":
        properties = torch.cuda.get_device_properties(accelerator.device)
        facts |= {"device": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
    return facts | {"torch_threads": torch.get_num_threads()}


def _stop_on_signals(run: Run) -> None:
    """The first Ctrl-C or SIGTERM ends the run after its step, with a checkpoint; the second ends it at once."""

    def ask(number: int, frame: FrameType | None) -> None:
        if run.stop_asked:
            raise KeyboardInterrupt
        run.stop_asked = True
        run.telemetry.warn("stopping after this step; once more stops at once")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
