"""From rows to tokenised prompts: columns, wording, chat template, length."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from sapo_rl.config import DataConfig
from sapo_rl.errors import UserError, did_you_mean
from sapo_rl.types import Messages, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows: TypeAlias = dict[int, dict[str, Any]]
"""Rows by their number in the file or dataset, from 0."""

_FIELD = re.compile(r"\{([^{}]+)\}")
_WORD = re.compile(r"\w+")
_NO_WORDING = "{prompt}"
_FILLED_IN = ("messages", "conversation", "tokenize", "add_generation_prompt", "continue_final_message")


def value_of(row: Mapping[str, Any], column: str) -> Any:
    """Return what a row has in a column, or under a key within one (`reward_model.ground_truth`); None without it."""
    outer, _, inner = column.partition(".")
    if column in row or not inner:
        return row.get(column)
    return value_of(row[outer], inner) if isinstance(row.get(outer), Mapping) else None


def wording_columns(cfg: DataConfig) -> list[str]:
    """Return the columns that the wording of a prompt is made of; `{prompt}` stands for `prompt_column`.

    Braces around more than a word, as in `x^{n-1}`, may be the user's own: they name a column where the data has it.
    """
    return list(dict.fromkeys([*_named(cfg.template, cfg), *_named(cfg.response_prefix, cfg)]))


def check_wording(cfg: DataConfig) -> None:
    """Refuse a wording that cannot work.

    Raises:
        UserError: a template without a field, the answer in the wording, what only a chat template has without one, or
            an argument of the chat template that is not the user's to give.
    """
    if not _named(cfg.template, cfg):
        raise UserError(f"data.template: {cfg.template!r} holds no column; valid: {{prompt}}, or any column in braces")
    for key in ("template", "response_prefix", "system_prompt"):
        _check_characters(getattr(cfg, key) or "", f"data.{key}")
    for key, wording in (("template", cfg.template), ("response_prefix", cfg.response_prefix)):
        if {"answer", cfg.answer_column} & set(_named(wording, cfg)):
            raise UserError(f"data.{key}: {wording!r} would show the model the answer")
    for name in _FILLED_IN:
        if name in cfg.chat_template_args:
            raise UserError(f"data.chat_template_args: '{name}' is filled in for every prompt and cannot be set")
    if cfg.system_prompt is not None and not cfg.chat_template:
        raise UserError("data.system_prompt: needs data.chat_template=true")
    if cfg.response_prefix and not cfg.chat_template:
        raise UserError(
            "data.response_prefix: needs data.chat_template=true; without it, put it at data.template's end"
        )


def _named(wording: str, cfg: DataConfig) -> list[str]:
    """The columns in braces."""
    return [cfg.prompt_column if name == "prompt" else name for name in _FIELD.findall(wording)]


def build_prompts(rows: Rows, cfg: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Prompt], int]:
    """Return the prompts of `rows`, and how many were dropped for being longer than `cfg.max_prompt_tokens`.

    `Prompt.index` is the row's number. `columns` has every column but the prompt's, the answer also under `answer`;
    None where a row lacks a column. A chat that ends in an assistant message is left open there.

    Raises:
        UserError: a missing column, an unusable prompt, a tokenizer without a chat template, or no prompt left.
    """
    check_wording(cfg)
    if not rows:
        return [], 0
    rows = with_all_columns(rows, cfg)
    contents = {number: content_of(row, number, cfg) for number, row in rows.items()}
    texts = [
        _render(content, number, cfg, tokenizer) + _fill(cfg.response_prefix, rows[number], number, cfg)
        for number, content in contents.items()
    ]
    for number, text in zip(contents, texts, strict=True):
        _check_characters(text, f"row {number}: its prompt")
    # A chat template writes the special tokens itself.
    token_ids: list[list[int]] = tokenizer(texts, add_special_tokens=not cfg.chat_template)["input_ids"]  # pyright: ignore[reportAssignmentType]
    prompts = []
    for (number, content), ids in zip(contents.items(), token_ids, strict=True):
        if not ids:
            raise UserError(f"row {number}: its prompt is empty")
        if len(ids) <= cfg.max_prompt_tokens:
            prompts.append(Prompt(number, list(ids), content, columns_of(rows[number], cfg)))
    if not prompts:
        shortest = min(map(len, token_ids))
        raise UserError(
            f"data.max_prompt_tokens: all {len(rows)} prompts are longer than {cfg.max_prompt_tokens} tokens, "
            f"the shortest has {shortest}"
        )
    return prompts, len(rows) - len(prompts)


def check_columns(cfg: DataConfig, rows: Iterable[dict[str, Any]]) -> list[str]:
    """Return the names of all columns. Raises UserError where the prompt's wording or the answer is not among them."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    asked = [*wording_columns(cfg), cfg.answer_column or ""]
    known = {*names, *(one for one in asked if any(value_of(row, one) is not None for row in rows))}
    for outer, value in (item for row in rows[:1] for item in row.items()):
        known |= {f"{outer}.{inner}" for inner in value} if isinstance(value, Mapping) else set()
    in_template = _named(cfg.template, cfg)
    for column in wording_columns(cfg):
        meant = column == cfg.prompt_column or _WORD.fullmatch(column) or not set(in_template) & set(known)
        if column not in known and meant:
            key = "data.template" if column in in_template else "data.response_prefix"
            key = "data.prompt_column" if column == cfg.prompt_column else key
            raise UserError(f"{key}: the data has no column '{column}'; {did_you_mean(column, known)}")
    if cfg.answer_column is not None and cfg.answer_column not in known:
        hint = did_you_mean(cfg.answer_column, known)
        raise UserError(f"data.answer_column: the data has no column '{cfg.answer_column}'; {hint} (null for none)")
    return names


