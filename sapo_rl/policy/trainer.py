"""One rollout batch into K updates of the policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from inspect import isabstract, signature
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from sapo_rl import plugins
from sapo_rl.config import Config, TrainerConfig
from sapo_rl.config.loss import LossConfig
from sapo_rl.errors import UserError
from sapo_rl.losses import (
    BatchPolicyLossFn,
    LossInputs,
    PackedLoss,
    PolicyLossFn,
    Reduction,
    build_loss,
    log_ratio,
    token_weights,
)
from sapo_rl.policy.model import Policy
from sapo_rl.policy.packing import Item, PackedBatch, empty_batch, join, pack, spread, stream_tokens
from sapo_rl.policy.parallel import parallel
from sapo_rl.policy.schedule import make_schedule
from sapo_rl.policy.temperatures import Temperatures
from sapo_rl.policy.trace import Trace, step_metrics, token_values, trace
from sapo_rl.types import Group, Place, Row, Sample, Stop, TokenValues


@dataclass(slots=True)
class _MicroBatch:
    """A packed batch with the log-probabilities that later passes compare with."""

    batch: PackedBatch
    filler: bool
    """True where it only keeps this rank in step with one that has more work."""
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None


Reference: TypeAlias = Callable[[PackedBatch, float], tuple[Tensor, Tensor]]
"""The model that a KL penalty keeps to: batch and temperature to what `Policy.forward` returns."""

NO_ARGUMENTS = ("backend", "loss_agg_mode", "loss_agg_norm")
"""Fields of every loss that do nothing in a run: aggregation is the trainer's, by `loss.loss_agg_mode`."""
_AT_ONCE = 4
"""Micro-batches in a pass without gradients, which keeps one layer's activations where a pass with them keeps all."""


def objective(config: LossConfig) -> PackedLoss:
    """Return the loss that the config describes.

    Raises:
        UserError: a loss of the user's own that cannot be imported, is none, or refuses its settings.
    """
    settings = asdict(config)
    del settings["old_logps"], settings["tau_target_kl"]  # what the trainer itself reads
    if "." not in config.name:
        return build_loss(**settings)
    try:
        settings["name"] = _own_loss(config)
        return build_loss(**settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"loss.args: '{config.name}' refuses its settings: {error}") from error


def _own_loss(config: LossConfig) -> type[PolicyLossFn]:
    """Import the class that `loss.name` names, and hold `loss.args` to its fields."""
    try:
        found = plugins.find("policy loss", config.name)
        if not (isinstance(found, type) and issubclass(found, PolicyLossFn)) or isabstract(found):
            raise UserError(f"policy loss '{config.name}' is no subclass of PolicyLossFn that has token_losses")
    except UserError as error:
        raise UserError(f"loss.name: {error}") from error
    fields = [one for one in signature(found).parameters.values() if one.name not in NO_ARGUMENTS]
    named = {one.name for one in fields}
    bare = next((key for key in config.args if key in vars(found).get("__annotations__", {}) and key not in named), "")
    if bare:
        raise UserError(f"loss.args.{bare}: is no field yet; write @dataclass above the class {found.__name__}")
    plugins.check_arguments("loss.args", found, config.args, fields)
    return found


