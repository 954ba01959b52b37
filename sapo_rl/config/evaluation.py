"""The schema of evaluations; docs/evaluation.md."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Optional

from sapo_rl.config.data import DataConfig
from sapo_rl.config.fields import MOST_SAMPLES, choice, number
from sapo_rl.config.reward import RewardFunctionConfig


@dataclass
class EvalDataConfig:
    """Where the prompts of a set come from, and how they are worded; the chat template is as in `data`."""

    source: Optional[str] = choice(None, "arithmetic", "reasoning_gym", "huggingface", "file", own="data source")
    """As `data.source`; null takes `file` where `path` ends in .jsonl or .parquet, else `huggingface`."""
    path: Optional[str] = None
    """As `data.path`; a source of your own gets it where it has a parameter `path`."""
    subset: Optional[str] = None
    """Configuration of a hub dataset."""
    split: str = "test"
    """Split of a hub dataset, or of a source of your own that knows splits."""
    prompt_column: str = "prompt"
    """Column with the prompt: text, or chat messages."""
    answer_column: Optional[str] = "answer"
    """Column that reward functions see as `answer`; null where there is none."""
    template: str = "{prompt}"
    """Wording put around a text prompt: `{prompt}`, or any other column in braces."""
    system_prompt: Optional[str] = None
    """System message put before the prompt; null takes `data.system_prompt`, an empty text is none."""
    response_prefix: Optional[str] = None
    """What every reply begins with; null takes `data.response_prefix`."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of a generator, or of a source of your own."""
    max_prompt_tokens: Optional[int] = number(None, least=1)
    """Longer prompts are left out and counted; null takes `data.max_prompt_tokens`."""

    def beside(self, data: DataConfig) -> DataConfig:
        """Return the whole data section of the set; what it has no keys for is as in `data`, that of the training."""
        source = self.source or ("file" if (self.path or "").endswith((".jsonl", ".parquet")) else "huggingface")
        own = "." in source and self.path is not None
        return replace(
            data,
            source=source,
            path=self.path,
            subset=self.subset,
            split=self.split,
            eval_path=None,
            eval_split=None,
            prompt_column=self.prompt_column,
            answer_column=self.answer_column,
            template=self.template,
            system_prompt=data.system_prompt if self.system_prompt is None else self.system_prompt or None,
            response_prefix=data.response_prefix if self.response_prefix is None else self.response_prefix,
            args={"path": self.path, **self.args} if own else self.args,
            max_prompt_tokens=self.max_prompt_tokens or data.max_prompt_tokens,
        )


@dataclass
class EvalSampling:
    """How the prompts of a set are answered, and what counts."""

    greedy: bool = True
    """Measure the likeliest completion of each prompt; `rollout.repetition_penalty` applies to it too."""
    samples: int = number(0, least=0, most=MOST_SAMPLES)
    """Also sample so many completions of each prompt: their mean reward `avg@k`, `pass@k`, and `maj@k` where replies
    can be compared."""
    temperature: Optional[float] = number(None, least=0.01, most=2)
    """Of the samples; null takes `rollout.temperature`."""
    top_p: Optional[float] = number(None, least=1e-6, most=1)
    """Of the samples; null takes `rollout.top_p`."""
    top_k: Optional[int] = number(None, least=0)
    """Of the samples; null takes `rollout.top_k`."""
    max_completion_tokens: Optional[int] = number(None, least=1)
    """A completion is cut there; null takes `rollout.max_completion_tokens`."""
    reward: Optional[str] = None
    """Name of the reward function whose mean is told, or `name/key` for another number that it returns; null takes
    the first."""
    solved_at: Optional[float] = None
    """A sample passes where that reward is at least this; null takes `data.pass_rate.solved_at`."""


@dataclass
class EvalSetConfig(EvalSampling):
    """A set of held-out prompts; with the name of one that is shipped, what is not given here is as there.

    Example:
        >>> EvalSetConfig(data=EvalDataConfig(path="questions.jsonl"), samples=4).greedy
        True
    """

    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    prompts: Optional[int] = number(None, least=1)
    """How many, chosen by `data.split_seed`; null takes all, which generators need a number for."""
    functions: dict[str, RewardFunctionConfig] = field(default_factory=dict)
    """Reward functions of this set alone; without any those of `reward.functions` judge."""


@dataclass
class EvalConfig(EvalSampling):
    """Measurement on held-out prompts: those of the training's data, and further sets.

    Example:
        >>> EvalConfig(every=20, prompts=256, samples=8).samples
        8
    """

    every: int = number(10, least=0)
    """Steps between two evaluations; 0 evaluates before the first step and at the end only."""
    prompts: int = number(64, least=0)
    """Held-out prompts of the training's data; 0 evaluates on `sets` alone, or never."""
    sets: dict[str, EvalSetConfig] = field(default_factory=dict)
    """Further sets by name: shipped ones (gsm8k, math500, aime2025, humaneval, mbpp, reasoning_gym/TASK) or your own.
    `[gsm8k, math500]` takes them as they are; docs/evaluation.md."""
