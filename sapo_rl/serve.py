"""`sapo-serve`: vLLM's own server for one recipe, ready to write rollouts and to receive weights."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from sapo_rl import compose
from sapo_rl.config import Config
from sapo_rl.errors import UserError
from sapo_rl.rollout import scratch
from sapo_rl.rollout.child import llm_arguments
from sapo_rl.rollout.engine import EngineSettings
from sapo_rl.rollout.key import VARIABLE, key_file, make_key
from sapo_rl.rollout.local import require_vllm, server_environment

DESCRIPTION = """Serve rollouts to sapo-train config=... rollout.servers=[HOST:PORT,...]. Give the recipe and overrides
that the training gets; model, precision, lengths and limits are taken from it, those of launch are left out."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script; becomes vLLM's server. Exit code 2 means: mend your input."""
    parser = argparse.ArgumentParser("sapo-serve", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--gpu-memory", type=float, default=0.9, metavar="SHARE", help="share of each GPU's memory")
    parser.add_argument("overrides", nargs="*", metavar="config=NAME key=value", help="as for sapo-train")
    options = parser.parse_args(argv)
    ready = compose.Arguments(options.overrides)
    try:
        ready = compose.register(options.overrides)
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(compose.CONFIGS)):
            # Checked as the config of a run with this server: what only engines beside a trainer must heed is left out.
            own = [one for one in ready.argv if not one.startswith(("launch=", "launch."))]
            overrides = [*own, f"rollout.servers=[{options.host}:{options.port}]"]
            config, _ = compose.accept(hydra.compose("train", overrides=overrides), ready)
        settings = engine_settings(config, options)
        environment = server_environment(os.environ, settings.device != "cpu") | {VARIABLE: make_key()}
    except (UserError, HydraException, OmegaConfBaseException) as error:
        print(f"sapo-serve: {compose.explain(error, ready)}", file=sys.stderr)
        sys.exit(2)
    where = f"the variable {VARIABLE}" if os.environ.get(VARIABLE) else str(key_file())
    print(f"sapo-serve: http://{options.host}:{options.port}, API key in {where}", file=sys.stderr, flush=True)
    flags = vllm_flags(settings, options)
    scratch.sweep_all()
    os.execve(sys.executable, [sys.executable, "-m", "sapo_rl.rollout.vllm_serve", *flags], environment)


def engine_settings(config: Config, options: argparse.Namespace) -> EngineSettings:
    """Return the settings of the server's engine: as the trainer's own engines have them, but for the memory.

    Raises:
        UserError: vLLM is not installed.
    """
    require_vllm()
    import torch

    from sapo_rl.rollout.build import longest

    model, rollout = config.model, config.rollout
    return EngineSettings(
        model=model.path,
        dtype=model.dtype,
        max_model_len=longest(config),
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
            "middleware": "sapo_rl.rollout.api.TrainerApi",
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
