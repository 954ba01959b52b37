"""What a run saves of its policy: checkpoints while it goes on, and the trained model at its end."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from sapo_rl import run_folder
from sapo_rl.config import CheckpointConfig
from sapo_rl.errors import SharedError, did_you_mean
from sapo_rl.policy import checkpoint
from sapo_rl.policy.trainer import PolicyTrainer


class Checkpointer:
    """Saves into one run folder; every rank calls it.

    Args:
        folder: the run folder.
        trainer: its weights and optimiser are saved.
        tokenizer: goes with the trained model.
        config: how often, and which ones stay.
        state: of the checkpoint that is resumed.
        card: returns the trained model's card, by the step of its weights.
    """

    def __init__(
        self,
        folder: Path,
        trainer: PolicyTrainer,
        tokenizer: PreTrainedTokenizerBase,
        config: CheckpointConfig,
        state: Mapping[str, Any] | None = None,
        card: Callable[[int], str] | None = None,
    ) -> None:
        self._card = card
        self._folder, self._trainer, self._tokenizer, self._config = folder, trainer, tokenizer, config
        self._saved = 0
        self._best: dict[str, Any] | None = None
        best = (state or {}).get("best")
        if best and best["metric"] == config.keep_best:
            kept = (folder / run_folder.CHECKPOINTS / checkpoint.PATTERN.format(best["step"])).is_dir()
            self._best = best if kept else None  # a fork has one checkpoint alone
        self._measured = self._best is not None
        """Whether an evaluation has had the number that `checkpoint.keep_best` names."""

    def is_best(self, step: int, numbers: Mapping[str, float]) -> bool:
        """Return whether an evaluation after a step is the best so far, so that its checkpoint is to be saved and kept.

        It is compared by `checkpoint.keep_best`; of equal ones the first is the best. Before training nothing is.

        Raises:
            SharedError: no evaluation has had that number, nor has this one.
        """
        metric = self._config.keep_best
        if metric is None:
            return False
        self._measured |= metric in numbers
        if not self._measured:
            raise SharedError(f"checkpoint.keep_best: no evaluation has '{metric}'; {did_you_mean(metric, numbers)}")
        value = float(numbers.get(metric, math.nan))
        if not step or not math.isfinite(value) or (self._best is not None and value <= self._best["value"]):
            return False
        self._best = {"metric": metric, "step": step, "value": value}
        return True

    def save(self, step: int, state: dict[str, Any], own: Mapping[str, NDArray[Any]]) -> None:
        """Write a checkpoint from which `resume=` continues as if nothing had happened; as `checkpoint.save`."""
        folder = self._folder / run_folder.CHECKPOINTS
        best = None if self._best is None else self._best["step"]
        checkpoint.save(folder, step, self._trainer, state | {"best": self._best}, self._config.keep_last, own, best)
        self._saved = step

    def finish(self, step: int, state: dict[str, Any], own: Mapping[str, NDArray[Any]], complete: bool) -> None:
        """Leave the trained model, or, where the run was stopped before its end, the checkpoint to resume from."""
        if self._config.every and step % self._config.every and step != self._saved:
            self.save(step, state, own)
        if complete and self._config.save_final:
            self._export(self._folder / run_folder.FINAL, step, self._trainer.accelerator.is_main_process)

    def _export(self, folder: Path, step: int, is_main: bool) -> None:
        """Write the model as a Hugging Face folder, whole or not at all; one from before a resume is replaced."""
        partial = folder.with_name(f".{folder.name}.partial")
        try:
            self._trainer.policy.export(partial, is_main)
            if is_main:
                self._tokenizer.save_pretrained(partial)
                if self._card:
                    (partial / "README.md").write_text(self._card(step), encoding="utf-8")
                run_folder.open_up(partial)
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
        finally:
            if is_main:
                shutil.rmtree(partial, ignore_errors=True)  # of what a full disk has stopped
