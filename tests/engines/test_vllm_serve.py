"""Signals that reach a server before vLLM serves. A stand-in for vLLM starts a core, and loses exceptions like it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SERVE = """
import argparse, multiprocessing, signal, time

def run_server():
    def interrupt(*_):
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, interrupt)
    core = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    core.start()
    print(core.pid, flush=True)
    while True:
        try:
            time.sleep(600)
        except BaseException:
            pass

class Command:
    def subparser_init(self, parsers):
        return argparse.ArgumentParser()

    def validate(self, arguments):
        pass

    def cmd(self, arguments):
        run_server()

def cmd_init():
    return [Command()]
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    for package in ("vllm", "vllm/entrypoints", "vllm/entrypoints/cli", "vllm/utils"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "vllm/entrypoints/cli/serve.py").write_text(SERVE)
    parser = "from argparse import ArgumentParser as FlexibleArgumentParser"
    (tmp_path / "vllm/utils/argparse_utils.py").write_text(parser)
    return os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_during_the_start_ends_the_server_and_its_core_quietly(
    number: signal.Signals, environment: dict[str, str]
) -> None:
    command = [sys.executable, "-m", "sapo_rl.engines.vllm.serve"]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert server.stdout is not None
    core = psutil.Process(int(server.stdout.readline()))
    server.send_signal(number)
    _, said = server.communicate(timeout=120)
    assert (server.returncode, said) == (-number, "")
    _, alive = psutil.wait_procs([core], timeout=60)
    assert not alive


def test_a_server_under_nohup_stays_when_its_terminal_goes(environment: dict[str, str]) -> None:
    command = ["nohup", sys.executable, "-m", "sapo_rl.engines.vllm.serve"]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert server.stdout is not None
    server.stdout.readline()
    server.send_signal(signal.SIGHUP)
    time.sleep(1.0)
    server.send_signal(signal.SIGTERM)
    server.communicate(timeout=120)
    assert server.returncode == -signal.SIGTERM