class PolicyTrainer:
    """Holds the policy, the optimiser and the schedule, on every rank."""

    def __init__(self, policy: Policy, reference: Reference | None, config: Config, accelerator: Accelerator) -> None:
        settings = config.trainer
        self.config = config
        self.accelerator = accelerator
        self.policy = policy
        self._old_logps = config.loss.old_logps
        self._loss = objective(config.loss)
        self.temperatures = Temperatures(config.loss)
        second = [reference] if isinstance(reference, Policy) else []
        if settings.compile and accelerator.device.type == "cuda" and policy.dtype == torch.bfloat16:
            for model in (policy, *second):
                model.compile_layers()  # before sharding, whose hooks stay outside the compiled code
        self.parallel = parallel(policy, settings, accelerator, fused=not config.reproducible)
        self._module = self.parallel.module
        self._reference = self.parallel.reference(reference).eval() if isinstance(reference, Policy) else reference
        self.tokens: list[TokenValues] = []
        """What the last step made of each token that this rank trained on, with `logging.tokens`."""
        self.go_on(step=0, updates=0)

    def go_on(self, step: int, updates: int) -> None:
        """Count on from the end of a step, after so many updates in all; the schedule ends with the last step."""
        settings, self.updates = self.config.trainer, updates
        self.planned = updates + (settings.steps - step) * settings.updates_per_rollout
        """Updates of the whole run."""
        self.schedule = make_schedule(settings, self.parallel.optimizer, self.planned, updates)

    def train_on(self, groups: Sequence[Group], timer: Callable[[str], Any]) -> dict[str, float]:
        """Take the step's K updates on this rank's groups.

        Args:
            groups: this rank's share of the rollout batch, advantages filled in.
            timer: context manager by phase name (`old_logps`, `update`).

        Returns:
            The step's `policy/*` and `mismatch/*` metrics, equal on all ranks; with several of them also
            `perf/rank_imbalance`, the tokens of the busiest rank over the mean.
        """
        settings = self.config.trainer
        num_parts = settings.mini_batches or settings.updates_per_rollout
        size = len(groups) // num_parts  # 0 on a rank whose engine another one leads
        shares = [self._share(groups[part * size : (part + 1) * size], part * size) for part in range(num_parts)]
        parts = [self._micro_batches(items) for items, _ in shares]
        with timer("old_logps"), self.parallel.passes():
            self._remember_logps(parts)
        if self.temperatures.adapt:
            self._loss = objective(self.temperatures.loss)
        traces: list[list[Trace]] = []
        losses: list[Tensor] = []
        norms: list[Tensor] = []
        with timer("update"):
            for update in range(settings.updates_per_rollout):
                traces.append([])
                loss, norm = self._update(parts[update % num_parts], traces[-1])
                losses.append(loss)
                norms.append(norm)
            across, everything = Reduction(self._sum, self._joined), [one for left in traces for one in left]
            device = self.accelerator.device
            metrics = step_metrics(everything, losses, norms, self.temperatures.loss, device, across)
            metrics |= self.temperatures.observe(everything, device, across)
        if self.config.logging.tokens:
            last = zip((items for items, _ in shares), traces[-num_parts:], strict=True)
            self.tokens = [one for items, left in last for one in token_values(items, left)]
        rate = {"policy/learning_rate": float(self.schedule.get_last_lr()[0])}
        return metrics | rate | _imbalance([loads for _, loads in shares], self.accelerator.num_processes)

    @torch.no_grad()
    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Return the log-probability of each token after the first, at temperature 1."""
        row = Row(list(token_ids[:1]), list(token_ids[1:]))
        (batch,) = pack([[Item([row], advantage=0.0, weight=0.0)]], len(token_ids))
        with self.parallel.passes():
            logps, _ = self._module(batch.to(self.accelerator.device), 1.0)
        return logps.tolist()

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        """Yield the policy's weights as `Policy.named_weights` does; every rank must read them."""
        return self.policy.named_weights()

    def take_peak_memory(self) -> float:
        """Return the most GPU memory that the trainer's tensors took since the last call, in GiB; 0 on the CPU."""
        if self.accelerator.device.type != "cuda":
            return 0.0
        peak = torch.cuda.max_memory_allocated(self.accelerator.device)
        torch.cuda.reset_peak_memory_stats(self.accelerator.device)
        return peak / 2**30

    def _share(self, groups: Sequence[Group], first: int = 0) -> tuple[list[list[Item]], list[int]]:
        """Return this rank's share of a mini-batch, groups `first` on of its batch, and how many tokens each rank has.

        Groups change ranks: what is left of a rank's own, after those that teach nothing, may be much or little.
        """
        items = self._items(groups, first)
        costs: list[list[int]] = gather_object([[stream_tokens(group) for group in items]])
        owners, loads = spread(costs)
        rank = self.accelerator.process_index
        placed = list(zip(owners[rank], items, strict=True))
        moved: list[tuple[int, list[Item]]] = gather_object([one for one in placed if one[0] != rank])
        return [group for owner, group in [*placed, *moved] if owner == rank], loads

    def _items(self, groups: Sequence[Group], first: int) -> list[list[Item]]:
        """Return what this rank's groups give to train on, weighted as parts of all ranks' mini-batch."""
        kept = _kept(groups, self.config.advantage.mask_truncated, first, self.accelerator.process_index)
        lengths = [sample.num_trained for samples in kept for _, sample in samples]
        counts = torch.tensor([sum(len(group.samples) for group in groups), sum(lengths)], dtype=torch.float64)
        num_sequences, num_tokens = (int(x) for x in self._sum(counts).tolist())
        weights = token_weights(
            torch.tensor(lengths),
            self.config.loss.loss_agg_mode,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            normalizer=self.config.loss.loss_agg_norm or self.config.max_episode_tokens,
        )
        weight_of = dict(zip(lengths, weights.tolist(), strict=True))
        whole = self._reference is not None or not self.config.advantage.skip_zero_spread
        return [
            [_item(sample, weight_of[sample.num_trained], place) for place, sample in samples]
            for samples in kept
            if samples and (whole or any(one.advantage for _, one in samples))
        ]

    def _micro_batches(self, items: Sequence[Sequence[Item]]) -> list[_MicroBatch]:
        """Pack this rank's share; as many micro-batches on every rank, so that no collective is missed."""
        batches = pack(items, self.config.trainer.tokens_per_micro_batch)
        missing = max(1, *gather_object([len(batches)])) - len(batches)
        micros = [_MicroBatch(batch.to(self.accelerator.device), filler=False) for batch in batches]
        return micros + [_MicroBatch(empty_batch().to(self.accelerator.device), filler=True) for _ in range(missing)]

    @torch.no_grad()
    def _remember_logps(self, parts: Sequence[Sequence[_MicroBatch]]) -> None:
        """Fill in the old log-probabilities: vLLM's, or the trainer's, which at the first update are those of now."""
        micros, heat = [micro for part in parts for micro in part], self.config.rollout.temperature
        if self._old_logps == "rollout":
            for micro in micros:
                micro.old_logps = micro.batch.rollout_logps
        else:
            later = micros[len(parts[0]) :]
            for micro, logps in zip(later, _logps(self._module, later, heat), strict=True):
                micro.old_logps = logps
        if self._reference is not None:
            for micro, logps in zip(micros, _logps(self._reference, micros, heat), strict=True):
                micro.ref_logps = logps

    def _update(self, part: Sequence[_MicroBatch], traces: list[Trace]) -> tuple[Tensor, Tensor]:
        """Accumulate the gradient of one mini-batch and step; returns loss (all ranks) and gradient norm, 0-d."""
        total = torch.zeros((), device=self.accelerator.device)
        with self.parallel.passes():
            limit = self._limit(part)
            for number, micro in enumerate(part, start=1):
                with self.parallel.micro_batch(last=number == len(part)):
                    total += self._backward(micro, limit, traces)
        norm = self.parallel.step()
        self.schedule.step()
        self.updates += 1
        return self._sum(total), norm

    def _limit(self, part: Sequence[_MicroBatch]) -> Tensor | None:
        """Return what the loss has to know of all ranks' mini-batch before its gradients, if anything."""
        policy = self._loss.policy
        if not isinstance(policy, BatchPolicyLossFn):
            return None
        log_ratios, advantages = _moved(self._module, part, self.config.rollout.temperature, policy.ratio_level)
        return policy.batch_limit(log_ratios, advantages, Reduction(self._sum, self._joined))

    def _backward(self, micro: _MicroBatch, limit: Tensor | None, traces: list[Trace]) -> Tensor:
        batch = micro.batch
        logps, entropy = self._module(batch, self.config.rollout.temperature)
        old_logps = logps.detach() if micro.old_logps is None else micro.old_logps
        micro.old_logps = old_logps
        outputs = self._loss(
            LossInputs(
                logps=logps,
                old_logps=old_logps,
                advantages=batch.advantages,
                sequence_ids=batch.sequence_ids,
                num_sequences=batch.num_sequences,
                token_weights=batch.token_weights,
                rollout_logps=batch.rollout_logps,
                ref_logps=micro.ref_logps,
                limit=limit,
            )
        )
        self.parallel.backward(outputs.loss)
        if not micro.filler:
            traces.append(trace(micro.batch, logps.detach(), old_logps, entropy, outputs))
        return outputs.loss.detach()

    def _sum(self, value: Tensor) -> Tensor:
        reduced = self.accelerator.reduce(value.to(self.accelerator.device), "sum")
        assert isinstance(reduced, Tensor)
        return reduced

    def _joined(self, values: Tensor) -> Tensor:
        gathered = self.accelerator.gather(values)
        assert isinstance(gathered, Tensor)
        return gathered


