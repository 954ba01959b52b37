"""What the benches run: prompts, random models of real shapes, and a reward that both programs can import."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / ".cache/models/SmolLM2-135M-Instruct"
"""The model of workload A, and everybody's tokenizer; `sapo-train config=quickstart` makes it at its first use."""


@dataclass(frozen=True)
class Workload:
    """One rollout batch and the updates on it."""

    prompts: int
    """Prompts in a batch."""
    group_size: int
    """Completions of each."""
    max_completion_tokens: int
    max_prompt_tokens: int
    updates: int
    """Optimiser updates on each batch, every sample in one of them."""
    peer_batches: tuple[int, ...]
    """TRL's `per_device_train_batch_size`: the first that fits into memory is taken."""
    shape: str | None = None
    """Random model to run, unless the command line names another; None is `MODEL`."""
    learning_rate: float = 1e-6
    word_problems: bool = False
    """Whether the prompts are reasoning-gym's word problems, which needs the extra `gym`, instead of `chat_rows`."""

    @property
    def samples(self) -> int:
        """Completions in a batch."""
        return self.prompts * self.group_size


STILL = 1e-12
"""A learning rate that leaves a random model as it is: updates would move the lengths of its completions."""
WORKLOADS = {
    "a": Workload(128, 8, 512, 128, 4, (128, 64, 32, 16)),
    "b": Workload(32, 8, 2048, 128, 4, (16, 8, 4, 2), "0.5b", STILL),
    "c": Workload(128, 8, 512, 256, 4, (32, 16, 8), word_problems=True),
    "7b": Workload(32, 8, 1024, 128, 4, (), "7b", STILL),
    "tiny": Workload(4, 4, 16, 256, 2, (8,)),
}


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Qwen2 with a head that is tied to the embedding."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int = 151936

    def config(self, **more: Any) -> Any:
        """Return the Hugging Face configuration."""
        from transformers import Qwen2Config

        return Qwen2Config(
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            tie_word_embeddings=True,
            **more,
        )


SHAPES = {
    "0.5b": Shape(896, 4864, 24, 14, 2),
    "1.5b": Shape(1536, 8960, 28, 12, 2),
    "7b": Shape(3584, 18944, 28, 28, 4),
    "tiny": Shape(64, 128, 2, 2, 1, 512),
}

QUESTIONS = (
    "What is {}?",
    "Explain {} to a child in two sentences.",
    "Give me three facts about {}.",
    "Write a short story about {}.",
    "Why do people care about {}?",
    "Write an email to a friend about {}.",
    "List five words that go with {}.",
    "What should a beginner know about {}?",
    "Write a poem of four lines about {}.",
    "Compare {} with something similar.",
    "Give a step-by-step introduction to {}.",
    "Name one common mistake about {} and correct it.",
)
TOPICS = (
    "bees", "bread", "bridges", "calendars", "camels", "candles", "castles", "chess", "clouds", "coffee", "comets",
    "compasses", "copper", "coral reefs", "cotton", "crows", "deserts", "dreams", "drums", "earthquakes", "echoes",
    "elections", "elevators", "fables", "ferries", "fireflies", "fog", "forests", "friendship", "frogs", "gardens",
    "glaciers", "glass", "gravity", "honesty", "horses", "hot springs", "icebergs", "ink", "islands", "juggling",
    "kites", "ladders", "languages", "lighthouses", "magnets", "maps", "markets", "memory", "mirrors", "money",
    "mountains", "museums", "mushrooms", "music", "night trains", "oceans", "octopuses", "olives", "origami", "owls",
    "paper", "pianos", "planets", "postcards", "prime numbers", "puppets", "rainbows", "rivers", "robots", "rust",
    "sailing", "salt", "seeds", "shadows", "silence", "sleep", "snow", "tides", "time zones", "turtles", "volcanoes",
    "windmills", "winter",
)  # fmt: skip


def chat_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return `count` rows with a one-message chat under `prompt`; they repeat after about a thousand."""
    texts = [question.format(topic) for question in QUESTIONS for topic in TOPICS]
    random.Random(seed).shuffle(texts)
    return [{"prompt": [{"role": "user", "content": texts[i % len(texts)]}]} for i in range(count)]


def problem_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return `count` word problems, each a one-message chat under `prompt`."""
    from sapo_rl.data.gym import generate

    questions = [row["question"] for row in generate("gsm_symbolic", {}, count, seed)]
    return [{"prompt": [{"role": "user", "content": question}]} for question in questions]


def vowel_share(completions: list[Any], **columns: list[Any]) -> list[float]:
    """Reward: the share of vowels in each reply. Nearly no group is all equal, so that every sample is trained on."""
    texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
    return [sum(text.count(vowel) for vowel in "aeiou") / max(1, len(text)) for text in texts]


def make_model(shape: Shape, tokenizer_folder: Path, mean_length: float, out: Path) -> Path:
    """Write a random model whose completions have geometric lengths of `mean_length` tokens on average.

    Sampled at temperature 1 it ends a completion at each token with probability 1 / `mean_length`, and emits no token
    that the tokenizer does not know: any program that samples from it gets the same long-tailed lengths.

    One hidden dimension does it. No layer writes to it, so that what the embedding puts there is the same after every
    layer, and in the tied head it is a constant that each token's row multiplies by its own factor.
    """
    import torch
    from transformers import AutoTokenizer, GenerationConfig, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = shape.config(
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[:, 0] = 1.0
        rows[len(tokenizer) :, 0] = -50.0
        rows[tokenizer.eos_token_id] = 0.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        rows[tokenizer.eos_token_id, 0] = eos_factor(model, len(tokenizer), tokenizer.eos_token_id, 1 / mean_length)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    del model, rows
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the programs to be measured need it
    return out


def eos_factor(model: Any, known: int, eos: int, probability: float) -> float:
    """Return the factor of the constant dimension in the end token's row that gives it this mean `probability`.

    Measured on random tokens below `known`, by bisection; the row's other entries must be 0.
    """
    import torch

    with torch.no_grad():
        tokens = torch.randint(known, (2, 256), generator=torch.Generator().manual_seed(1))
        hidden = model.model(input_ids=tokens.to(model.device)).last_hidden_state.flatten(0, 1)  # (512, hidden)
        logits = model.lm_head(hidden).float()
        logits[:, eos] = float("-inf")
        others, constant = logits.logsumexp(-1), hidden[:, 0].float()
        low, high = 0.0, 1000.0
        for _ in range(60):
            middle = (low + high) / 2
            mean = torch.sigmoid(middle * constant - others).mean().item()
            low, high = (middle, high) if mean < probability else (low, middle)
    return low
