"""`sapo-serve`: vLLM's own server for one recipe, ready to write rollouts and to receive weights."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it quietly while the imports below take their time

import hydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from sapo_rl.config import Config
from sapo_rl.config.engine import VLLM
from sapo_rl.engines.base import EngineSettings
from sapo_rl.engines.environment import server_environment
from sapo_rl.engines.key import VARIABLE, key_file, make_key
from sapo_rl.engines.process import require_vllm
from sapo_rl.engines.vllm.child import llm_arguments
from sapo_rl.errors import UserError
from sapo_rl.processes import scratch
from sapo_rl.run import compose, explain, packaged
from sapo_rl.run.checks import check_model

TRAINING, EPISODES = "sapo_rl.engines.vllm.api.TrainerApi", "sapo_rl.run.recording.EpisodesApi"
"""What stands before vLLM's own paths."""
DESCRIPTION = """Serve rollouts to sapo-train config=... rollout.servers=[HOST:PORT,...]. Give the recipe and overrides
that the training gets; model, precision, lengths and limits are taken from it, those of launch are left out."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script; becomes vLLM's server. Exit code 2 means: correct your input."""
    ready = compose.Arguments([])
    try:
        options = parse(argv)
        check_address(options.host, options.port)
        ready = compose.register(options.overrides)
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(compose.CONFIGS)):
            # Checked as the config of a run with this server: what only engines beside a trainer must heed is left out.
            own = [one for one in ready.argv if not one.startswith(("launch=", "launch."))]
            overrides = [*own, f"rollout.servers=[127.0.0.1:{options.port}]"]
            config, text = compose.accept(hydra.compose("train", overrides=overrides), ready, overrides)
        packaged.require(config.model.path)
        config, recording = _recorded(config, text) if options.episodes else (config, {})
        settings = engine_settings(config, options)
        on_gpu, cpus = settings.device != "cpu", len(os.sched_getaffinity(0))
        environment = server_environment(os.environ, on_gpu, cpus, settings.tensor_parallel)
        environment |= {VARIABLE: make_key()} | recording
    except (UserError, HydraException, OmegaConfBaseException) as error:
        print(f"sapo-serve: {explain.explain(error, ready)}", file=sys.stderr)
        sys.exit(2)
    where = f"the variable {VARIABLE}" if VARIABLE in os.environ else str(key_file())
    print(f"sapo-serve: http://{options.host}:{options.port}, API key in {where}", file=sys.stderr, flush=True)
    flags = vllm_flags(settings, options)
    scratch.sweep_all()
    os.execve(sys.executable, [sys.executable, "-m", "sapo_rl.engines.vllm.serve", *flags], environment)


def parser() -> argparse.ArgumentParser:
    """Return what reads the arguments of sapo-serve."""
    found = argparse.ArgumentParser("sapo-serve", description=DESCRIPTION, allow_abbrev=False)
    found.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    found.add_argument("--port", type=_port, default=8000)
    found.add_argument("--gpu-memory", type=_share, default=0.9, metavar="SHARE", help="share of each GPU's memory")
    found.add_argument("--episodes", action="store_true", help="answer agents, and record what they ask and are told")
    found.add_argument("overrides", nargs="*", metavar="config=NAME key=value", help="as for sapo-train")
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options and the overrides of a command line.

    Raises:
        UserError: an unknown option, or a value that cannot be.
    """

    def refuse(message: str) -> NoReturn:
        raise UserError(message)

    reader = parser()
    reader.error = refuse
    return reader.parse_intermixed_args(argv)


def _port(text: str) -> int:
    if not (text.isdecimal() and 0 < int(text) < 65536):
        raise argparse.ArgumentTypeError(f"is '{text}'; must be a whole number from 1 to 65535")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:  # nan is refused too
        raise argparse.ArgumentTypeError(f"is '{text}'; must be a number above 0, at most 1")
    return share


def check_address(host: str, port: int) -> None:
    """Raise UserError where a server could not listen on the address, as vLLM would find out later."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if not host:
        raise UserError("--host is empty; valid: an address of this machine, or 0.0.0.0 for all of them")
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except UnicodeError:
            raise UserError(f"--host {host!r} is no address") from None
        except OSError as error:
            raise UserError(f"--host {host!r} --port {port}: cannot listen there: {error.strerror}") from error


def _recorded(config: Config, text: str) -> tuple[Config, dict[str, str]]:
    """The config of a server that records, and what brings its text there. Raises UserError where it could not."""
    require_vllm()
    from sapo_rl.run.recording import VARIABLE, for_agents, recorder_of

    config = for_agents(config)
    check_model(config)
    recorder_of(config)
    return config, {VARIABLE: text}


def engine_settings(config: Config, options: argparse.Namespace) -> EngineSettings:
    """Return the settings of the server's engine: as the trainer's own engines have them, but for the memory.

    Raises:
        UserError: vLLM is not installed, or the model cannot be loaded as its config describes it.
    """
    if config.rollout.engine.name != VLLM:
        raise UserError(f"rollout.engine.name: '{config.rollout.engine.name}' cannot be served; sapo-serve starts vLLM")
    require_vllm()
    import torch

    from sapo_rl.policy.model import check_shapes, load_tokenizer

    model, rollout = config.model, config.rollout
    load_tokenizer(model)
    check_shapes(model)
    return EngineSettings(
        model=model.path,
        dtype=model.dtype,
        max_model_len=config.max_sequence_tokens,
        max_num_seqs=rollout.max_num_seqs,
        gpu_memory_utilization=options.gpu_memory,
        cpu_kv_cache_gb=rollout.cpu_kv_cache_gb,
        enforce_eager=rollout.enforce_eager,
        stop_token_ids=[],
        seed=(config.seed + options.port) % 2**32,
        device="cuda:0" if torch.cuda.is_available() else "cpu",
        trust_remote_code=model.trust_remote_code,
        revision=model.revision,
        start_timeout=rollout.start_timeout,
        timeout=rollout.timeout,
        max_restarts=0,
        tensor_parallel=rollout.tensor_parallel,
        log_path=Path(os.devnull),
    )


def vllm_flags(settings: EngineSettings, options: argparse.Namespace) -> list[str]:
    """Return the flags of `vllm serve`."""
    arguments = llm_arguments(settings)
    del arguments["skip_tokenizer_init"]  # vLLM's own paths take and give text
    return _flags(
        arguments
        | {
            "host": options.host,
            "port": options.port,
            "middleware": EPISODES if options.episodes else TRAINING,
            "disable_uvicorn_access_log": True,
            "disable_fastapi_docs": True,
        }
    )


def _flags(arguments: dict[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            flags += [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


if __name__ == "__main__":
    main()
