"""Is a config possible? Rules on single fields, then rules that span several; no torch, no model, no network."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

from sapo_rl import plugins
from sapo_rl.config import ENVIRONMENT, Config, EnvironmentConfig
from sapo_rl.config.engine import VLLM
from sapo_rl.config.fields import BOUNDS
from sapo_rl.config.logging import TRACKERS
from sapo_rl.config.loss import CHOSEN_KEYS, unread
from sapo_rl.errors import UserError, did_you_mean
from sapo_rl.errors.files import reading
from sapo_rl.policy import model_folder
from sapo_rl.run import packaged
from sapo_rl.run.config_error import ConfigError, under
from sapo_rl.run.eval_checks import check_evaluation
from sapo_rl.run.policy_checks import check_lora, check_lora_sync, check_optimizer
from sapo_rl.run.sampling_checks import check_checks, check_replay, check_sampling

LARGEST = 2**31 - 1
"""Bound on integers without one of their own: libraries hold counts in 32 bits."""


def check(config: Config, training: bool = True) -> None:
    """Refuse a config that cannot run; where nothing is to be trained, rules on that are left out.

    Raises:
        ConfigError: naming the first key that is out of range, unknown or at odds with another.
    """
    for key, value, metadata in _fields(config):
        with reading(key):
            _check_field(key, value, metadata)
    for section, rule in RULES.items():
        if training or rule not in OF_TRAINING:
            with reading(section):
                rule(config)


def _fields(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for field in dataclasses.fields(node):
        value, key = getattr(node, field.name), f"{prefix}{field.name}"
        children = value.items() if isinstance(value, dict) else [("", value)]
        for name, child in children:
            child_key = f"{key}.{name}" if name else key
            if dataclasses.is_dataclass(child):
                yield from _fields(child, f"{child_key}.")
            elif not name:
                yield child_key, child, field.metadata


def _check_field(key: str, value: Any, metadata: Any) -> None:
    options, own = metadata.get("choices"), metadata.get("own")
    if options and value is None:
        return
    if own and "." in value:
        with under(key):
            plugins.check(own, value)
    elif options and value not in options:
        if value == "False" and "off" in options:
            raise ConfigError(key, 'without quotes, YAML reads off as false; write "off"')
        path = "\n  your own is a dotted path such as my_module.MyClass" if own else ""
        raise ConfigError(key, f"unknown value '{value}'; {did_you_mean(str(value), options)}{path}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(key, f"is {value}; must be a finite number")
    for name, (words, holds) in BOUNDS.items():
        bound = metadata.get(name)
        if bound is None and name == "most" and isinstance(value, int):
            bound = LARGEST
        if bound is not None and value is not None and not holds(value, bound):
            raise ConfigError(key, f"is {value}; must be {words} {bound}")


def _check_launch(config: Config) -> None:
    launch = config.launch
    from sapo_rl.run.launch import SINGLE, profile_path

    if "RANK" in os.environ:  # the processes are there already, as many as they are
        return
    if launch.profile == SINGLE:
        if launch.num_processes > 1:
            raise ConfigError("launch.num_processes", f"is {launch.num_processes}, with launch=single; set launch=ddp")
        return
    with under("launch.profile"):
        profile_path(launch.profile)
    if launch.num_processes % launch.num_machines or launch.num_processes == 1:
        raise ConfigError(
            "launch.num_processes",
            f"is {launch.num_processes}, for launch.num_machines = {launch.num_machines} and all machines together; "
            f"e.g. {8 * launch.num_machines} with 8 GPUs on each",
        )
    if launch.num_machines > 1 and launch.main_process_ip is None:
        raise ConfigError("launch.main_process_ip", "must be given: the address of machine 0")
    if launch.machine_rank >= launch.num_machines:
        raise ConfigError(
            "launch.machine_rank",
            f"is {launch.machine_rank}; must be below launch.num_machines = {launch.num_machines}",
        )


def _check_fork(config: Config) -> None:
    if config.step is not None and not config.fork:
        raise ConfigError("step", f"is {config.step}; goes with fork=RUN, a run folder that has such a checkpoint")


def _check_batch(config: Config) -> None:
    rollout, trainer = config.rollout, config.trainer
    if rollout.batch_size % rollout.group_size:
        near = max(1, round(rollout.batch_size / rollout.group_size)) * rollout.group_size
        raise ConfigError(
            "rollout.batch_size",
            f"is {rollout.batch_size}, which rollout.group_size = {rollout.group_size} does not divide; e.g. {near}",
        )
    prompts = rollout.batch_size // rollout.group_size
    parts = trainer.updates_per_rollout if trainer.mini_batches is None else trainer.mini_batches
    key = "trainer.updates_per_rollout" if trainer.mini_batches is None else "trainer.mini_batches"
    if parts < 1 or trainer.updates_per_rollout % parts:
        raise ConfigError(
            "trainer.mini_batches",
            f"is {parts}; must divide trainer.updates_per_rollout = {trainer.updates_per_rollout}",
        )
    if prompts % (parts * config.launch.num_processes):
        raise ConfigError(
            key,
            f"cuts a step's {prompts} prompts into {parts} part(s) on {config.launch.num_processes} process(es); "
            "rollout.batch_size / rollout.group_size must be a multiple of that",
        )
    if len(trainer.betas) != 2 or not all(0 <= beta < 1 for beta in trainer.betas):
        raise ConfigError("trainer.betas", f"is {trainer.betas}; must be two numbers from 0 to below 1")


def _check_tensor_parallel(config: Config) -> None:
    rollout, launch = config.rollout, config.launch
    if rollout.tensor_parallel == 1 or rollout.servers:
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", launch.num_processes // launch.num_machines))
    if ranks % rollout.tensor_parallel:
        raise ConfigError(
            "rollout.tensor_parallel",
            f"is {rollout.tensor_parallel}, which does not divide the {ranks} rank(s) of a machine; "
            f"e.g. launch=fsdp2 launch.num_processes={rollout.tensor_parallel * launch.num_machines}",
        )
    if rollout.transport == "ipc":
        raise ConfigError("rollout.transport", "'ipc' does not reach the GPUs of other ranks; set auto or file")


def _check_engine(config: Config) -> None:
    rollout, engine = config.rollout, config.rollout.engine
    if engine.name == VLLM and engine.args:
        raise ConfigError("rollout.engine.args", f"are for an engine of your own; '{VLLM}' is set up by rollout's keys")
    if engine.name != VLLM and rollout.servers:
        raise ConfigError("rollout.engine.name", f"'{engine.name}' writes beside the trainer, not on rollout.servers")
    if engine.name != VLLM and rollout.transport != "auto":
        raise ConfigError(
            "rollout.transport", f"'{rollout.transport}' is for vLLM; '{engine.name}' brings its own: set auto"
        )


def _check_servers(config: Config) -> None:
    rollout = config.rollout
    for address in rollout.servers:
        host, colon, port = address.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
            raise ConfigError("rollout.servers", f"'{address}' is no address; valid: host:port, e.g. 127.0.0.1:8000")
    if len(set(rollout.servers)) < len(rollout.servers):
        raise ConfigError("rollout.servers", f"names a server twice: {', '.join(rollout.servers)}")
    if rollout.servers and rollout.transport not in ("auto", "nccl"):
        raise ConfigError(
            "rollout.transport", f"'{rollout.transport}' does not reach rollout.servers; set auto or nccl"
        )
    if rollout.servers and rollout.sleep not in ("auto", "0"):
        raise ConfigError("rollout.sleep", f"is {rollout.sleep}; rollout.servers never sleep: set auto or 0")
    if rollout.transport == "nccl" and not rollout.servers:
        raise ConfigError("rollout.transport", "'nccl' is for rollout.servers, and none is given; set auto")


def _check_loss_settings(config: Config) -> None:
    """Refuse what the loss would not read, where it is not as by default."""
    name = config.loss.name
    for key, default in unread(name).items():
        value = getattr(config.loss, key)
        if value != default:
            own = ", ".join(f"loss.{one}" for one in sorted(CHOSEN_KEYS) if name in CHOSEN_KEYS[one])
            settings = f"{name} has {own}" if own else f"{name} has no settings of its own"
            users = ", ".join(filter(None, CHOSEN_KEYS[key])) or "a loss of your own"
            raise ConfigError(f"loss.{key}", f"is {value}; {name} does not use it, {users} would; {settings}")


def _check_advantage(config: Config) -> None:
    advantage = config.advantage
    if advantage.args and "." not in advantage.name:
        problem = f"is {advantage.args}; {advantage.name} does not use it, it is for a function of your own"
        raise ConfigError("advantage.args", problem)


def _check_loss(config: Config) -> None:
    loss = config.loss
    if loss.name == "sapo" and loss.strict_temperatures and loss.tau_neg < loss.tau_pos:
        raise ConfigError(
            "loss.tau_neg",
            f"is {loss.tau_neg}, below loss.tau_pos = {loss.tau_pos}, which the paper found unstable; "
            "raise it, or set loss.strict_temperatures=false",
        )
    if loss.name == "sapo" and loss.sides == "one" and loss.gradient != "paper":
        raise ConfigError("loss.sides", f"'one' needs loss.gradient=paper, which is {loss.gradient}")
    if loss.name == "sapo" and loss.sides == "both" and loss.dual_clip is not None:
        raise ConfigError(
            "loss.dual_clip", "is for loss.sides=one (or loss=grpo); SAPO's gate bounds both sides itself"
        )
    for key, bound in (("tau_target_kl", 0), ("dual_clip", 1), ("loss_agg_norm", 0)):
        value = getattr(loss, key)
        if value is not None and value <= bound:
            raise ConfigError(f"loss.{key}", f"is {value}; must be above {bound}, or null")
    if loss.tau_target_kl is not None and (loss.name != "sapo" or loss.gradient != "paper"):
        wanted = f"loss.name=sapo and loss.gradient=paper; they are {loss.name} and {loss.gradient}"
        raise ConfigError("loss.tau_target_kl", f"needs {wanted}")
    correction = loss.correction
    if correction.mode != "none" and not config.rollout.logprobs:
        raise ConfigError("loss.correction.mode", f"'{correction.mode}' needs rollout.logprobs=true")
    if loss.old_logps == "rollout" and not config.rollout.logprobs:
        raise ConfigError("loss.old_logps", "'rollout' needs rollout.logprobs=true")
    if loss.old_logps == "decoupled" and correction.mode == "none":
        raise ConfigError("loss.old_logps", "'decoupled' needs a loss.correction.mode, e.g. token_truncate")
    if correction.low >= correction.high:
        raise ConfigError(
            "loss.correction.low", f"is {correction.low}; must be below loss.correction.high = {correction.high}"
        )


def _check_trackers(config: Config) -> None:
    logging = config.logging
    for name in logging.trackers:
        if "." in name:
            with under("logging.trackers"):
                plugins.check("tracker", name)
        elif name not in TRACKERS:
            path = "\n  your own is a dotted path such as my_module.MyTracker"
            raise ConfigError("logging.trackers", f"unknown tracker '{name}'; {did_you_mean(name, TRACKERS)}{path}")
        elif (spec := plugins.find_spec(name)) is None or spec.origin is None:
            raise ConfigError("logging.trackers", f"{name} is not installed: pip install 'sapo-train[{name}]'")
    if len(set(logging.trackers)) < len(logging.trackers):
        raise ConfigError("logging.trackers", f"names a tracker twice: {', '.join(logging.trackers)}")
    if logging.wandb in ("online", "offline") and "wandb" not in logging.trackers:
        raise ConfigError("logging.wandb", f"is {logging.wandb}, but wandb is not in logging.trackers")


def _check_filters(config: Config) -> None:
    filters, loss = config.rollout.filters, config.loss
    if filters and loss.old_logps == "rollout":
        named = ", ".join(f"rollout.{key}={value:g}" for key, value in filters.items())
        raise ConfigError(
            "loss.old_logps",
            f"'rollout' with {named} takes what vLLM leaves out for a change of the policy; set recompute, or "
            "decoupled with loss.correction.mode=token_truncate",
        )
    if "repetition_penalty" in filters and not loss.correction.by_token:
        raise ConfigError(
            "rollout.repetition_penalty",
            f"is {filters['repetition_penalty']:g}; the trainer scores without it, and probabilities of a token differ "
            "by factors of 10: it needs rollout.logprobs=true and loss.correction.mode=token_truncate",
        )


def _check_sources(config: Config) -> None:
    from sapo_rl.data import check_source
    from sapo_rl.rewards import check_function

    with under("data.source"):
        check_source(config.data)
    functions = config.reward.functions
    if not config.rewards:
        raise ConfigError("reward.functions", "is empty; name at least one, e.g. with reward=numeric")
    for name, function in functions.items():
        with under(f"reward.functions.{name}.function"):
            check_function(name, function)
    for name in config.reward.env:
        if name not in os.environ:
            raise ConfigError("reward.env", f"there is no environment variable '{name}'")
    if not any(function.weight for function in config.rewards.values()):
        raise ConfigError("reward.functions", "every weight is 0: nothing to train on")


def _check_environment(config: Config) -> None:
    from sapo_rl.environments import AGENTS, check_environment, check_tool

    environment = config.environment
    if config.environments:
        for field in dataclasses.fields(environment):
            if (value := getattr(environment, field.name)) != getattr(EnvironmentConfig(), field.name):
                key = f"environment.{field.name}"
                raise ConfigError(key, f"is {value}, and there are environments; set it under each, or leave them out")
    if not config.has_episodes:
        if environment.args:
            raise ConfigError("environment.args", f"is {environment.args}, and environment.name is null")
        return
    for name, one in config.played.items():
        key = f"environments.{name}" if name else "environment"
        with under(f"{key}.name"):
            check_environment(one, key)
    if all(one.name in AGENTS for one in config.played.values()):
        if config.tools:
            raise ConfigError(
                "tools", "are for the model to call by us; an agent (endpoint) offers it tools of its own"
            )
        if config.data.system_prompt is not None:
            raise ConfigError("data.system_prompt", "is for prompts that we word; an agent (endpoint) words its own")
    for path in config.tools:
        with under("tools"):
            check_tool(path)
    if any(one.name for one in config.played.values()) and ENVIRONMENT in config.reward.functions:
        raise ConfigError(f"reward.functions.{ENVIRONMENT}", "is the name of the environment's reward; take another")
    if not config.data.chat_template:
        raise ConfigError("data.chat_template", "is false; an environment or tools need a chat")
    if config.data.response_prefix:
        raise ConfigError("data.response_prefix", "is for one turn; not with an environment or tools")


def check_model(config: Config) -> None:
    """Raise ConfigError for a model that cannot be read, or that is too short for the config's lengths."""
    path = config.model.path
    try:
        folder = None if packaged.missing(path) else model_folder.local_folder(path)
        shape = model_folder.look(folder) if folder else {}
    except UserError as error:
        raise ConfigError("model.path", str(error)) from error
    limit = LARGEST if config.check == "rewards" else shape.get("max_position_embeddings") or LARGEST  # no model runs
    for name, (prompt, follows) in config.lengths.items():
        longest = prompt + follows
        if name and longest > limit:
            raise ConfigError(
                f"eval.sets.{name}",
                f"has prompts of up to {prompt} tokens (data.max_prompt_tokens) and replies of up to {follows}; the "
                f"model's limit is {limit}",
            )
        if longest > limit:
            raise ConfigError(
                _length_key(config, follows),
                f"is {follows}, with data.max_prompt_tokens = {prompt} up to {longest} tokens; the model's limit is "
                f"{limit}",
            )


