"""The tokens of a chat over several turns: verbatim, a prefix of what is sent next, masked where not sampled."""

from __future__ import annotations

from typing import Any

import pytest
from environments.chats import ADD, FORMATS, tokenizer_of
from tiny import make_tokenizer

from sapo_rl.config import DataConfig
from sapo_rl.data import build_prompts
from sapo_rl.environments.chat import ChatTemplate, Conversation, Refused
from sapo_rl.errors import UserError

ASK = [{"role": "user", "content": "guess"}]


def begin(chat: ChatTemplate) -> Conversation:
    return chat.begin(chat.start(ASK), ASK)


def write(talk: Conversation, text: str, stop: str | None = "<|im_end|>") -> list[int]:
    """Have the model write `text` and a stop token, or be cut; return the ids."""
    ids = talk.template.encode(text + (stop or ""))
    talk.reply(ids, [-0.5] * len(ids), truncated=stop is None)
    return ids


def test_replies_stay_verbatim_and_what_is_between_them_is_masked() -> None:
    talk = begin(ChatTemplate(make_tokenizer()))
    prompt = talk.next_prompt
    first = write(talk, "is it 5?")
    between = talk.extend([{"role": "user", "content": "higher"}])
    second = write(talk, "6")
    [row], tokenizer = talk.rows(), talk.template.tokenizer
    assert row.prompt_ids == prompt
    spans = row.loss_mask or []
    assert spans == [(0, 9), (9 + between, 11 + between)]
    assert [row.token_ids[start:end] for start, end in spans] == [first, second]
    assert tokenizer.decode(row.token_ids[9:-2]) == ("\n<|im_start|>user\nhigher<|im_end|>\n<|im_start|>assistant\n")
    assert row.rollout_logps == [-0.5] * 11
    assert [(turn.start, turn.end, turn.row) for turn in talk.turns()] == [(*span, 0) for span in spans]


def test_a_cut_reply_is_ended_by_the_template() -> None:
    talk = begin(ChatTemplate(make_tokenizer()))
    write(talk, "is it", stop=None)
    talk.extend([{"role": "user", "content": "what?"}])
    assert talk.template.tokenizer.decode(talk.next_prompt) == talk.template.render(talk.messages)
    assert talk.rows()[0].loss_mask is None and len(talk.rows()[0].token_ids) == 5  # what is not sent is not kept
    assert talk.forks == 0


def test_a_foreign_stop_token_is_taken_back_in_a_further_row() -> None:
    talk = begin(ChatTemplate(make_tokenizer()))
    write(talk, "7", stop="<|endoftext|>")
    talk.extend([{"role": "user", "content": "no"}])
    assert talk.forks == 1 and len(talk.rows()) == 1  # the further row has no reply yet
    assert talk.next_prompt == talk.template.start(talk.messages)
    write(talk, "8")
    assert [len(row.token_ids) for row in talk.rows()] == [2, 2]
    assert talk.turns()[1].row == 1


def test_a_tokenizer_without_a_template_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"model\.path: its tokenizer has no chat template"):
        ChatTemplate(tokenizer)


def chat_of(name: str, *, tools: bool = True, **arguments: Any) -> ChatTemplate:
    return ChatTemplate(tokenizer_of(FORMATS[name]), tools=[ADD] if tools else None, arguments=arguments)


def say(talk: Conversation, name: str, text: str, call: dict[str, int] | None = None) -> dict[str, Any]:
    """Have a model of this format say or call something."""
    ids = talk.template.encode(FORMATS[name].written(text, call))
    return talk.reply(ids, None, truncated=False)


def test_a_prompt_is_what_the_data_makes_of_it() -> None:
    tokenizer = make_tokenizer()
    [prompt], _ = build_prompts({0: {"prompt": "guess"}}, DataConfig(source="file", answer_column=None), tokenizer)
    assert ChatTemplate(tokenizer).start(ASK) == prompt.token_ids


def test_without_log_probabilities_rows_have_none() -> None:
    talk = begin(chat_of("qwen2_5"))
    say(talk, "qwen2_5", "5")
    assert talk.rows()[0].rollout_logps is None


def test_several_results_are_one_turn_of_the_user_where_the_template_says_so() -> None:
    talk = begin(chat_of("qwen2_5"))
    call = FORMATS["qwen2_5"].call.replace("{name}", "add")
    ids = talk.template.encode(f"{call}\n{call}<|im_end|>".replace("{arguments}", '{"a": 1, "b": 2}'))
    message = talk.reply(ids, None, truncated=False)
    assert [one["id"] for one in message["tool_calls"]] == ["call00000", "call00001"]
    assert message["tool_calls"][1]["function"] == {"name": "add", "arguments": {"a": 1, "b": 2}}
    ids = [one["id"] for one in message["tool_calls"]]
    talk.extend([{"role": "tool", "name": "add", "tool_call_id": one, "content": "3"} for one in ids])
    sent = talk.template.decode(talk.next_prompt, special=True)
    assert sent.count("<|im_start|>user") == 2 and sent.count("<tool_response>\n3\n</tool_response>") == 2
    assert sent == talk.template.render(talk.messages)


