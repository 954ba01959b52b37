"""The part that runs inside vLLM's worker process (`worker_extension_cls`): it receives weights."""

from __future__ import annotations

import json
import logging
import multiprocessing
from collections.abc import Iterator
from typing import Any

import torch

from sapo_rl.engines.vllm.lora import replace_adapter
from sapo_rl.processes import die_with_parent
from sapo_rl.weights.buckets import read_buckets
from sapo_rl.weights.rendezvous import Group, Rendezvous, join, receive_tensors
from sapo_rl.weights.shared import open_blocks, open_layout

# A push need not bring every weight; vLLM would warn of every layer that it leaves as it is, each time.
logging.getLogger("vllm.model_executor.model_loader.reload").setLevel(logging.ERROR)
# vLLM leaves its core process behind, with the GPU's memory, when the process that started it is killed.
parent = multiprocessing.parent_process()
die_with_parent(parent.pid if parent else None)


class WeightReceiver:
    """Mixed into vLLM's worker; `model_runner`, `device` and `rank` (among the workers) are the worker's own."""

    model_runner: Any
    device: torch.device
    rank: int
    weight_group: Group | None = None
    shared_layout = ""
    shared_weights: tuple[tuple[str, torch.Tensor], ...] = ()
    stream_layout = ""
    stream_halves: tuple[torch.Tensor, ...] = ()

    def receive_shared(self, layout: str) -> None:
        """Replace the model's weights by those in memory of the trainer; return once they have been read."""
        if layout != self.shared_layout:
            self.shared_weights, self.shared_layout = tuple(open_layout(layout)), layout
        self._load(iter(self.shared_weights))

    def receive_stream(self, layout: str) -> None:
        """Replace the model's weights by those that arrive through a buffer of the trainer's."""
        if layout != self.stream_layout:
            self.stream_halves, self.stream_layout = tuple(open_blocks(json.loads(layout))), layout
        self._load(read_buckets(layout, self.stream_halves, self._synchronize))
        if self.device.type != "cpu":
            torch.cuda.empty_cache()  # the tensors' own memory: the cache of keys and values may need it

    def join_group(self, meeting: str) -> None:
        """Come together with the trainer, and leave the group of an earlier time."""
        if self.weight_group is not None:
            self.weight_group.abort()
        self.weight_group = join(Rendezvous.from_json(meeting), 1 + self.rank, self.device)

    def restore(self) -> None:
        """Load the weights of the model's folder again: a trainer need not send all that an earlier one changed."""
        self.model_runner.reload_weights()
        self._settle()

    def receive_broadcast(self, layout: str) -> None:
        """Replace the model's weights by those that the trainer broadcasts in the group."""
        assert self.weight_group is not None
        tensors = receive_tensors(self.weight_group, layout, self.device)
        try:
            self._load(tensors)
        finally:
            for _ in tensors:  # the trainer would wait for a receiver of each block
                pass

    def _load(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Have the model load tensors that are named as in its checkpoint; return once they have been read.

        The general way is vLLM's loading of a checkpoint: its CPU build repacks weights after it, so that copying into
        the parameters is not enough there. Layers that get nothing stay as they are; one that fuses several weights
        needs all of them. A model with adapters gets these, and keeps its weights.
        """
        if hasattr(self.model_runner, "lora_manager"):
            replace_adapter(self.model_runner, tensors, self.device)
            self._synchronize()
            return
        model = self.model_runner.get_model()
        if self.device.type != "cpu" and keeps_checkpoint_format(model):
            model.load_weights(tensors)  # several times as fast as the general way
        else:
            self.model_runner.reload_weights(weights_iterator=tensors, is_checkpoint_format=True)
        self._settle()

    def _settle(self) -> None:
        if self.device.type == "cpu":
            _repack_heads(self.model_runner.get_model())
        else:
            self._synchronize()

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.cuda.synchronize()


def keeps_checkpoint_format(model: torch.nn.Module) -> bool:
    """Return whether the parameters of a model on a GPU are used as loaded: neither quantised nor repacked."""
    from vllm.model_executor.layers.attention import MLAAttention
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    plain = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, type(None))
    return not any(
        isinstance(module, MLAAttention) or not isinstance(getattr(module, "quant_method", None), plain)
        for module in model.modules()
    )


def _repack_heads(model: torch.nn.Module) -> None:
    """Renew the head's packed copy of its weight.

    A head that is tied to the embedding is in no checkpoint, so that vLLM's reload leaves the old copy in use.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
