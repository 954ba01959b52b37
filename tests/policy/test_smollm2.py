"""What a converted model is held to; the conversion itself is in tests/test_packaging.py."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from tiny import make_tokenizer

from sapo_rl.errors import UserError
from sapo_rl.policy.smollm2 import check_end, convert


def test_a_model_whose_replies_would_not_end_is_refused() -> None:
    tokenizer = make_tokenizer()
    check_end(tokenizer, tokenizer.eos_token_id)
    with pytest.raises(UserError, match="the generation config by token 2"):
        check_end(tokenizer, tokenizer.convert_tokens_to_ids("<|im_start|>"))
    tokenizer.eos_token = "<|im_start|>"
    with pytest.raises(UserError, match=r"ends a reply by '<\|im_end\|>', the tokenizer by '<\|im_start\|>'"):
        check_end(tokenizer, tokenizer.eos_token_id)


def test_a_conversion_collects_the_garbage_of_the_models_that_it_loads(tmp_path: Path) -> None:
    gc.disable()  # as it is while libraries are imported
    try:
        with pytest.raises(OSError):
            convert(tmp_path / "absent.gguf", tmp_path / "out")
        assert gc.isenabled()
    finally:
        gc.enable()
