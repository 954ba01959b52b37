"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, converted from one GGUF file; a process of its own.

    python -m sapo_rl.policy.smollm2 FILE.gguf FOLDER

What the conversion could lose is checked: the end of a turn, and a reply to a question.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sapo_rl.errors import UserError
from sapo_rl.processes import begin, imports_are_done

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START, END = "<|im_start|>", "<|im_end|>"
"""Special tokens that begin and end a turn of the chat; the end is the padding, too."""


def convert(gguf: Path, out: Path) -> None:
    """Write the model as bfloat16 safetensors, with its tokenizer and generation config, to the new folder `out`."""
    import torch
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    imports_are_done()

    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A GGUF file only names its pre-tokenizer ("smollm"), and the reader takes GPT-2's, which does not split digits.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # Nor do all versions of the reader find the same decoder and special tokens in it.
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = START, END, END
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = model.config.max_position_embeddings
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _read_once() -> None:
    """Keep what transformers would read of the file three times, and make of it once for each of its weights."""
    import gguf

    for name in ("GGUFReader", "get_tensor_name_map"):
        setattr(gguf, name, functools.cache(getattr(gguf, name)))


def check_end(tokenizer: PreTrainedTokenizerBase, ends: object) -> None:
    """Compare the token that ends a sequence with the one that ends a turn in the chat template.

    Raises:
        UserError: they differ, or `ends`, the generation config's, is not the tokenizer's: replies would not end.
    """
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "the reply"}]
    rendered = str(tokenizer.apply_chat_template(turn, tokenize=False))
    after = rendered.rpartition("the reply")[2].strip()
    if after != tokenizer.eos_token or ends != tokenizer.eos_token_id:
        raise UserError(
            f"the chat template ends a reply by {after!r}, the tokenizer by {tokenizer.eos_token!r} "
            f"(token {tokenizer.eos_token_id}), the generation config by token {ends}; please report this"
        )


def verify(folder: Path) -> None:
    """Load the folder as any user would, and ask it one question.

    Raises:
        UserError: something was lost in the conversion: the reply to "What is 2 + 2?" has no 4 in it or never ends, or
            `check_end` raises it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    check_end(tokenizer, model.generation_config.eos_token_id)
    question = [{"role": "user", "content": "What is 2 + 2?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=64, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    reply = tokenizer.decode(tokens, skip_special_tokens=True)
    if "4" not in reply or tokens[-1] != tokenizer.eos_token_id:
        raise UserError(f"the converted model does not answer 2 + 2: {reply!r}; please report this")


def main(gguf: Path, out: Path) -> None:
    """Convert and verify; exit with 2 and a line on stderr where something was lost."""
    # All of it is local: no look-up on the hub, no telemetry.
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")
    os.environ.update(TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error")
    _read_once()
    convert(gguf, out)
    try:
        verify(out)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    begin()
    main(*map(Path, sys.argv[1:]))
