"""What `sapo-serve` hands to vLLM; the servers themselves are in e2e/test_servers.py."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from command import free_port
from tiny import engine_settings

from sapo_rl.run import serve

ROOT = Path(__file__).parents[2]
OPTIONS = argparse.Namespace(host="127.0.0.1", port=8000, gpu_memory=0.9, episodes=False)


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
    assert json.loads(given["--compilation-config"])["cudagraph_capture_sizes"][-1] == 128
    assert {"--no-trust-remote-code", "--no-enforce-eager", "--disable-cascade-attn"} < set(given)
    assert given["--host"] == "127.0.0.1"
    assert given["--middleware"] == "sapo_rl.engines.vllm.api.TrainerApi"
    assert "--skip-tokenizer-init" not in given
    assert "--api-key" not in given


def test_a_mistake_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        serve.main(["config=quickstart", "rollout.max_num_seq=3", "--port", str(free_port())])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("sapo-serve: rollout.max_num_seq (command line): no such key; did you mean 'max_num_seqs'?")
    assert len(told.splitlines()) == 1


def test_the_trainers_launch_is_none_of_the_servers(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(serve.os, "execve", lambda program, arguments, environment: started.append(arguments))
    monkeypatch.setenv("SAPO_API_KEY", "a_key_of_forty_characters_or_thereabouts")
    port = ["--port", str(free_port())]
    for launch in (port, [*port, "launch=fsdp2", "launch.num_processes=16", "launch.num_machines=2"]):
        serve.main(["config=quickstart", f"model.path={tiny_model}", "data.max_prompt_tokens=64", *launch])
    assert started[0] == started[1]
    assert "--model" in started[0]


def test_a_server_that_records_has_room_for_the_episodes_of_agents(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(serve.os, "execve", lambda _, arguments, environment: started.append((arguments, environment)))
    monkeypatch.setenv("SAPO_API_KEY", "a_key_of_forty_characters_or_thereabouts")
    command = ["config=quickstart", "--episodes", f"model.path={tiny_model}", "data.max_prompt_tokens=64"]
    command += ["--port", str(free_port())]
    with pytest.raises(SystemExit) as stopped:
        serve.main(command)
    assert stopped.value.code == 2
    told = "sapo-serve: environment.max_tokens (default): is 2048, with data.max_prompt_tokens = 64 up to 2112 tokens;"
    assert told in capsys.readouterr().err
    serve.main([*command, "environment.max_tokens=400"])
    ((arguments, environment),) = started
    assert arguments[arguments.index("--max-model-len") + 1] == "464"
    assert arguments[arguments.index("--middleware") + 1] == "sapo_rl.run.recording.EpisodesApi"
    assert "max_tokens: 400" in environment["SAPO_EPISODES"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--host", "evil host"], "--host 'evil host'"),
        (["--host", "a" * 300], "--host 'aaa"),
        (["--host", ""], "--host is empty"),
        (["--host", "192.0.2.1"], "--host '192.0.2.1' --port 8000: cannot listen there: Cannot assign"),
        (["--port", "0"], "--port: is '0'; must be a whole number from 1 to 65535"),
        (["--port", "65536"], "--port: is '65536'"),
        (["--port", "http"], "--port: is 'http'"),
        (["--gpu-memory", "nan"], "--gpu-memory: is 'nan'; must be a number above 0, at most 1"),
        (["--gpu-memory", "1.5"], "--gpu-memory: is '1.5'"),
        (["--gpu-memory", "most"], "--gpu-memory: is 'most'"),
        (["--gpus"], "unrecognized arguments: --gpus"),
    ],
)
def test_an_option_that_cannot_be_is_refused_before_anything_starts(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        serve.main(["config=quickstart", *arguments])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("sapo-serve: ") and told in said and len(said.splitlines()) == 1


def test_a_port_that_is_taken_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(serve.UserError, match="already in use"):
        serve.check_address("127.0.0.1", listener.getsockname()[1])


@pytest.mark.parametrize("obstacle", ["no home", "a file for it", "read-only"])
def test_a_home_without_room_for_the_key_is_told_before_vllm_starts(
    obstacle: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("XDG_CONFIG_HOME", "SAPO_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(serve.os, "execve", lambda *_: pytest.fail("vLLM was started"))
    home = {"no home": tmp_path / "nowhere", "a file for it": tmp_path / "file", "read-only": Path("/proc")}[obstacle]
    (tmp_path / "file").write_text("")
    if obstacle == "no home":  # as for a user that the machine has no name for
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises(SystemExit) as stopped:
        serve.main(
            ["config=quickstart", f"model.path={tiny_model}", "data.max_prompt_tokens=64", "--port", str(free_port())]
        )
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "set SAPO_API_KEY" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("module", ["sapo_rl.run.serve", "sapo_rl.__main__"])
def test_ctrl_c_while_the_command_line_is_read_is_quiet(module: str, tmp_path: Path) -> None:
    (tmp_path / "hydra.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; from sapo_rl.__main__ import serve; serve()"
    command = ["-m", module] if module == "sapo_rl.run.serve" else ["-c", code]
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("damage", ["weights of another shape", "no tokenizer"])
def test_a_model_that_vllm_could_not_serve_is_told_before_it_starts(
    damage: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve.os, "execve", lambda *_: pytest.fail("vLLM was started"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    if damage == "no tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(SystemExit) as stopped:
        serve.main(
            ["config=quickstart", f"model.path={folder}", "data.max_prompt_tokens=64", "--port", str(free_port())]
        )
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("sapo-serve: model.path: ") and str(folder) in said and len(said.splitlines()) == 1
    assert not (tmp_path / "home").exists()