def with_all_columns(rows: Rows, cfg: DataConfig) -> Rows:
    """Return the rows, if any, with None under each column that one lacks; raises UserError as `check_columns` does."""
    names = check_columns(cfg, rows.values()) if rows else []
    return {number: {name: row.get(name) for name in names} for number, row in rows.items()}


def columns_of(row: dict[str, Any], cfg: DataConfig) -> dict[str, Any]:
    """Return what reward functions see of a row: every column but the prompt's, the answer also under `answer`."""
    columns = {name: value for name, value in row.items() if name != cfg.prompt_column}
    if cfg.answer_column is not None:
        columns["answer"] = value_of(row, cfg.answer_column)
    return columns


def content_of(row: dict[str, Any], number: int, cfg: DataConfig) -> str | Messages:
    """Return a row's prompt as the model is asked: worded text, or chat messages with the system prompt.

    Raises:
        UserError: naming the row: no text and no messages, nothing asked, or half of a character in it.
    """
    prompt = value_of(row, cfg.prompt_column)
    content = _messages(prompt, number, cfg) if isinstance(prompt, list) else _fill(cfg.template, row, number, cfg)
    asked = [content] if isinstance(content, str) else [one["content"] for one in content if one["role"] != "system"]
    if not any(text.strip() for text in asked):
        raise UserError(f"row {number}: its prompt is empty")
    _check_characters("".join(asked), f"row {number}: its prompt")
    return content


def _check_characters(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError(f"{what} holds {half!r}, one half of a character that was cut") from error


def _fill(wording: str, row: dict[str, Any], number: int, cfg: DataConfig) -> str:
    def fill(field: re.Match[str]) -> str:
        column = cfg.prompt_column if field[1] == "prompt" else field[1]
        if column not in row and column.partition(".")[0] not in row:  # `check_columns` has seen to what must be one
            return field[0]
        value = value_of(row, column)
        if value is None or isinstance(value, list | dict) or (field[1] == "prompt" and not isinstance(value, str)):
            raise UserError(f"row {number}: '{column}' is {_kind(value)}, must be text")
        return str(value)

    return _FIELD.sub(fill, wording)


def _messages(prompt: list[Any], number: int, cfg: DataConfig) -> Messages:
    for message in prompt:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UserError(f"row {number}: '{cfg.prompt_column}' must hold messages with the texts role and content")
    if not cfg.chat_template:
        raise UserError(f"row {number}: '{cfg.prompt_column}' holds chat messages, which need data.chat_template=true")
    if cfg.template != _NO_WORDING:
        raise UserError(f"data.template: is for text prompts, but '{cfg.prompt_column}' holds chat messages")
    messages = [{"role": message["role"], "content": message["content"]} for message in prompt]
    if cfg.system_prompt is None:
        return messages
    if messages and messages[0]["role"] == "system":
        raise UserError(f"data.system_prompt: row {number} has a system message of its own")
    return [{"role": "system", "content": cfg.system_prompt}, *messages]


def _render(content: str | Messages, number: int, cfg: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the tokenizer gets."""
    if not cfg.chat_template:
        assert isinstance(content, str)
        return content
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise UserError("data.chat_template: this model's tokenizer has no chat template; set data.chat_template=false")
    messages = content
    if isinstance(messages, str):
        system = [] if cfg.system_prompt is None else [{"role": "system", "content": cfg.system_prompt}]
        messages = [*system, {"role": "user", "content": messages}]
    unfinished = messages[-1]["role"] == "assistant"
    if unfinished and cfg.response_prefix:
        raise UserError(f"data.response_prefix: row {number} ends in an assistant message, which is continued already")
    try:
        return tokenizer.apply_chat_template(  # pyright: ignore[reportReturnType]
            messages,
            tokenize=False,
            add_generation_prompt=not unfinished,
            continue_final_message=unfinished,
            **cfg.chat_template_args,
        )
    except Exception as error:  # a template computes, and raises what it likes
        given = " or data.chat_template_args" if cfg.chat_template_args else ""
        kind = "" if isinstance(error, TemplateError | TypeError | ValueError) else f"{type(error).__name__}: "
        raise UserError(f"row {number}: the chat template refuses the prompt{given}: {kind}{error}") from error


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
