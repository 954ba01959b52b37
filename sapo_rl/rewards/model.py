"""Rewards by a model that scores replies: one for sequence classification, run by transformers in the worker."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

from sapo_rl.errors import UserError, described
from sapo_rl.errors.files import is_folder
from sapo_rl.processes import is_dry_run
from sapo_rl.rewards.registry import PREPARATIONS, REWARD_FUNCTIONS, Completion

if TYPE_CHECKING:
    import torch

_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")


@REWARD_FUNCTIONS.register_module("reward_model")
def reward_model(
    completions: list[Completion],
    prompts: list[Any],
    *,
    path: str,
    label: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    batch_size: int = 8,
    max_tokens: int = 2048,
    **columns: list[Any],
) -> list[float | None]:
    """What a reward model says of prompt and reply together: one logit, as it is.

    A chat is rendered by the model's own chat template; a text prompt with its reply is a chat of two messages, or,
    where the model has no template, one text. Of what is too long the beginning is left out.

    Args:
        completions: the replies.
        prompts: what was asked.
        path: the model, a folder or a name on the Hugging Face Hub.
        label: which of the model's logits.
        device: `cpu`, or a GPU such as `cuda:1`. One that trains has to leave memory for it.
        dtype: of its weights: float32, bfloat16 or float16.
        batch_size: replies scored at once.
        max_tokens: the most of prompt and reply together.
        columns: of the data.

    Raises:
        UserError: settings that cannot be, or a model that cannot be loaded or has no such label.
    """
    if label < 0 or batch_size < 1 or max_tokens < 1:
        given = f"{label}, {batch_size} and {max_tokens}"
        raise UserError(f"reward_model: needs label >= 0, batch_size >= 1 and max_tokens >= 1, got {given}")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"reward_model: dtype is '{dtype}'; valid: float32, bfloat16, float16")
    if not completions:
        return []
    scorer = _Scorer.load(path, label, device, dtype)
    texts = [scorer.text_of(*pair) for pair in zip(prompts, completions, strict=True)]
    return [*scorer.scores(texts, batch_size, max_tokens)]


class _Scorer:
    """A model with its tokenizer."""

    def __init__(self, path: str, label: int, device: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
            model = AutoModelForSequenceClassification.from_pretrained(path, dtype=getattr(torch, dtype))
            self._model: Any = model.eval().requires_grad_(False).to(device)
        except Exception as error:  # whatever a folder, or a device, makes the library raise
            raise UserError(f"reward_model: cannot load '{path}': {described(error)}") from error
        if label >= self._model.config.num_labels:
            raise UserError(
                f"reward_model: label is {label}, but '{path}' has {self._model.config.num_labels} label(s)"
            )
        self._label = label
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if self._model.config.pad_token_id is None:  # by which it finds the end of what it reads
            self._model.config.pad_token_id = self._tokenizer.pad_token_id
        self._tokenizer.truncation_side = "left"

    @staticmethod
    @cache
    def load(path: str, label: int, device: str, dtype: str) -> _Scorer:
        """Return the model, loaded once in a process."""
        return _Scorer(path, label, device, dtype)

    def text_of(self, prompt: Any, completion: Completion) -> str:
        """Return what the model reads."""
        if self._tokenizer.chat_template is None:
            said = [*_contents(prompt), *_contents(completion)]
            return "".join(said) if isinstance(prompt, str) else "\n".join(said)
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        replied = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        return self._tokenizer.apply_chat_template([*asked, *replied], tokenize=False)

    def scores(self, texts: list[str], batch_size: int, max_tokens: int) -> list[float]:
        """Return the logit of each text; those of like length are scored together."""
        import torch

        special = self._tokenizer.chat_template is None  # a template writes the special tokens itself
        found = [0.0] * len(texts)
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            inputs = self._tokenizer(
                [texts[place] for place in places],
                add_special_tokens=special,
                padding=True,
                truncation=True,
                max_length=max_tokens,
                return_tensors="pt",
            )
            with torch.inference_mode():
                logits: torch.Tensor = self._model(**inputs.to(self._model.device)).logits  # (B, labels)
            for place, value in zip(places, logits[:, self._label].tolist(), strict=True):
                found[place] = value
        return found


def _contents(said: str | list[dict[str, str]]) -> list[str]:
    return [said] if isinstance(said, str) else [str(one["content"]) for one in said]


def _prepare(path: str, label: int = 0, device: str = "cpu", dtype: str = "float32", **rest: Any) -> None:
    if is_dry_run() and _ON_THE_HUB.fullmatch(path) and not is_folder(path):
        return
    _Scorer.load(path, label, device, dtype)


PREPARATIONS["reward_model"] = _prepare
