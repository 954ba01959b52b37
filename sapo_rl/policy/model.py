"""The policy as a module: packed stream in, log-probability and entropy of its trained tokens out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.fx.experimental import _config as symbolic
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from sapo_rl.config import ModelConfig
from sapo_rl.errors import UserError, described
from sapo_rl.policy import attention, model_folder
from sapo_rl.policy.logprobs import token_logps
from sapo_rl.policy.packing import PackedBatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Policy(nn.Module):
    """A causal language model under the packed attention, with float32 weights and a compute dtype of its own."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.gather: Callable[[Tensor, torch.dtype], Tensor] = whole
        """From a rank's shard of a weight to the whole; in the dtype asked for, where it is sharded."""
        self.head_copy: Tensor | None = None
        """The head's weight in the compute dtype, where it need not be cast at every use."""

    def forward(self, batch: PackedBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """Return (T,) float32 log-probabilities of the trained tokens at `temperature`, and their (T,) entropies."""
        half = self.dtype == torch.bfloat16
        with torch.autocast(batch.input_ids.device.type, dtype=torch.bfloat16, enabled=half):
            embed = self.model.get_input_embeddings()
            hidden = self.model.base_model(
                inputs_embeds=embed(batch.input_ids[None]).to(self.dtype),  # the residual stream in half, as vLLM's
                position_ids=batch.position_ids[None],
                use_cache=False,
                packed=batch,
            ).last_hidden_state[0]
        head = self.model.get_output_embeddings()
        states = hidden.index_select(0, batch.hidden_index).to(self.dtype)
        return token_logps(states, head.weight, batch.targets, temperature, self.head_copy)  # type: ignore[arg-type]

    def compile_layers(self) -> None:
        """Compile each decoder layer in place; sizes stay symbolic, so that batches of all lengths share one graph."""
        symbolic.use_duck_shape = False  # two sizes that are equal in the first batch are still two
        for layer in self.layers():
            layer.compile(dynamic=True)

    def layers(self) -> list[nn.Module]:
        """Return the decoder layers, which are compiled, sharded and recomputed one by one."""
        return [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight once under its Hugging Face name; a tied head is its embedding's.

        Sharded weights are gathered one by one, in the compute dtype: every rank must go through all of them.
        """
        reshard(self)
        for name, parameter in self.model.named_parameters():
            yield name, self.gather(parameter, self.dtype)

    def trainable_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield each float32 weight that an update changes, a shard of it where it is sharded, for checkpoints."""
        reshard(self)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all weights and buffers of the model, as `named_weights` does."""
        reshard(self)
        seen: set[int] = set()
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, self.gather(tensor, self.dtype)

    def export(self, folder: Path, is_main: bool = True) -> None:
        """Write a Hugging Face model folder, weights in the compute dtype; every rank calls it, `is_main` on one."""
        weights: dict[str, Tensor] = {}
        for name, tensor in self.state():
            if is_main:
                weights[name] = tensor.to("cpu", self.dtype)
        if is_main:
            self.model.config.dtype = self.dtype
            self.model.save_pretrained(folder, state_dict=weights)


def whole(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor as it is, or gathered from all ranks, in `dtype`, where it is sharded; then all must call it."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    found: Any = tensor.to(dtype or tensor.dtype)
    return found.full_tensor()


def reshard(policy: Policy) -> None:
    """Put the shards back that a forward pass without a backward has left gathered."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def load_policy(config: ModelConfig, gradient_checkpointing: bool = False, empty: bool = False) -> Policy:
    """Load the model with float32 weights, or those that adapters will leave frozen in the compute dtype.

    Args:
        config: names the model.
        gradient_checkpointing: recompute activations in the backward pass.
        empty: read no weights and take no memory for them: parameters are on the device `meta`.

    Raises:
        UserError: the model cannot be found or read, lacks weights or has some that are no numbers, or has a head that
            the packed log-probabilities do not cover.
    """
    source: dict[str, Any] = {"revision": config.revision or "main", "trust_remote_code": config.trust_remote_code}
    dtype = DTYPES[config.dtype] if config.lora.rank else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention.NAME}
    try:
        if empty:
            known = AutoConfig.from_pretrained(config.path, **source)
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(known, trust_remote_code=config.trust_remote_code, **options)
            model.tie_weights()  # the context has made two of a shared one
        else:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                config.path, **source, **options, output_loading_info=True
            )
            model, report = loaded
            _check_loaded(config.path, model, sorted(report["missing_keys"]))
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever a folder makes the library raise
        raise UserError(f"model.path: cannot load '{config.path}': {described(error)}") from error
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise UserError(f"model.path: '{config.path}' has no plain linear head; a causal language model is needed")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the ratio of new to old must not be noise
    model.train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return Policy(model, DTYPES[config.dtype])


def _check_loaded(path: str, model: PreTrainedModel, missing: list[str]) -> None:
    """Raise where weights were made up, because the files have none, or are no numbers."""
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if missing[3:] else "")
        raise UserError(f"model.path: '{path}' lacks {len(missing)} weights of the model in its config.json: {some}")
    for name, weight in model.named_parameters():
        # A sum takes no memory; one of finite numbers may overflow.
        if not weight.sum().isfinite() and not weight.isfinite().all():
            raise UserError(f"model.path: '{path}' has weights that are no finite numbers: {name}")


def check_shapes(config: ModelConfig) -> None:
    """Compare a folder's safetensors with the model that its config describes, without loading any.

    Raises:
        UserError: a weight has another shape, or `load_policy` raises it.
    """
    folder = model_folder.local_folder(config.path)
    if folder is None or "quantization_config" in model_folder.read_json(folder / model_folder.CONFIG):
        return
    found = model_folder.shapes(folder)
    for name, weight in load_policy(config, empty=True).model.named_parameters():
        if found.get(name, weight.shape) != weight.shape:
            raise UserError(
                f"model.path: {name} in '{config.path}' has the shape {list(found[name])}, config.json makes it "
                f"{list(weight.shape)}"
            )


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer.

    Raises:
        UserError: there is none at the model's path.
    """
    try:
        return AutoTokenizer.from_pretrained(
            config.path, revision=config.revision or "main", trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # whatever a folder makes the library raise
        raise UserError(f"model.path: no tokenizer at '{config.path}': {described(error)}") from error


def stop_tokens(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end a completion: the tokenizer's end of sequence and those of the generation config.

    Raises:
        UserError: there are none, or the generation config cannot be read.
    """
    named: list[Any] = [tokenizer.eos_token_id]
    try:
        ids = GenerationConfig.from_pretrained(config.path, revision=config.revision or "main").eos_token_id
        named += ids if isinstance(ids, list) else [ids]
    except OSError:  # a model without one stops at the tokenizer's token alone
        pass
    except Exception as error:
        raise UserError(f"model.path: the generation config of '{config.path}': {described(error)}") from error
    stops = sorted({token for token in named if isinstance(token, int)})
    if not stops:
        raise UserError(f"model.path: '{config.path}' names no end-of-sequence token, so no completion would end")
    return stops
