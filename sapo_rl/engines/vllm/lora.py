"""Adapters inside vLLM's worker: they come as tensors, and take the place of those before."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

ADAPTER_ID = 1
"""vLLM's number of the one adapter that it has."""


def replace_adapter(model_runner: Any, tensors: Iterable[tuple[str, torch.Tensor]], device: torch.device) -> None:
    """Have vLLM compute with these adapters from its next step on, requests that are under way included.

    Args:
        model_runner: of a vLLM with `enable_lora`.
        tensors: `<module>.lora_A.weight` (rank, in) and `<module>.lora_B.weight` (out, rank), modules named as in the
            checkpoint; an adapter adds their product.
        device: the model's.

    Raises:
        ValueError: vLLM's model has no place for one of them.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    manager = model_runner.lora_manager._adapter_manager
    named = dict(tensors)
    rank = next(tensor.shape[0] for name, tensor in named.items() if name.endswith(".lora_A.weight"))
    lora = LoRAModel.from_lora_tensors(
        ADAPTER_ID,
        named,
        PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),  # alpha / rank is in the tensors
        device=str(device),
        dtype=manager.lora_config.lora_dtype,
        weights_mapper=_renaming(manager.model),
    )
    fused = {part for parts in manager.packed_modules.values() for part in parts}
    if unknown := sorted(lora.loras.keys() - manager.modules.keys() - fused):
        some = ", ".join(unknown[:3]) + (", ..." if unknown[3:] else "")
        raise ValueError(f"model.lora.sync: vLLM has no place for adapters of {some}; set merged")
    manager.remove_adapter(ADAPTER_ID)
    manager.add_adapter(lora)
    manager.activate_adapter(ADAPTER_ID)  # copies them: the tensors may change from then on


def _renaming(model: Any) -> Any:
    """What vLLM calls a checkpoint's modules, where it has other names; parts that it fuses keep theirs."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return None
    renaming = getattr(mapper, "get_rename_mapper", None) or mapper.get_unstacked_mapper  # its name before 0.32
    return renaming()
