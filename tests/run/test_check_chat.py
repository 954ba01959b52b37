"""`check=chat`: what it shows of each kind of chat template, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from environments.chats import FORMATS, tokenizer_of
from games import MODULE
from inside import sapo_train
from tiny import make_stand_in, make_tokenizer

from sapo_rl.config import TOOL_PARSERS
from sapo_rl.environments.parsers import PARSERS

pytestmark = pytest.mark.usefixtures("forked_workers")


def check_chat(folder: Path, name: str, *arguments: str) -> tuple[int, list[str], str]:
    """Check a model with the template of that name; return the exit code, the rows of the tables, and what was told."""
    form, tokenizer = FORMATS[name], tokenizer_of(FORMATS[name])
    tokenizer.eos_token = form.stop
    tokenizer.save_pretrained(make_stand_in(folder))
    if form.call_stop:
        ids = tokenizer.convert_tokens_to_ids([form.stop, form.call_stop])
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    code, shown, told = sapo_train("config=quickstart", f"model.path={folder}", "check=chat", *arguments)
    return code, [" ".join(line.replace("│", " ").split()) for line in shown.splitlines()], told


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")


@pytest.fixture
def games(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of a user's in the current folder, with tools and environments."""
    (tmp_path / "games_to_call.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


HOLDS = "what is sent begins with all that came before, at each turn"
FORKS = "the episode goes on in a further row"


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("tiny", [HOLDS, "parser json (auto)", "calls not in the template: bare JSON is expected"]),
        (
            "qwen2_5",
            [HOLDS, "parser hermes (auto)", "tools described by the template", "thinking in <think> tags kept"],
        ),
        (
            "qwen3",
            [
                f"what is sent does not begin with what came before at 1 of 2 turns: {FORKS}",
                f"thinking in <think> tags taken back when the user speaks again: {FORKS}",
            ],
        ),
        ("llama3", [HOLDS, "parser llama3_json (auto)", "calls in a form of the template's own"]),
        ("gemma3", [HOLDS, "results of tools messages of the user: the template knows no tools"]),
        ("gpt_oss", [f"what is sent does not begin with what came before at 1 of 2 turns: {FORKS}"]),
        (
            "glm4_5",
            [
                f"what is sent does not begin with what came before at 1 of 2 turns: {FORKS}",
                "parser glm45 (auto)",
                "calls in a form of the template's own",
                "stop token <|observation|> ends a call",
                "stop token <|user|> ends an answer",
            ],
        ),
        ("deepseek_v3", [HOLDS, "parser deepseek_v3 (auto)", "calls in a form of the template's own"]),
        ("deepseek_v31", [HOLDS, "parser deepseek_v3 (auto)", "calls in a form of the template's own"]),
        ("gemma4", [HOLDS, "parser gemma4 (auto)", "results of tools messages of a tool"]),
        ("functiongemma", [HOLDS, "parser functiongemma (auto)"]),
    ],
)
def test_the_tables_say_what_a_template_does(tmp_path: Path, name: str, facts: list[str]) -> None:
    code, shown, told = check_chat(tmp_path / "model", name)
    assert (code, told) == (0, "")
    assert set(facts) <= set(shown), shown


def test_every_stretch_of_tokens_is_shown_with_whether_it_is_trained_on(tmp_path: Path) -> None:
    _, shown, _ = check_chat(tmp_path / "model", "qwen2_5")
    said = r'<tool_call>\n{"name": "add_numbers", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>'
    length = len(said) - 2 * 1 - len("<|im_end|>") + 1  # a token a character, two newlines, the stop token
    assert f"model {length} yes {said}" in shown
    result = r"\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert any(line.startswith("tool ") and line.endswith(f"no {result}") for line in shown), shown


def test_the_tools_and_the_system_prompt_of_the_config_are_shown(tmp_path: Path, games: None) -> None:
    own = ("tools=[games_to_call.double]", "data.system_prompt=Use double.", "environment.max_tokens=64")
    code, shown, told = check_chat(tmp_path / "model", "qwen2_5", *own)
    assert (code, told) == (0, "")
    whole = "".join(shown)
    assert "three turns with the config's tools" in whole and "add_numbers" not in whole
    assert "Use double." in whole and '"name": "double", "description": "Double a number."' in whole
    called = r'<tool_call>\n{"name": "double", "arguments": {"number": 2}}\n</tool_call><|im_end|>'
    assert any(line.startswith("model ") and line.endswith(f" yes {called}") for line in shown), shown
    _, shown, _ = check_chat(tmp_path / "plain", "tiny", *own)  # its name in the system prompt describes no tool
    assert "tools not described by the template: do it in data.system_prompt" in shown


def test_each_environment_with_tools_has_a_conversation_of_its_own(tmp_path: Path, games: None) -> None:
    own = (
        "+environments.sums.name=calculator",
        "+environments.game.name=guess",
        "+environments.late.name=games_to_call.Shelf",
    )
    code, shown, told = check_chat(tmp_path / "model", "qwen2_5", *own)
    assert (code, told) == (0, "")
    assert [line for line in shown if line.startswith("a conversation")] == [
        "a conversation of three turns with the tools of environments.sums",
        "a conversation of three turns with the tools of environments.late",
    ]


def test_tools_that_cannot_be_described_are_refused(tmp_path: Path) -> None:
    code, _, told = check_chat(tmp_path / "model", "qwen2_5", "tools=[json.dumps]")
    assert code == 2 and "tools: dumps: its arguments must have names" in told and "Traceback" not in told


def test_an_empty_thought_in_the_prompt_that_the_history_lacks_forks(tmp_path: Path) -> None:
    code, shown, _ = check_chat(tmp_path / "model", "qwen3", "+data.chat_template_args.enable_thinking=false")
    assert code == 0
    assert f"what is sent does not begin with what came before at 2 of 2 turns: {FORKS}" in shown


def test_a_stop_token_that_the_template_does_not_write_is_told(tmp_path: Path) -> None:
    model = make_stand_in(tmp_path / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    code, shown, _ = check_chat(model, "qwen2_5")
    assert code == 0
    assert f"stop token <|endoftext|> taken back: {FORKS}" in shown
    assert "stop token <|im_end|> ends a call and an answer" in shown


def test_a_parser_that_does_not_read_the_templates_calls_is_refused(tmp_path: Path) -> None:
    code, _, told = check_chat(tmp_path / "model", "qwen2_5", "rollout.tool_parser=mistral")
    assert code == 2
    assert "rollout.tool_parser (command line): 'mistral' does not read the call '<tool_call>" in told
    assert "what reads it: auto, hermes" in told and "Traceback" not in told


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(make_stand_in(tmp_path / "model"))
    code, _, told = sapo_train("config=quickstart", f"model.path={tmp_path / 'model'}", "check=chat")
    assert code == 2 and "model.path" in told and "has no chat template" in told


def test_the_key_names_every_parser_there_is() -> None:
    assert sorted(TOOL_PARSERS) == sorted(PARSERS)
