"""Chat templates as files, and what models of each format write."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiny import make_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPECIAL = re.compile(
    r'<\|[\w"]+\|>|<\|(?:turn|tool\w*|channel)>|<(?:turn|tool\w*|channel)\|>|<(?:start|end)_\w+>|<\w+_of_turn>|<escape>'
)
TEMPLATES = Path(__file__).parent / "templates"
ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "description": "One."}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


@dataclass(frozen=True)
class Format:
    """How a model of a template writes."""

    template: str
    """A file in `templates/`; empty for the template of tests/tiny.py."""
    stop: str
    """What it ends a turn with."""
    call: str = ""
    """What a call looks like, with `{name}` and `{arguments}`; empty where the template has no tools."""
    call_stop: str = ""
    """What ends a turn with a call, where that is something else."""
    reply: str = "{text}"
    """What an answer looks like."""
    trims: bool = False
    """Whether the template trims what a message says."""
    argument: str = ""
    """What one of the arguments looks like, with `{key}` and `{value}`, where they are no JSON."""
    between: str = ""
    """What stands between two of them."""

    def written(self, text: str, call: dict[str, Any] | None = None) -> str:
        """A reply as the model writes it, with its stop token."""
        if call is None:
            return self.reply.replace("{text}", text) + self.stop
        each = [self.argument.replace("{key}", key).replace("{value}", str(call[key])) for key in sorted(call)]
        arguments = self.between.join(each) if self.argument else json.dumps(call)
        said = self.call.replace("{name}", "add").replace("{arguments}", arguments)
        return said + (self.call_stop or self.stop)


FORMATS = {
    "tiny": Format("", "<|im_end|>"),
    "qwen2_5": Format(
        "qwen2_5", "<|im_end|>", '<tool_call>\n{"name": "{name}", "arguments": {arguments}}\n</tool_call>'
    ),
    "qwen3": Format("qwen3", "<|im_end|>", '<tool_call>\n{"name": "{name}", "arguments": {arguments}}\n</tool_call>'),
    "llama3": Format("llama3", "<|eot_id|>", '{"name": "{name}", "parameters": {arguments}}', trims=True),
    "gemma3": Format("gemma3", "<end_of_turn>", trims=True),
    "gpt_oss": Format(
        "gpt_oss",
        "<|return|>",
        " to=functions.{name}<|channel|>commentary json<|message|>{arguments}",
        "<|call|>",
        "<|channel|>final<|message|>{text}",
    ),
    "glm4_5": Format(
        "glm4_5",
        "<|user|>",
        "\n<think></think>\n<tool_call>{name}\n{arguments}</tool_call>",
        "<|observation|>",
        "\n<think></think>\n{text}",
        trims=True,
        argument="<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n",
    ),
    "deepseek_v3": Format(
        "deepseek_v3",
        "<｜end▁of▁sentence｜>",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "deepseek_v31": Format(
        "deepseek_v31",
        "<｜end▁of▁sentence｜>",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "gemma4": Format(
        "gemma4",
        "<turn|>",
        "<|tool_call>call:{name}{{arguments}}<tool_call|>",
        "<|tool_response>",
        trims=True,
        argument="{key}:{value}",
        between=",",
    ),
    "functiongemma": Format(
        "functiongemma",
        "<end_of_turn>",
        "<start_function_call>call:{name}{{arguments}}<end_function_call>",
        "<start_function_response>",
        trims=True,
        argument="{key}:{value}",
        between=",",
    ),
}


def tokenizer_of(form: Format) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a template, and its special tokens."""
    tokenizer = make_tokenizer()
    if form.template:
        text = (TEMPLATES / f"{form.template}.jinja").read_text(encoding="utf-8")
        special = sorted({*_SPECIAL.findall(text), form.stop})
        tokenizer.add_tokens(
            sorted({*re.findall(r"<｜[^｜]+｜>", text)} - {form.stop})
        )  # no special ones, as of DeepSeek
        tokenizer.add_special_tokens({"additional_special_tokens": special})  # pyright: ignore[reportArgumentType]
        tokenizer.bos_token = "<|endoftext|>"
        tokenizer.chat_template = text
    return tokenizer
