"""From the config to the engines of one GPU and the way weights reach them: how many, how much memory, what sleeps."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sapo_rl.config import Config, ModelConfig
from sapo_rl.engines import own
from sapo_rl.engines.base import Engine, EngineSettings
from sapo_rl.engines.key import read_key
from sapo_rl.engines.process import LocalEngine
from sapo_rl.errors import UserError, described
from sapo_rl.processes import at_once
from sapo_rl.sizing import (
    GIB,
    adapter_parameters,
    buffer_bytes,
    element_size,
    engine_parameters,
    sent_parameters,
    trainer_memory,
)
from sapo_rl.weights.base import WeightTransport
from sapo_rl.weights.broadcast import NcclTransport
from sapo_rl.weights.buckets import BucketTransport
from sapo_rl.weights.buffer import ALIGNMENT
from sapo_rl.weights.file import FileTransport, weights_folder
from sapo_rl.weights.ipc import IpcTransport

SMALL_MODEL = 1_000_000_000
"""Parameters below which two engines write more than one on the same GPU; measured with 135M: more than twice."""
OVERHEAD = 3 * GIB
"""What an engine takes beside weights, cache and logits: CUDA context, graphs, activations of a prefill."""
USABLE = 0.92
"""Share of a GPU's memory that may be planned for; the rest goes to contexts and fragmentation."""


@dataclass(frozen=True)
class ModelFacts:
    """What memory depends on, known before the model is loaded.

    Example:
        >>> facts = ModelFacts(parameters=134_515_008, cache_elements=30 * 2 * 3 * 64, shape={"hidden_size": 576})
        >>> facts.cache_elements * 2  # bytes of the cache for one token in bfloat16
        23040
    """

    parameters: int
    """Elements of all weights, a tied one counted once."""
    cache_elements: int
    """Elements of keys and values that one token takes in the cache."""
    shape: dict[str, Any]
    """The text model's Hugging Face config."""
    largest: int = 0
    """Elements of the largest weight."""
    linear: Mapping[str, int] = field(default_factory=dict[str, int])
    """Inputs and outputs of all linear modules but the head, added up by the last part of their names."""
    adapted: tuple[str, ...] = ()
    """Last parts of the names of the modules that get adapters."""


@dataclass(frozen=True)
class Device:
    """Where a rank computes.

    Example:
        >>> Device("cuda:0", 80 * 2**30)
        Device(name='cuda:0', memory=85899345920, index=0)
    """

    name: str
    """`cpu`, or `cuda:<index>` among the devices that this process sees."""
    memory: int
    """Bytes of a GPU's memory; 0 on the CPU."""
    index: int = 0
    """The rank's number on its machine."""


