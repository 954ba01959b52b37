"""A tiny random language model and its tokenizer, made on the spot: no download, and vLLM on the CPU loads it."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

    from sapo_rl.engines.base import Completion, EngineSettings, Request, Sampling

EXTENDING = Path(__file__).parents[1] / "docs/extending.md"
PLAIN = "rollout.engine.name=my_engine.PlainEngine"
"""Has the engine of docs/extending.md write in a run: vLLM takes 15 seconds of a processor to start."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
REWARDS = '''
def odd(completions, prompts, **columns):
    """The share of characters with an odd code: a random model gives every value."""
    assert len(prompts) == len(completions) == len(columns["answer"])
    return [sum(ord(c) % 2 for c in text) / max(1, len(text)) for text in completions]
'''


def make_stand_in(folder: Path, **facts: Any) -> Path:
    """Write what passes for a model as long as nobody loads it: a config with these facts, and a file of weights."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100} | facts
    (folder / "config.json").write_text(json.dumps(shape))
    save_file({"weight": np.zeros(3)}, folder / "model.safetensors")
    return folder


def make_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Write a random Llama (2 layers, hidden size 64, 2 heads of 32) and its tokenizer into `folder`; return `folder`.

    One token a printable character; `<|im_end|>` ends a sequence. The weights are wide enough that different prompts
    give visibly different distributions, and depend on `seed` alone.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|im_start|>"),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_llama(vocabulary: int, seed: int = 0, **shape: Any) -> LlamaForCausalLM:
    """A random Llama of two layers with the trainer's attention; `shape` replaces settings of its config."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sapo_rl.policy import attention

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": vocabulary,
        "attn_implementation": attention.NAME,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | shape)))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer with a chat template: printable ASCII and some two hundred other characters, one token each."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [*string.printable, *(chr(code) for code in range(0xA1, 0x180))]
    vocab = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_workspace(folder: Path, model_folder: Path, rewards: str = "", **sections: Any) -> Path:
    """Write a folder as a user has it, a recipe and modules with reward functions and an engine; return it.

    The recipe, `tiny.yaml`, trains the model on the CPU; `sections` change keys of its sections, or add some. `rewards`
    is Python to follow `REWARDS` in `my_rewards.py`.
    """
    import yaml

    config: dict[str, Any] = {
        "model": {"path": str(model_folder), "dtype": "float32"},
        "data": {"source": "arithmetic", "size": 100, "max_prompt_tokens": 64},
        "rollout": {
            "batch_size": 16,
            "group_size": 4,
            "max_completion_tokens": 8,
            "max_num_seqs": 32,
            "cpu_kv_cache_gb": 0.1,
        },
        "reward": {"functions": {"odd": {"function": "my_rewards.odd"}}},
        "trainer": {"steps": 6, "updates_per_rollout": 2, "mini_batches": 1, "learning_rate": 1e-3},
        "logging": {"console": "plain"},
        "reproducible": True,
    }
    for name, section in sections.items():
        config[name] = config.get(name, {}) | section
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    (folder / "my_rewards.py").write_text(REWARDS + rewards)
    engine = EXTENDING.read_text(encoding="utf-8").partition("# my_engine.py\n")[2].partition("```")[0]
    (folder / "my_engine.py").write_text(engine)
    return folder


def logps_of(model: PreTrainedModel, token_ids: list[int], temperature: float = 1.0) -> list[float]:
    """Log p(token | those before it) at `temperature` of all tokens but the first, by plain transformers."""
    import torch

    ids = torch.tensor(token_ids)
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1] / temperature
    return logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0].tolist()


def generate(engine: Any, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
    """Have an engine complete all requests at once, however often it has to be started anew; in their order."""
    from sapo_rl.rollout.dispatch import Dispatcher

    answers = Dispatcher([engine], window=10**6, lost_timeout=60.0).submit_all(requests, sampling)
    return [answer.result().completions for answer in answers]


def engine_settings(model: Path, log_path: Path, **changes: Any) -> EngineSettings:
    """Settings of an engine on the CPU that fits a tiny model; `changes` replace single fields."""
    from sapo_rl.engines.base import EngineSettings

    settings: dict[str, Any] = {
        "model": str(model),
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 64,
        "gpu_memory_utilization": 0.3,
        "cpu_kv_cache_gb": 0.1,
        "enforce_eager": True,
        "stop_token_ids": [SPECIAL.index("<|im_end|>")],
        "seed": 0,
        "device": "cpu",
        "trust_remote_code": False,
        "revision": None,
        "start_timeout": 300.0,
        "timeout": 120.0,
        "max_restarts": 2,
        "log_path": log_path,
    }
    return EngineSettings(**(settings | changes))