def _length_key(config: Config, follows: int) -> str:
    """The key that bounds what follows a prompt in training."""
    for name, one in config.played.items():
        if one.max_tokens == follows:
            return f"environments.{name}.max_tokens" if name else "environment.max_tokens"
    return "eval.max_completion_tokens" if follows > config.max_episode_tokens else "rollout.max_completion_tokens"


RULES = {
    "launch": _check_launch,
    "fork, step": _check_fork,
    "rollout, trainer": _check_batch,
    "trainer.optimizer": check_optimizer,
    "rollout.tensor_parallel": _check_tensor_parallel,
    "rollout.engine": _check_engine,
    "rollout.servers": _check_servers,
    "advantage": _check_advantage,
    "loss": _check_loss_settings,
    "loss, rollout": _check_loss,
    "loss, rollout.top_p and others": _check_filters,
    "logging.trackers": _check_trackers,
    "data, reward": _check_sources,
    "environment, environments, tools": _check_environment,
    "data.pass_rate, rollout.refill": check_sampling,
    "rollout.replay": check_replay,
    "check": check_checks,
    "eval": check_evaluation,
    "model.lora": check_lora,
    "model.lora.sync": check_lora_sync,
    "model.path": check_model,
}
"""Rules that span fields, by the keys that they are about."""
OF_TRAINING = (
    _check_batch,
    check_optimizer,
    _check_advantage,
    _check_loss_settings,
    _check_loss,
    _check_filters,
    check_lora_sync,
)
"""Those on how weights are updated."""
