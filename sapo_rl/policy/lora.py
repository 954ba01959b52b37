"""LoRA: low-rank adapters beside frozen linear layers; they alone are trained, kept in checkpoints and sent to vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from sapo_rl.config import LoraConfig, ModelConfig
from sapo_rl.errors import UserError, did_you_mean
from sapo_rl.policy.model import Policy, load_policy, reshard
from sapo_rl.policy.packing import PackedBatch

ALL = "all-linear"
ADAPTER = "default"


class LoraPolicy(Policy):
    """A policy whose adapters are float32 and trained, and whose model is frozen in the compute dtype.

    Args:
        policy: whose model is loaded in the compute dtype; adapters are put into it.
        settings: of the adapters.
        seed: of the adapters' first values, the same on all ranks.
        base: name or path of the model, for those who load the adapters alone.
    """

    def __init__(self, policy: Policy, settings: LoraConfig, seed: int, base: str) -> None:
        super().__init__(policy.model, policy.dtype)
        self._alone = settings.alone
        self._description = peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]
            target_modules=targets(policy.model, settings.target_modules),
            base_model_name_or_path=base,
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(self._description, self.model, ADAPTER)
        for layer in self._adapted().values():
            layer.cast_input_dtype_enabled = False  # autocast does it
            layer.lora_A.float()
            layer.lora_B.float()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what `model.lora.sync` sends to vLLM, see `merged_weights` and `adapters`."""
        return self.adapters() if self._alone else self.merged_weights()

    @torch.no_grad()
    def adapters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the adapters in float32, as `<module>.lora_A.weight` and `<module>.lora_B.weight`.

        The second is multiplied by alpha / rank: what an adapter adds is their product.
        """
        layers = self._adapted()
        for name, weight in self.trainable_weights():
            path, _, kind = name.removesuffix(f".{ADAPTER}.weight").rpartition(".")
            scale = layers[path].scaling[ADAPTER] if kind == "lora_B" else 1.0
            yield f"{path}.{kind}.weight", self.gather(weight, weight.dtype) * scale

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what differs from the model's own folder under Hugging Face names: adapted weights, adapters merged in.

        The other weights beside an adapted one come with it: vLLM fuses some of them (query, key and value; gate and
        up) and loads all parts of a fused weight or none.
        """
        reshard(self)
        layers = self._adapted()
        blocks = {_parent(path) for path in layers}
        for name, weight in self.model.named_parameters():
            path, _, kind = _plain(name).rpartition(".")
            if _is_adapter(name) or _parent(path) not in blocks:
                continue
            if path in layers and kind == "weight":
                yield f"{path}.{kind}", self._merged(layers[path])
            else:
                yield f"{path}.{kind}", self.gather(weight, weight.dtype)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """See `Policy.state`; what has adapters comes first without, then with them merged in."""
        yield from ((_plain(name), tensor) for name, tensor in super().state() if not _is_adapter(name))
        yield from self.merged_weights()

    def export(self, folder: Path, is_main: bool = True) -> None:
        """Write the merged model as `Policy.export` does, and the adapters alone, as peft has them, into `adapter/`."""
        super().export(folder, is_main)
        weights = {
            "base_model.model." + name.replace(f".{ADAPTER}.", "."): self.gather(weight, weight.dtype).contiguous()
            for name, weight in self.trainable_weights()
        }
        if is_main:
            alone = folder / "adapter"
            self._description.save_pretrained(str(alone))
            save_file(weights, alone / "adapter_model.safetensors")

    def without_adapters(self, batch: PackedBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """Return what `forward` does before any training: the reference of the KL penalty, with no second model."""
        layers = self._adapted().values()
        for layer in layers:
            layer.enable_adapters(False)
        try:
            return self(batch, temperature)
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    @torch.no_grad()
    def _merged(self, layer: LoraLayer) -> Tensor:
        """The weight of an adapted linear layer with its adapter merged in: (out, in) float32."""
        weights = layer.get_base_layer().weight, layer.lora_B[ADAPTER].weight, layer.lora_A[ADAPTER].weight
        base, up, down = (self.gather(weight, weight.dtype) for weight in weights if isinstance(weight, Tensor))
        return torch.addmm(base.float(), up, down, alpha=layer.scaling[ADAPTER])

    def _adapted(self) -> dict[str, LoraLayer]:
        return {path: module for path, module in self.model.named_modules() if isinstance(module, LoraLayer)}


def targets(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Return the last parts of the names of the linear modules that `names` (`model.lora.target_modules`) stand for.

    The head is none of them: its weight is used without the module around it, and is often the embedding's.

    Raises:
        UserError: a name stands for no module.
    """
    head = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    for name in names:
        if name not in linear and (name != ALL or not linear):
            known = did_you_mean(name, linear | {ALL})
            raise UserError(f"model.lora.target_modules: the model has no linear module '{name}'; {known}")
    return sorted(linear if ALL in names else set(names))


def check_targets(config: ModelConfig) -> list[str]:
    """Return what `targets` does, before the weights are loaded.

    Raises:
        UserError: as `targets` does.
    """
    return targets(load_policy(config, empty=True).model, config.lora.target_modules)


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _plain(name: str) -> str:
    """The name that a weight has in the model without adapters."""
    return name.replace(".base_layer.", ".")


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
