"""What `sapo-serve` hands to vLLM; the servers themselves are in e2e/test_servers.py."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from tiny import engine_settings

from sapo_rl import serve

OPTIONS = argparse.Namespace(host="127.0.0.1", port=8000, gpu_memory=0.9)


def flags(path: Path, **changes: object) -> dict[str, str]:
    """The flags with their values; those of switches are empty."""
    found = serve.vllm_flags(engine_settings(path, path, **changes), OPTIONS)
    pairs = zip(found, [*found[1:], "--"], strict=True)
    return {flag: "" if after.startswith("--") else after for flag, after in pairs if flag.startswith("--")}


def test_a_server_samples_as_the_trainers_own_engines(tmp_path: Path) -> None:
    given = flags(tmp_path, device="cuda:0", tensor_parallel=2, gpu_memory_utilization=0.9, enforce_eager=False)
    assert given["--model"] == str(tmp_path)
    assert given["--dtype"] == "float32"
    assert given["--logprobs-mode"] == "processed_logprobs"
    assert given["--generation-config"] == "vllm"
    assert given["--max-model-len"] == "256"
    assert given["--max-num-seqs"] == "64"
    assert given["--tensor-parallel-size"] == "2"
    assert given["--gpu-memory-utilization"] == "0.9"
    assert json.loads(given["--compilation-config"])["cudagraph_capture_sizes"][-1] == 64
    assert {"--no-trust-remote-code", "--no-enforce-eager", "--disable-cascade-attn"} < set(given)
    assert given["--host"] == "127.0.0.1"
    assert given["--middleware"] == "sapo_rl.rollout.api.TrainerApi"
    assert "--skip-tokenizer-init" not in given
    assert "--api-key" not in given


def test_a_mistake_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        serve.main(["config=quickstart", "rollout.max_num_seq=3"])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("sapo-serve: rollout.max_num_seq (command line): no such key; did you mean 'max_num_seqs'?")
    assert len(told.splitlines()) == 1


def test_the_trainers_launch_is_none_of_the_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(serve.os, "execve", lambda program, arguments, environment: started.append(arguments))
    monkeypatch.setenv("SAPO_API_KEY", "a key of forty characters or thereabouts")
    (tmp_path / "config.json").write_text("{}")
    for launch in ([], ["launch=fsdp2", "launch.num_processes=16", "launch.num_machines=2"]):
        serve.main(["config=quickstart", f"model.path={tmp_path}", *launch])
    assert started[0] == started[1]
    assert "--model" in started[0]
