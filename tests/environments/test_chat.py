"""The tokens of a chat over several turns: verbatim, a prefix of what is sent next, masked where not sampled."""

from __future__ import annotations

import pytest
from tiny import make_tokenizer

from sapo_rl.environments.chat import ChatTemplate, Conversation
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
