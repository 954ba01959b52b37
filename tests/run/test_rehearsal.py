"""A dry run tells what would end a run later: in the data, in the reward functions, in the memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from inside import sapo_train
from tiny import make_stand_in, make_tokenizer

pytestmark = pytest.mark.usefixtures("forked_workers")
ROWS = [{"prompt": f"Question {number}?", "answer": str(number)} for number in range(20)]
REWARDS = """
import os
def fine(completions, answer, **columns): return [1.0 for _ in completions]
def more(completions, solution): return [1.0 for _ in completions]
value = 3
if os.path.exists("broken"): raise ValueError("no such judge")
"""


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: data, a reward module, and a model of which only the tokenizer is real."""
    make_stand_in(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").rename(tmp_path / "model" / "tokenizer.json")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dry_run(*arguments: str, function: str = "fine") -> tuple[int, str, str]:
    return sapo_train(
        "data=file",
        "data.path=rows.jsonl",
        "model.path=model",
        f"+reward.functions.mine.function=my_rewards.{function}",
        "eval.prompts=4",
        "dry_run=true",
        *arguments,
    )


def test_no_rows_need_be_held_out() -> None:
    code, shown, told = dry_run("eval.prompts=0")
    assert (code, told) == (0, "")
    table = [" ".join(line.replace("│", " ").split()) for line in shown.splitlines()]
    assert "rows to train on 20" in table and "held-out rows 0" in table


def write_weights(folder: Path, elements: int) -> None:
    """A safetensors file of so many elements, whose bytes take no room on the disk."""
    header: dict[str, Any] = {"w": {"dtype": "F32", "shape": [elements], "data_offsets": [0, 4 * elements]}}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(folder / "model.safetensors", 8 + len(text) + 4 * elements)


def test_rows_columns_and_the_longest_prompt_are_shown(workspace: Path) -> None:
    code, shown, told = dry_run()
    assert (code, told) == (0, "")
    table = [" ".join(line.replace("│", " ").split()) for line in shown.splitlines()]
    for line in ("rows to train on 16", "held-out rows 4", "columns prompt, answer"):
        assert line in table, shown
    assert "longest prompt 12 characters, 12 tokens before the chat template" in table
    assert not (workspace / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "function", "words"),
    [
        (["data.prompt_column=question"], "fine", ["data.prompt_column", "no column 'question'"]),
        (["data.answer_column=solution"], "fine", ["data.answer_column", "no column 'solution'"]),
        (["data.max_prompt_tokens=4"], "fine", ["data.max_prompt_tokens: all 16 prompts", "the shortest has 11"]),
        (["data.path=broken.jsonl"], "fine", ["broken.jsonl:2: no valid JSON"]),
        (["data.path=empty.jsonl"], "fine", ["row 20: its prompt is empty"]),
        ([], "more", ["'mine' (my_rewards.more) needs 'solution'", "no column of the data"]),
        ([], "value", ["my_rewards.value", "is a int, not a function"]),
    ],
)
def test_a_mistake_in_data_or_rewards_is_told(
    workspace: Path, arguments: list[str], function: str, words: list[str]
) -> None:
    (workspace / "broken.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt"\n')
    (workspace / "empty.jsonl").write_text((workspace / "rows.jsonl").read_text() + '{"prompt": "", "answer": "b"}\n')
    code, _, told = dry_run(*arguments, function=function)
    assert code == 2 and len(told.splitlines()) == 1, told
    assert all(word in told for word in words), told


def test_a_reward_module_that_fails_to_import_is_told(workspace: Path) -> None:
    (workspace / "broken").touch()
    code, _, told = dry_run()
    assert code == 2 and "ValueError: no such judge" in told and "my_rewards.py" in told


def files_of(folder: Path) -> set[str]:
    """Their names, but for the bytecode that Python keeps of the reward functions there."""
    return {path.name for path in folder.iterdir()} - {"__pycache__"}


def test_a_dry_run_writes_nothing_and_asks_no_service(workspace: Path) -> None:
    nobody = "{url: 'http://127.0.0.1:1', retries: 0}"
    judge = "{function: judge, args: {url: 'http://127.0.0.1:1', model: m, template: '{completion}', cache: j.sqlite}}"
    before = files_of(workspace)
    code, _, told = dry_run(
        f"+reward.functions.judged={judge}",
        f"+reward.functions.passed={{function: code, args: {{sandbox: {nobody}}}}}",
        "+reward.functions.scored={function: reward_model, args: {path: nobody/nowhere}}",
        "environment.name=python",
        f"environment.args.sandbox={nobody}",
    )
    assert (code, told) == (0, "")
    assert files_of(workspace) == before


def test_what_a_run_would_do_without_a_word_is_warned_of(workspace: Path) -> None:
    write_weights(workspace / "model", 10**11)
    code, _, told = dry_run(
        "trainer.updates_per_rollout=1",
        "rollout.batch_size=256",
        "data.max_prompt_tokens=11",
        "rollout.group_size=8",
        "rollout.top_p=0.9",
    )
    assert code == 0
    lines = told.splitlines()
    assert len(lines) == 5 and all(line.startswith("sapo-train: warning: ") for line in lines), told
    assert "16 prompt(s) to train on, fewer than the 32 of a step" in lines[0]
    assert "12 tokens; above data.max_prompt_tokens=11 they are left out" in lines[1]
    assert "rollout.top_p=0.9: vLLM samples" in lines[2] and "differ by at most 0.11 nats a token" in lines[2]
    assert "temperatures are inert" in lines[3]
    assert "GiB, are for float32 weights" in lines[4] and "model.lora.rank" in lines[4]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trainer.tokens_per_micro_batch=2000000000"], ["activations", "trainer.tokens_per_micro_batch"]),
        (["rollout.cpu_kv_cache_gb=100000"], ["vLLM's cache", "rollout.cpu_kv_cache_gb"]),
    ],
)
def test_memory_that_is_not_there_is_warned_of(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.setattr("sapo_rl.run.rehearsal.gpu_memory", lambda: None)
    write_weights(workspace / "model", 1000)
    code, shown, told = dry_run(*arguments)
    assert code == 0 and "sapo-train: warning: the run takes about" in told and "this machine has" in told
    assert all(word in told for word in words), told
    assert "vLLM's cache" in shown


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (False, "takes about 6 GiB, the GPU has 5 GiB; the most, 4 GiB, are for float32 weights"),
        (True, "takes about 11 GiB, the GPU has 5 GiB; the most, 6 GiB, are for gathered weights and whole gradients"),
    ],
)
def test_ranks_that_shard_take_their_share_and_what_they_gather(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, keep: bool, words: str
) -> None:
    """Of 10^9 weights in bfloat16 four ranks have 4e9 bytes each, and 2e9 on their way; 6e9 where they keep layers."""
    monkeypatch.setattr("sapo_rl.run.rehearsal.gpu_memory", lambda: 5 * 2**30)
    write_weights(workspace / "model", 10**9)
    settings = f"{{fsdp_version: 2, fsdp_reshard_after_forward: {str(not keep).lower()}}}"
    (workspace / "own.yaml").write_text(f"distributed_type: FSDP\nfsdp_config: {settings}\n")
    ranks = ("launch.profile=own.yaml", "launch.num_processes=4", "rollout.batch_size=128", "rollout.group_size=8")
    code, _, told = dry_run(*ranks, "rollout.transport=ipc")
    assert code == 0 and words in told, told


def test_a_model_that_fsdp2_keeps_is_counted_whole(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes are below an eighth of the GPU's, so that only other uses can fill it."""
    monkeypatch.setattr("sapo_rl.run.rehearsal.gpu_memory", lambda: 8 * 2**30)
    write_weights(workspace / "model", 10**8)
    ranks = ("launch=fsdp2", "launch.num_processes=4", "rollout.batch_size=128", "rollout.group_size=8")
    code, _, told = dry_run(*ranks, "trainer.tokens_per_micro_batch=2000000")
    assert code == 0
    taken = 16e8 / 4 + 2e8 + 6e8 + 2_000_000 * 2 * 34 * 64 + 3 * 4 * 1024 * 100
    assert f"takes about {taken / 2**30:,.0f} GiB" in told, told