def test_a_malformed_call_is_content_with_a_problem_which_a_tool_may_tell() -> None:
    talk = begin(chat_of("qwen2_5"))
    written = "<tool_call>\n{add}\n</tool_call>"
    message = say(talk, "qwen2_5", written)
    assert message == {"role": "assistant", "content": written}
    assert talk.problem.startswith("the call of a tool is no valid JSON")
    talk.extend([{"role": "tool", "content": talk.problem}])
    assert talk.forks == 0
    assert talk.template.decode(talk.next_prompt, special=True) == talk.template.render(talk.messages)
    say(talk, "qwen2_5", "sorry")
    assert talk.problem == ""


def test_calls_that_the_template_refuses_are_told_to_the_model() -> None:
    talk = begin(chat_of("llama3"))
    call = '{"name": "add", "parameters": {"a": 1, "b": 2}}'
    message = say(talk, "llama3", f"{call}; {call}")
    assert message == {"role": "assistant", "content": f"{call}; {call}"}
    assert "This model only supports single tool-calls at once!" in talk.problem


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_results_are_messages_of_the_user_where_the_template_takes_no_tools(name: str) -> None:
    talk = begin(chat_of(name))
    say(talk, name, "hm")
    talk.extend([{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}])
    assert talk.messages[-1] == {"role": "user", "content": "1\n2"}
    assert "1\n2" in talk.template.decode(talk.next_prompt)


def test_messages_that_the_template_refuses_are_told() -> None:
    talk = begin(chat_of("gemma3"))
    say(talk, "gemma3", "hm")
    with pytest.raises(Refused, match="roles user, assistant, user, user: Conversation roles must alternate"):
        talk.extend([{"role": "user", "content": "1"}, {"role": "user", "content": "2"}])


def test_thinking_in_a_channel_is_kept_from_the_content_and_dropped_from_the_history() -> None:
    talk = begin(chat_of("gpt_oss"))
    thought = "<|channel|>analysis<|message|>one and two<|end|><|start|>assistant"
    call = talk.template.encode(thought + FORMATS["gpt_oss"].written("", {"a": 1, "b": 2}))
    message = talk.reply(call, None, truncated=False)
    assert (message["content"], message["thinking"]) == ("", "one and two")
    talk.extend([{"role": "tool", "name": "add", "tool_call_id": "call00000", "content": "3"}])
    assert talk.forks == 0  # until there is an answer, the template keeps it
    say(talk, "gpt_oss", "3")
    talk.extend(ASK)
    assert talk.forks == 1 and "one and two" not in talk.template.decode(talk.next_prompt)


def test_an_empty_thought_of_the_prompt_forks_at_each_turn_where_the_history_lacks_it() -> None:
    talk = begin(chat_of("qwen3", enable_thinking=False))
    for turn in range(3):
        say(talk, "qwen3", "5")
        talk.extend(ASK)
        assert talk.forks == turn + 1
        assert talk.next_prompt == talk.template.start(talk.messages)


def test_a_prompt_that_ends_in_an_open_reply_is_gone_on_with() -> None:
    chat = chat_of("qwen2_5", tools=False)
    messages = [*ASK, {"role": "assistant", "content": "It is "}]
    assert chat.start(messages) == chat.encode(chat.render(ASK) + "It is ")
    talk = chat.begin(chat.start(messages), messages)
    assert say(talk, "qwen2_5", "7.") == {"role": "assistant", "content": "It is 7."}
    talk.extend(ASK)
    assert chat.decode(talk.next_prompt, special=True) == chat.render(talk.messages)


def test_the_environment_speaks_after_the_model() -> None:
    talk = begin(chat_of("tiny"))
    with pytest.raises(ValueError, match="the model has not replied"):
        talk.extend(ASK)


def test_a_template_for_other_content_than_text_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }}{% endfor %}"
    with pytest.raises(UserError, match=r"model\.path: its chat template leaves out the content"):
        ChatTemplate(tokenizer)


HEARD = [{"role": "user", "content": "higher"}]


@pytest.mark.parametrize(
    ("name", "reply", "call"),
    [
        (
            "qwen3",
            "<|im_end|>\n<|im_start|>user\nhigher<|im_end|>\n<|im_start|>assistant\n",
            "\n<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n3\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "deepseek_v3",
            "<｜end▁of▁sentence｜><｜User｜>higher<｜Assistant｜>",
            "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>3<｜tool▁output▁end｜>\n"
            "<｜tool▁output▁begin｜>3<｜tool▁output▁end｜><｜tool▁outputs▁end｜>",
        ),
        (
            "glm4_5",
            "<|user|>\nhigher<|assistant|>",
            "\n<tool_response>\n3\n</tool_response>\n<tool_response>\n3\n</tool_response><|assistant|>",
        ),
        (
            "gemma4",
            "<turn|>\n<|turn>user\nhigher<turn|>\n<|turn>model\n",
            'response:add{value:<|"|>3<|"|>}<tool_response|>'
            '<|tool_response>response:add{value:<|"|>3<|"|>}<tool_response|>',
        ),
    ],
)
def test_what_follows_a_cut_reply_and_the_calls_of_another(name: str, reply: str, call: str) -> None:
    talk, form = begin(chat_of(name)), FORMATS[name]
    write(talk, form.reply.replace("{text}", "is it"), stop=None)
    before = len(talk.next_prompt)
    talk.extend(HEARD)
    assert talk.template.decode(talk.next_prompt[before:], special=True) == reply
    written = form.written("", {"a": 1, "b": 2}).removesuffix(form.call_stop or form.stop)
    second = written.partition("<tool_call>")[1] + written.partition("<tool_call>")[2] if name == "glm4_5" else written
    ids = talk.template.encode(_two(written, second) + (form.call_stop or form.stop))
    calls = talk.reply(ids, None, truncated=False)["tool_calls"]
    before = len(talk.next_prompt)
    talk.extend([{"role": "tool", "name": "add", "tool_call_id": one["id"], "content": "3"} for one in calls])
    assert (len(calls), talk.forks) == (2, 0)
    assert talk.template.decode(talk.next_prompt[before:], special=True) == call


