"""From rows to token ids."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sapo_rl.config import DataConfig
from sapo_rl.data import build_prompts as build_numbered
from sapo_rl.errors import UserError
from sapo_rl.types import Prompt

WORDS = ["<s>", "<unk>", "system", "user", "assistant", "Q", "A", "be", "brief", "one", "two", "three", ":", "|"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} | {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}{% if brief %} brief{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def row(prompt: Any = "one two", **columns: Any) -> dict[str, Any]:
    return {"prompt": prompt, "answer": "three", **columns}


def build_prompts(
    rows: list[dict[str, Any]], cfg: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[Prompt], int]:
    return build_numbered(dict(enumerate(rows)), cfg, tokenizer)


def test_text_becomes_one_user_message(tokenizer: PreTrainedTokenizerFast) -> None:
    (prompt,), dropped = build_prompts([row(level=3)], DataConfig(), tokenizer)
    assert dropped == 0 and prompt.index == 0
    assert prompt.token_ids == ids("user : one two | assistant :")
    assert prompt.content == "one two"
    assert prompt.columns == {"answer": "three", "level": 3}


def test_template_system_prompt_and_template_arguments(tokenizer: PreTrainedTokenizerFast) -> None:
    cfg = DataConfig(
        template="Q : {prompt} {hint}",
        system_prompt="be brief",
        chat_template_args={"brief": True},
        prompt_column="text",
    )
    (prompt,), _ = build_prompts([{"text": "one", "hint": "two", "answer": 1}], cfg, tokenizer)
    assert prompt.token_ids == ids("system : be brief | user : Q : one two | assistant : brief")
    assert prompt.content == "Q : one two"
    assert prompt.columns == {"hint": "two", "answer": 1}


def test_every_reply_begins_with_the_response_prefix(tokenizer: PreTrainedTokenizerFast) -> None:
    cfg = DataConfig(response_prefix=" A {hint} :")
    rows = [row(hint="two"), row(CHAT, hint="three")]
    prompts, _ = build_prompts(rows, cfg, tokenizer)
    assert prompts[0].token_ids == ids("user : one two | assistant : A two :")
    assert prompts[1].token_ids == ids("user : one | assistant : A three :")
    assert prompts[0].content == "one two"


def test_other_braces_of_the_template_stay(tokenizer: PreTrainedTokenizerFast) -> None:
    cfg = DataConfig(template="{prompt} \\boxed{} {}{ x }")
    (prompt,), _ = build_prompts([row("{hint}", hint="no")], cfg, tokenizer)
    assert prompt.content == "{hint} \\boxed{} {}{ x }"


def test_columns_whose_name_is_no_word_stand_in_braces(tokenizer: PreTrainedTokenizerFast) -> None:
    cfg = DataConfig(template="Q : {my-col} {n-1} {two words} : {prompt}", prompt_column="my.text")
    (prompt,), _ = build_prompts([{"my.text": "A", "my-col": "one", "two words": "two", "answer": 3}], cfg, tokenizer)
    assert prompt.content == "Q : one {n-1} two : A"
    assert prompt.columns == {"my-col": "one", "two words": "two", "answer": 3}


def test_rows_and_prompts_are_known_by_the_number_they_come_with(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts, _ = build_numbered({4: row("one"), 9: row("two")}, DataConfig(), tokenizer)
    assert [(prompt.index, prompt.content) for prompt in prompts] == [(4, "one"), (9, "two")]
    for bad in (None, []):
        with pytest.raises(UserError, match="row 9"):
            build_numbered({4: row("one"), 9: row(bad)}, DataConfig(), tokenizer)


def test_plain_text_gets_the_tokenizers_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    (prompt,), _ = build_prompts([row()], DataConfig(chat_template=False), tokenizer)
    assert prompt.token_ids == ids("<s> one two")


def test_chat_rows_stay_messages(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "user", "content": "one"}]
    (prompt,), _ = build_prompts([row(chat)], DataConfig(system_prompt="be brief"), tokenizer)
    assert prompt.token_ids == ids("system : be brief | user : one | assistant :")
    assert prompt.content == [{"role": "system", "content": "be brief"}, *chat]


def test_a_chat_that_ends_in_an_assistant_message_is_continued(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    (prompt,), _ = build_prompts([row(chat)], DataConfig(), tokenizer)
    assert prompt.token_ids == ids("user : one | assistant : two")


def test_the_answer_column_is_seen_as_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "one", "solution": "two", "level": 1}, {"prompt": "one", "solution": None}]
    prompts, _ = build_prompts(rows, DataConfig(answer_column="solution"), tokenizer)
    assert [prompt.columns for prompt in prompts] == [
        {"solution": "two", "level": 1, "answer": "two"},
        {"solution": None, "level": None, "answer": None},
    ]
    (bare,), _ = build_prompts([{"prompt": "one"}], DataConfig(answer_column=None), tokenizer)
    assert bare.columns == {}


def test_a_key_within_a_column_is_named_with_a_dot(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"task": {"text": "one", "label": {"is": "two"}}}, {"task": {"text": "two", "label": None}}]
    cfg = DataConfig(prompt_column="task.text", answer_column="task.label.is", template="Q : {prompt}")
    (first, second), _ = build_prompts(rows, cfg, tokenizer)
    assert [first.content, second.content] == ["Q : one", "Q : two"]
    assert [first.columns["answer"], second.columns["answer"]] == ["two", None]
    assert first.columns["task"] == rows[0]["task"]
    cfg = DataConfig(prompt_column="task.text", answer_column="task.lable")
    with pytest.raises(UserError, match=r"answer_column: .*no column 'task\.lable'; did you mean 'task\.label'\?"):
        build_prompts(rows, cfg, tokenizer)


def test_long_prompts_are_dropped_and_counted_never_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [row("one " * length) for length in (3, 4, 2, 9)]
    prompts, dropped = build_prompts(rows, DataConfig(chat_template=False, max_prompt_tokens=4), tokenizer)
    assert [(prompt.index, len(prompt.token_ids)) for prompt in prompts] == [(0, 4), (2, 3)]
    assert dropped == 2
    with pytest.raises(UserError, match="all 4 prompts are longer than 2 tokens, the shortest has 3"):
        build_prompts(rows, DataConfig(chat_template=False, max_prompt_tokens=2), tokenizer)


def test_no_rows_give_no_prompts(tokenizer: PreTrainedTokenizerFast) -> None:
    assert build_prompts([], DataConfig(), tokenizer) == ([], 0)


CHAT = [{"role": "user", "content": "one"}]


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([row()], {"prompt_column": "promt"}, r"data\.prompt_column: .*no column 'promt'; did you mean 'prompt'"),
        ([row()], {"answer_column": "answers"}, r"data\.answer_column: .*'answers'; did you mean 'answer'"),
        ([row()], {"template": "{prompt} {hint}"}, r"data\.template: .*no column 'hint'"),
        (
            [row(**{"my-col": 1})],
            {"template": "{my-cl}"},
            r"data\.template: .*no column 'my-cl'; did you mean 'my-c",
        ),
        ([row()], {"template": "{prompt}", "prompt_column": "a-b"}, r"data\.prompt_column: .*no column 'a-b'"),
        ([row(**{"a-b": 1}), row(**{"a-b": None})], {"template": "{prompt} {a-b}"}, "row 1: 'a-b' is missing"),
        ([row()], {"response_prefix": "{hint}"}, r"data\.response_prefix: .*no column 'hint'"),
        (
            [row([*CHAT, {"role": "assistant", "content": "A"}])],
            {"response_prefix": "A"},
            r"data\.response_prefix: row 0 ends in an assistant message",
        ),
        ([row(), row(None)], {}, "row 1: 'prompt' is missing, must be text"),
        ([row(), row(3)], {}, "row 1: 'prompt' is a int, must be text"),
        ([row([{"role": "user"}])], {}, "row 0: 'prompt' must hold messages"),
        ([row([{"role": "user", "content": [{"type": "text"}]}])], {}, "row 0: 'prompt' must hold messages"),
        ([row([])], {}, "row 0: its prompt is empty"),
        ([row(), row(" \n")], {}, "row 1: its prompt is empty"),
        ([row([{"role": "system", "content": "A"}])], {}, "row 0: its prompt is empty"),
        ([row(), row("cut \ud83d")], {}, r"row 1: its prompt holds '\\ud83d', one half of a character"),
        ([row([{"role": "user", "content": "\udc00"}])], {}, r"row 0: its prompt holds '\\udc00'"),
        ([row([*[{"role": "system", "content": "\udc00"}], *CHAT])], {}, r"row 0: its prompt holds '\\udc00'"),
        ([row()], {"system_prompt": "\ud800"}, r"data\.system_prompt holds '\\ud800'"),
        ([row()], {"chat_template_args": {"tokenize": True}}, r"data\.chat_template_args: 'tokenize' is filled in"),
        ([row()], {"chat_template_args": {"messages": []}}, r"data\.chat_template_args: 'messages' is filled in"),
        (
            [row()],
            {"chat_template_args": {"tools": 3}},
            r"row 0: .*or data\.chat_template_args: 'int'",
        ),
        ([row(CHAT)], {"chat_template": False}, r"row 0.*need data\.chat_template=true"),
        ([row(CHAT)], {"template": "Q {prompt}"}, r"data\.template: is for text prompts"),
        ([row([{"role": "system", "content": "A"}])], {"system_prompt": "be"}, "row 0 has a system message of its own"),
    ],
)
def test_unusable_rows_are_named(
    tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build_prompts(rows, DataConfig(**fields), tokenizer)


def test_tokenizers_that_cannot_do_it(tokenizer: PreTrainedTokenizerFast) -> None:
    cfg = DataConfig(chat_template_args={"chat_template": "{{ 1 / 0 }}"})
    with pytest.raises(
        UserError, match=r"row 0: the chat template refuses .*args: ZeroDivisionError: division by zero"
    ):
        build_prompts([row()], cfg, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('Roles must alternate') }}"
    with pytest.raises(UserError, match="row 0: the chat template refuses the prompt: Roles must alternate"):
        build_prompts([row()], DataConfig(), tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"no chat template; set data\.chat_template=false"):
        build_prompts([row()], DataConfig(), tokenizer)
