"""What a converted model is held to; the conversion itself takes a download."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny import make_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import fetch_model


def test_a_model_whose_replies_would_not_end_is_refused() -> None:
    tokenizer = make_tokenizer()
    fetch_model.check_end(tokenizer, tokenizer.eos_token_id)
    with pytest.raises(SystemExit, match="the generation config by token 2"):
        fetch_model.check_end(tokenizer, tokenizer.convert_tokens_to_ids("<|im_start|>"))
    tokenizer.eos_token = "<|im_start|>"
    with pytest.raises(SystemExit, match=r"ends a reply by '<\|im_end\|>', the tokenizer by '<\|im_start\|>'"):
        fetch_model.check_end(tokenizer, tokenizer.eos_token_id)
