"""The section on prompts: where they come from, how they are worded, and how often they are solved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from sapo_rl.config.fields import MISSING, MOST_SAMPLES, choice, number

UNIFORM, BY_PASS_RATE = "uniform", "pass_rate"
"""How prompts are drawn."""


@dataclass
class PassRateConfig:
    """A prompt's pass rate: the share of its samples that are solved; docs/sampling.md."""

    reward: Optional[str] = None
    """Name of the reward that says whether a sample is solved, or `name/key` for another number that a function
    returns; null takes that of `eval/reward`."""
    solved_at: float = 1.0
    """A sample is solved where that reward is at least this."""
    target: float = number(0.5, least=0.01, most=0.99)
    """With `data.sampling=pass_rate`: the rate at which a prompt is drawn most often; at 0 and 1 it is drawn least."""
    floor: float = number(0.05, least=0.001, most=1)
    """Every prompt is drawn at least this often, relative to the most that one can be: so none is forgotten."""
    low: Optional[float] = number(None, least=0, most=1)
    """Prompts whose rate is at most this are drawn as often as `floor` says, in either sampling; 0 takes those that are
    never solved, null none."""
    high: Optional[float] = number(None, least=0, most=1)
    """The same for a rate that is at least this; 1 takes those that are always solved, null none."""
    min_samples: int = number(16, least=1)
    """Samples of a prompt after which `low` and `high` hold for it."""
    path: Optional[str] = None
    """File of pass rates to begin with, or the folder of the check or run that wrote it."""


@dataclass
class DataCheckConfig:
    """What `check=data` measures, and `check=rewards` scores."""

    prompts: Optional[int] = number(None, least=1)
    """Prompts that are measured, the first of the data; null measures all."""
    samples: Optional[int] = number(None, least=1, most=MOST_SAMPLES)
    """Completions of each; null takes `rollout.group_size`."""
    completions: Optional[str] = None
    """JSONL or Parquet file with the columns of the data and a column `completion`, or `completion` and
    `prompt_index`, as in a run's `completions/`."""


@dataclass
class DataConfig:
    """Where prompts come from and how they are worded.

    Example:
        >>> DataConfig(source="file", path="questions.jsonl", prompt_column="question").answer_column
        'answer'
    """

    source: str = choice(MISSING, "arithmetic", "reasoning_gym", "huggingface", "file", own="data source")
    """`arithmetic` and `reasoning_gym` generate prompts; `huggingface` and `file` (JSONL, Parquet) read them. Or the
    dotted path of your own `f(**args)` that returns rows, `f(split, **args)` where it knows splits."""
    path: Optional[str] = None
    """Dataset on the hub (`huggingface`), file (`file`), or dataset of the package reasoning-gym (`reasoning_gym`)."""
    subset: Optional[str] = None
    """Configuration of a hub dataset, e.g. `main` of gsm8k."""
    split: str = "train"
    """Split to train on, of a hub dataset or of a source of your own that knows splits."""
    eval_path: Optional[str] = None
    """File with held-out prompts, where `source` is `file`."""
    eval_split: Optional[str] = None
    """Split to evaluate on. With neither this nor `eval_path`, `eval.prompts` rows are held out."""
    prompt_column: str = "prompt"
    """Column with the prompt: text, or chat messages."""
    answer_column: Optional[str] = "answer"
    """Column that reward functions see as `answer`; null where there is none."""
    template: str = "{prompt}"
    """Wording put around a text prompt: `{prompt}`, or any other column in braces."""
    response_prefix: str = ""
    """What every reply begins with, e.g. `<think>`; columns in braces. Rewards see what the model wrote after it."""
    system_prompt: Optional[str] = None
    """System message put before the prompt; needs the chat template."""
    chat_template: bool = True
    """Apply the tokenizer's chat template. Text prompts become one user message."""
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template, e.g. `enable_thinking: false`."""
    size: int = number(4096, least=1)
    """Prompts to generate, for the generators."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the generator, e.g. `digits: 2` for arithmetic, or of a source of your own."""
    max_prompt_tokens: int = number(512, least=1)
    """Longer prompts are dropped and counted, never cut."""
    shuffle: bool = True
    """Draw prompts in a new seeded order every epoch."""
    sampling: str = choice(UNIFORM, UNIFORM, BY_PASS_RATE)
    """Every prompt once an epoch (`uniform`), or those whose pass rate is close to `data.pass_rate.target` more often
    than others (`pass_rate`)."""
    split_seed: int = number(0, least=0)
    """Chooses the held-out rows and what generators make: with another `seed` alone, runs are evaluated on the same."""
    pass_rate: PassRateConfig = field(default_factory=PassRateConfig)
    check: DataCheckConfig = field(default_factory=DataCheckConfig)