def divergence(step: int, stats: Mapping[str, float], settings: TrainerConfig) -> str | None:
    """Return what to say where the step's loss or gradient is not finite, and what to change; else None."""
    for name, value in (("loss", stats["policy/loss"]), ("gradient norm", stats["policy/grad_norm"])):
        if not math.isfinite(value):
            return (
                f"step {step}: the {name} is {value}; it is not saved, and checkpoints before it are untouched\n"
                f"  lower trainer.learning_rate (is {settings.learning_rate:g}) or trainer.max_grad_norm "
                f"(is {settings.max_grad_norm:g}), or raise trainer.warmup_updates (is {settings.warmup_updates})"
            )
    return None


def _logps(model: Reference, micros: Sequence[_MicroBatch], temperature: float) -> Iterator[Tensor]:
    """Yield the log-probabilities of each micro-batch, from passes over several of them at once."""
    for start in range(0, len(micros), _AT_ONCE):
        batches = [micro.batch for micro in micros[start : start + _AT_ONCE]]
        logps, _ = model(join(batches), temperature)
        yield from logps.split([len(batch.targets) for batch in batches])


@torch.no_grad()
def _moved(model: Reference, part: Sequence[_MicroBatch], temperature: float, level: str) -> tuple[Tensor, Tensor]:
    """Return log r, at that level, and advantage of each token of a rank's mini-batch; of fillers it has none.

    Where the first pass with gradients gives the old log-probabilities, log r is 0 and no pass is needed.
    """
    fresh = part[0].old_logps is None  # then on all ranks
    passed = (torch.zeros_like(micro.batch.advantages) for micro in part)
    found = [part[0].batch.advantages.new_empty(2, 0)]
    for micro, logps in zip(part, passed if fresh else _logps(model, part, temperature), strict=True):
        if micro.filler:
            continue
        batch, old_logps = micro.batch, logps if micro.old_logps is None else micro.old_logps
        moved = log_ratio(logps, old_logps, batch.sequence_ids, batch.num_sequences, level)
        found.append(torch.stack([moved, batch.advantages]))
    log_ratios, advantages = torch.cat(found, dim=1)
    return log_ratios, advantages


def _kept(groups: Sequence[Group], masked: bool, first: int, rank: int) -> list[list[tuple[Place, Sample]]]:
    """Return the samples that have something to train on, each with its place; `first` is the first group's number."""
    return [
        [
            (Place(rank, number, place), one)
            for place, one in enumerate(group.samples)
            if one.num_trained and not (masked and one.stop is Stop.LENGTH)
        ]
        for number, group in enumerate(groups, start=first)
    ]


def _imbalance(loads: Sequence[Sequence[int]], ranks: int) -> dict[str, float]:
    """Return the busiest rank's tokens over the mean, summed over the mini-batches (each waits for its busiest)."""
    total = sum(map(sum, loads))
    return {"perf/rank_imbalance": sum(map(max, loads)) * ranks / total} if ranks > 1 and total else {}


def _item(sample: Sample, weight: float, place: Place) -> Item:
    first, *others = sample.rows
    return Item([first, *(row for row in others if row.trained_until)], sample.advantage, weight, place)
