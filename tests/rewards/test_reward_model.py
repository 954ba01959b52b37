"""A reward model, made on the spot, against transformers by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rewards.groups import group, rewards
from tiny import CHAT_TEMPLATE, make_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from sapo_rl.config import RewardConfig, RewardFunctionConfig
from sapo_rl.errors import UserError
from sapo_rl.rewards import RewardPool, check_function, reward_model

pytestmark = pytest.mark.usefixtures("forked_workers")
REPLIES = ["2", "It is 2.", "It may be 3, or 4.", "no", "1 + 1 = 2"]


def make_model(folder: Path, template: str | None) -> Path:
    """A random Llama with two labels."""
    torch.manual_seed(3)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        pad_token_id=None,
    )
    config.num_labels = 2
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("chatting"), CHAT_TEMPLATE)


def logit(folder: Path, text: str, label: int) -> float:
    """Of one text alone, without padding."""
    tokenizer, model = (one.from_pretrained(folder) for one in (AutoTokenizer, AutoModelForSequenceClassification))
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return model(ids).logits[0, label].item()


@pytest.mark.parametrize("label", [0, 1])
def test_batches_score_what_each_reply_scores_alone(chatting: Path, label: int) -> None:
    chats = [f"<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n{reply}<|im_end|>\n" for reply in REPLIES]
    expected = [logit(chatting, text, label) for text in chats]
    assert len({round(one, 3) for one in expected}) == len(REPLIES)
    settings: dict[str, Any] = {"path": str(chatting), "label": label, "batch_size": 3}
    assert reward_model([*REPLIES], ["1 + 1?"] * 5, **settings) == pytest.approx(expected, abs=1e-4)
    asked = [{"role": "user", "content": "1 + 1?"}]
    replied = [[{"role": "assistant", "content": reply}] for reply in REPLIES]
    assert reward_model([*replied], [asked] * 5, **settings) == pytest.approx(expected, abs=1e-4)


def test_a_model_without_a_template_reads_prompt_and_reply_as_one_text(tmp_path: Path) -> None:
    folder = make_model(tmp_path, None)
    expected = [logit(folder, "1 + 1 = 2", 0), logit(folder, "1 + 1 = 34", 0)]
    found = reward_model(["2", "34"], ["1 + 1 = "] * 2, path=str(folder))
    assert found == pytest.approx(expected, abs=1e-4)
    cut = reward_model(["34"], ["1 + 1 = "], path=str(folder), max_tokens=4)
    assert cut == pytest.approx([logit(folder, "= 34", 0)], abs=1e-4)


def test_a_pool_loads_it_before_the_first_call(chatting: Path, tmp_path: Path) -> None:
    function = RewardFunctionConfig("reward_model", args={"path": str(chatting)})
    with RewardPool(RewardConfig(functions={"liked": function}), tmp_path / "log") as pool:
        (found,) = rewards(pool.score([group(0, REPLIES)]).groups, "liked")
    assert found == pytest.approx(reward_model([*REPLIES], ["Q?"] * 5, path=str(chatting)), abs=1e-5)
    function = RewardFunctionConfig("reward_model", args={"path": str(chatting), "label": 2})
    with (
        pytest.raises(UserError, match=r"label is 2, but '.*' has 2 label\(s\)"),
        RewardPool(RewardConfig(functions={"liked": function})),
    ):
        pass
    function = RewardFunctionConfig("reward_model", args={"path": str(tmp_path)})
    with (
        pytest.raises(UserError, match="reward_model: cannot load"),
        RewardPool(RewardConfig(functions={"liked": function})),
    ):
        pass


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"label": -1}, "needs label >= 0"),
        ({"dtype": "int8"}, "dtype is 'int8'; valid: float32, bfloat16, float16"),
        ({"batch_size": 0}, "batch_size >= 1"),
    ],
)
def test_settings_are_checked_before_anything_is_loaded(args: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_function("liked", RewardFunctionConfig("reward_model", args={"path": "nowhere"} | args))