def _two(one: str, other: str) -> str:
    """Two calls in a reply: DeepSeek has them in one block."""
    block = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    return one.removesuffix(block[1]) + other.removeprefix(block[0])


RESULT = [{"role": "tool", "name": "add", "tool_call_id": "call00000", "content": "3"}]


def test_a_thought_that_is_cut_is_ended_and_the_end_is_not_trained_on() -> None:
    talk = begin(chat_of("qwen3"))
    say(talk, "qwen3", "", {"a": 1, "b": 2})
    talk.extend(RESULT)
    message, start = write(talk, "<think>\nhm, let", stop=None), len(talk.rows()[0].token_ids)
    talk.extend(RESULT)
    say(talk, "qwen3", "3")
    [row] = talk.rows()
    assert talk.template.decode(row.token_ids[start:], special=True).startswith("\n</think>\n\n<|im_end|>")
    assert row.loss_mask and row.loss_mask[1] == (start - len(message), start)
    sent = talk.template.decode(row.prompt_ids + row.token_ids[:-2], special=True)
    assert sent == talk.template.render(talk.messages[:-1])


@pytest.mark.parametrize("stop", [None, "<|im_end|>"])
@pytest.mark.parametrize("opened", [False, True], ids=["by the model", "by the prompt"])
def test_a_thought_without_an_end_is_taken_back_like_any_other(opened: bool, stop: str | None) -> None:
    tokenizer = tokenizer_of(FORMATS["qwen3"])
    if opened:
        whole, begins = (
            str(tokenizer.chat_template),
            "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n",
        )
        assert begins in whole
        tokenizer.chat_template = whole.replace(begins, begins + "<think>\\n")
    talk = begin(ChatTemplate(tokenizer))
    write(talk, ("" if opened else "<think>\n") + "hm, let me", stop)
    talk.extend(HEARD)
    assert talk.forks == 1
    sent = talk.template.decode(talk.next_prompt, special=True)
    assert "hm, let" not in sent and sent == talk.template.render(talk.messages)


def test_a_thought_without_an_end_is_content_where_the_template_knows_no_thinking() -> None:
    talk = begin(chat_of("qwen2_5"))
    write(talk, "<think>\nhm, let", stop=None)
    talk.extend(HEARD)
    assert talk.forks == 0 and talk.messages[1]["content"] == "<think>\nhm, let"


@pytest.mark.parametrize("opened", [False, True], ids=["by the model", "by the prompt"])
def test_gemma_4_keeps_the_thinking_before_a_call_until_the_user_speaks(opened: bool) -> None:
    talk = begin(chat_of("gemma4", enable_thinking=opened))
    for turn in range(2):
        thought = ("" if opened and turn else "<|channel>thought\n") + "one and two\n<channel|>"
        call = talk.template.encode(thought + FORMATS["gemma4"].written("", {"a": 1, "b": 2}))
        message = talk.reply(call, None, truncated=False)
        assert (message["content"], message["thinking"]) == ("", "one and two")
        talk.extend(RESULT)
        assert talk.forks == 0
        assert talk.template.decode(talk.next_prompt, special=True) == talk.template.render(talk.messages)
    say(talk, "gemma4", "3")
    talk.extend(ASK)
    assert talk.forks == 1 and "one and two" not in talk.template.decode(talk.next_prompt)


def test_a_message_that_the_template_puts_elsewhere_is_not_lost() -> None:
    talk = begin(chat_of("deepseek_v3"))  # all that the system says stands at the top
    say(talk, "deepseek_v3", "5")
    talk.extend([{"role": "system", "content": "be kind"}, *HEARD])
    assert talk.forks == 1
    assert talk.template.decode(talk.next_prompt, special=True) == talk.template.render(talk.messages)
    assert "be kind" in talk.template.decode(talk.next_prompt)


def test_a_message_that_the_template_leaves_out_is_refused() -> None:
    talk = begin(chat_of("qwen3"))
    say(talk, "qwen3", "5")
    with pytest.raises(Refused, match="leaves out what a message of the role system says after a reply"):
        talk.extend([{"role": "system", "content": "be kind"}, *HEARD])