def device_of(local_rank: int) -> Device:
    """Return the GPU of that number, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return Device("cpu", 0, local_rank)
    return Device(f"cuda:{local_rank}", torch.cuda.get_device_properties(local_rank).total_memory, local_rank)


def model_facts(config: ModelConfig) -> ModelFacts:
    """Read the model's config and build the model without memory, to count its weights.

    Raises:
        UserError: the model cannot be found, or is none that generates text.
    """
    options = {"revision": config.revision or "main", "trust_remote_code": config.trust_remote_code}
    try:
        whole = AutoConfig.from_pretrained(config.path, **options)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(whole, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # whatever a folder makes the library raise
        raise UserError(f"model.path: cannot read '{config.path}': {described(error)}") from error
    text = whole.get_text_config()
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    cache_heads = getattr(text, "num_key_value_heads", None) or heads
    return ModelFacts(
        parameters=sum(weight.numel() for weight in model.parameters()),
        cache_elements=2 * text.num_hidden_layers * cache_heads * head_size,
        shape=text.to_dict(),
        largest=max(weight.numel() for weight in model.parameters()),
        linear=_linear(model),
    )


def _linear(model: PreTrainedModel) -> Counter[str]:
    head, found = model.get_output_embeddings(), Counter[str]()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            found[name.rpartition(".")[2]] += module.in_features + module.out_features
    return found


def cache_bytes(config: Config, facts: ModelFacts, memory: int, engines: int) -> int | None:
    """Return the size of each engine's key-value cache on each of its GPUs, of `memory` bytes, that `engines` share.

    It is what the engine's share of `rollout.gpu_memory_utilization` leaves, but no more than `rollout.max_num_seqs` of
    the longest sequences fill. Fixed beforehand because vLLM's own measurement takes what other processes allocate
    meanwhile for its own. None where the share is too small for this estimate: vLLM must measure.
    """
    rollout, size = config.rollout, element_size(config) / config.rollout.tensor_parallel
    per_sequence = (
        (config.max_sequence_tokens + 16) * facts.cache_elements * size
    )  # the cache is dealt out by 16 tokens
    logits = 4 * 4 * rollout.max_num_seqs * facts.shape.get("vocab_size", 0)
    weights = engine_parameters(config, facts.parameters, adapter_parameters(config, facts.linear)) * size
    left = rollout.gpu_memory_utilization * memory / engines - weights - OVERHEAD - logits
    return int(min(left, rollout.max_num_seqs * per_sequence)) if left >= per_sequence else None


def engine_count(config: Config, facts: ModelFacts, device: Device) -> int:
    """Return how many engines share the device: `rollout.engines_per_gpu`, where that is not `auto`."""
    if config.rollout.engines_per_gpu != "auto":
        return int(config.rollout.engines_per_gpu)
    small = device.name != "cpu" and facts.parameters < SMALL_MODEL and config.rollout.tensor_parallel == 1
    return 2 if small and cache_bytes(config, facts, device.memory, 2) is not None else 1


def sleep_level(config: Config, facts: ModelFacts, device: Device) -> int:
    """Return what the engines free while the trainer works: `rollout.sleep`, where that is not `auto`.

    Raises:
        UserError: they are to sleep and to write at the same time.
    """
    rollout = config.rollout
    if device.name == "cpu" or rollout.overlaps:
        if rollout.sleep in ("1", "2") and device.name != "cpu":
            raise UserError(f"rollout.sleep: {rollout.sleep} cannot be with rollout.mode=overlap; set 0 or auto")
        return 0
    if rollout.sleep != "auto":
        return int(rollout.sleep)
    adapters = adapter_parameters(config, facts.linear)
    trainer = sum(trainer_memory(config, facts.parameters, facts.shape, adapters).values())
    buffer = buffer_bytes(config, sent_parameters(config, facts.parameters, adapters))
    if trainer + buffer <= (USABLE - rollout.gpu_memory_utilization) * device.memory:
        return 0
    return 1 if config.model.lora.rank else 2  # the weights without adapters are never sent: they must not be lost


def build_transport(config: Config, facts: ModelFacts, device: Device, run: str, is_main: bool) -> WeightTransport[Any]:
    """Return the way that `rollout.transport` names, or that an engine of the user's own brings.

    Args:
        config: the run's.
        facts: of its model.
        device: the rank's.
        run: see `NcclTransport`.
        is_main: whether this is rank 0.

    Raises:
        UserError: `ipc` without a GPU, or no room for `file`.
    """
    if engine := own.find(config.rollout.engine):
        return engine.transport()
    kind, dtype = config.rollout.transport, getattr(torch, config.model.dtype)
    if config.rollout.servers:
        return NcclTransport(dtype, device.name, run, is_main, config.rollout.timeout)
    if kind == "ipc" and device.name == "cpu":
        raise UserError("rollout.transport: ipc needs a GPU; set auto or file")
    if kind == "ipc" or (kind == "auto" and device.name != "cpu" and config.rollout.tensor_parallel == 1):
        return _gpu_transport(config, facts, dtype)
    return FileTransport(weights_folder(_sent_bytes(config, facts, dtype)), dtype)


def _sent_bytes(config: Config, facts: ModelFacts, dtype: torch.dtype) -> int:
    sent = sent_parameters(config, facts.parameters, adapter_parameters(config, facts.linear))
    return sent * dtype.itemsize


def _gpu_transport(config: Config, facts: ModelFacts, dtype: torch.dtype) -> WeightTransport[Any]:
    """Return the transport through memory of the GPU: that holds all weights, or one bucket after the other."""
    size = _sent_bytes(config, facts, dtype)
    buffer = int(config.rollout.sync_buffer_gb * GIB)
    on_several = config.rollout.tensor_parallel > 1  # engines on other GPUs map a copy of the whole
    if on_several or not 0 < buffer < size:
        return IpcTransport(dtype)
    half = max(buffer // 2, facts.largest * dtype.itemsize + ALIGNMENT)
    keep = config.rollout.max_restarts > 0
    files = FileTransport(weights_folder(size + facts.largest * dtype.itemsize if keep else 0), dtype)
    return BucketTransport(IpcTransport(dtype), files, half, keep)


def build_engines(
    config: Config, facts: ModelFacts, device: Device, folder: Path, stop_token_ids: list[int], stream: str
) -> list[Engine]:
    """Return the engines of a rank, not yet started: those of its device, or all of `rollout.servers`.

    The arguments are those of `engine_settings`. Raises UserError where servers are to be asked without an API key.
    """
    rollout = config.rollout
    if not rollout.servers:
        make = own.find(rollout.engine) or LocalEngine
        settings = engine_settings(config, facts, device, folder, stop_token_ids, stream)
        return [make(one, **rollout.engine.args) for one in settings]
    from sapo_rl.engines.remote import RemoteEngine, RemoteSettings  # httpx and pydantic take 0.2 s to import

    key = read_key()
    return [
        RemoteEngine(
            RemoteSettings(
                address=address,
                key=key,
                dtype=config.model.dtype,
                max_model_len=config.max_sequence_tokens,
                stop_token_ids=stop_token_ids,
                start_timeout=rollout.start_timeout,
                timeout=rollout.timeout,
            )
        )
        for address in rollout.servers
    ]


def engine_settings(
    config: Config, facts: ModelFacts, device: Device, folder: Path, stop_token_ids: list[int], stream: str
) -> list[EngineSettings]:
    """Return the settings of each engine of a rank; none, where it only lends its device to the engine of another.

    Args:
        config: the run's.
        facts: of its model.
        device: the rank's.
        folder: their logs are written there, one each: `<name>.log`, `<name>_1.log`, ...
        stop_token_ids: see `EngineSettings`.
        stream: tells this rank, and the part of the run since a resume, from all others: seeds depend on it. The part
            before the first `/` names the logs.
    """
    rollout = config.rollout
    if device.index % rollout.tensor_parallel:
        return []
    count = engine_count(config, facts, device)
    on_gpu = device.name != "cpu"
    name = stream.partition("/")[0]
    return [
        EngineSettings(
            model=config.model.path,
            dtype=config.model.dtype,
            max_model_len=config.max_sequence_tokens,
            max_num_seqs=rollout.max_num_seqs,
            gpu_memory_utilization=rollout.gpu_memory_utilization / count,
            cpu_kv_cache_gb=rollout.cpu_kv_cache_gb / count,
            enforce_eager=rollout.enforce_eager or not on_gpu,
            stop_token_ids=stop_token_ids,
            seed=random.Random(f"{config.seed}/{stream}/{index}").getrandbits(31),
            device=device.name,
            trust_remote_code=config.model.trust_remote_code,
            revision=config.model.revision,
            start_timeout=rollout.start_timeout,
            timeout=rollout.timeout,
            max_restarts=rollout.max_restarts,
            log_path=folder / (f"{name}_{index}.log" if index else f"{name}.log"),
            tensor_parallel=rollout.tensor_parallel,
            kv_cache_bytes=cache_bytes(config, facts, device.memory, count) if on_gpu else None,
            sleep_level=sleep_level(config, facts, device),
            core_process=on_gpu and count == 1,  # several fill each other's pauses without, and start sooner
            lora_rank=config.model.lora.rank if config.model.lora.alone else 0,
            lora_modules=facts.adapted,
        )
        for index in range(count)
    ]


def close_all(engines: Sequence[Engine]) -> None:
    """Close the engines side by side."""
    at_once([engine.close for engine in engines])
