"""The configuration's schema, what may be set, of which type and in which range: a docstring under each field.

Values live in `configs/`, rules that span fields in `sapo_rl.run.checks`. Nothing heavy is imported to check a config.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from sapo_rl.config.data import DataConfig
from sapo_rl.config.engine import EngineConfig
from sapo_rl.config.evaluation import EvalConfig
from sapo_rl.config.fields import LONGEST_WAIT, MOST_SAMPLES, choice, number
from sapo_rl.config.logging import LoggingConfig
from sapo_rl.config.loss import AdvantageConfig, LossConfig
from sapo_rl.config.model import LoraConfig as LoraConfig
from sapo_rl.config.model import ModelConfig
from sapo_rl.config.refill import RefillConfig, ReplayConfig
from sapo_rl.config.reward import RewardConfig, RewardFunctionConfig

TOOL_PARSERS = (
    "deepseek_v3",
    "deepseek_v31",
    "functiongemma",
    "gemma4",
    "glm45",
    "glm47",
    "hermes",
    "json",
    "llama3_json",
    "mistral",
    "openai",
    "pythonic",
    "qwen3_coder",
)
"""Formats of calls of tools that are read."""

ADAMW_8BIT = "adamw_8bit"

ENVIRONMENT = "environment"
"""The name of the environment's reward beside those of `reward.functions`, and of the column that chooses among
several environments."""


@dataclass
class EnvironmentConfig:
    """What answers the model, so that an episode has several turns; docs/environments.md.

    Example:
        >>> EnvironmentConfig(name="guess", max_turns=6).max_tokens
        2048
    """

    name: Optional[str] = None
    """A built-in (`guess`, `wordle`, `calculator`, `search`, `python`, `endpoint`, `textarena`, `openenv`,
    `verifiers`), or the dotted path of your own class or of a function that makes one; null is one turn."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the class."""
    max_turns: int = number(8, least=1)
    """Replies of the model in an episode."""
    max_tokens: int = number(2048, least=1)
    """Tokens of an episode after its prompt, the model's and the environment's together. One reply is bounded by
    `rollout.max_completion_tokens`."""
    turn_timeout: float = number(30.0, above=0, most=LONGEST_WAIT)
    """Seconds that one call of the environment may take, or an agent between two requests; then its process is
    killed."""
    workers: int = number(4, least=1)
    """Processes with environments, for each rank; each has many episodes under way."""
    on_error: str = choice("raise", "raise", "drop")
    """A failed environment ends the run with its text (`raise`), or its episode leaves its group and is counted
    (`drop`)."""


@dataclass
class RolloutConfig:
    """How vLLM writes completions.

    Example:
        >>> rollout = RolloutConfig(batch_size=512, group_size=8)
        >>> rollout.batch_size // rollout.group_size  # prompts a step
        64
    """

    batch_size: int = number(64, least=2)
    """Completions in one step, all ranks together; a multiple of `group_size`."""
    group_size: int = number(8, least=2, most=MOST_SAMPLES)
    """Completions of one prompt, normalised together."""
    max_completion_tokens: int = number(256, least=1)
    """A completion is cut there and marked truncated."""
    temperature: float = number(1.0, least=0.01, most=2)
    """Sampling temperature, in the range that vLLM takes; log-probabilities are taken at the same temperature."""
    top_p: float = number(1.0, least=1e-6, most=1)
    """Nucleus sampling; 1 is off."""
    top_k: int = number(0, least=0)
    """Sample from the k likeliest tokens; 0 is off."""
    min_p: float = number(0.0, least=0, most=1)
    """Drop tokens less likely than this share of the likeliest; 0 is off."""
    repetition_penalty: float = number(1.0, least=0.01, most=100)
    """Above 1 repeats less; 1 is off. Needs `loss.correction.mode` token_truncate or token_mask."""
    mode: str = choice("auto", "auto", "sync", "overlap")
    """Write and train in turns, or write the next batch while this one trains; `auto` takes `overlap` with `servers`,
    else `sync`."""
    max_staleness: int = number(1, least=0, most=8)
    """With `overlap`: how many weight versions a batch may lag behind the policy that it trains, and so how many
    batches are generated ahead. 0 disables overlap. With `reproducible`: at most 1."""
    logprobs: bool = False
    """Keep vLLM's own log-probabilities of the sampled tokens (costs a third of its speed)."""
    tool_parser: str = choice("auto", "auto", *TOOL_PARSERS)
    """How calls of tools stand in what the model writes, by vLLM's names; `json` is bare or in a fence, `pythonic` too
    (```tool_code). `auto` takes what the chat template speaks of. `check=chat` shows whether calls are read."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    servers: list[str] = field(default_factory=list)
    """Addresses of running `sapo-serve` processes, as host:port; they write in place of engines beside the trainer."""
    transport: str = choice("auto", "auto", "file", "ipc", "nccl")
    """How weights reach vLLM: `file` (files in shared memory), `ipc` (GPU memory) or `nccl` (to `servers` only; gloo on
    the CPU); `auto` takes `nccl` with `servers`, else `ipc` on a GPU."""
    sync_buffer_gb: float = number(0.0, least=0)
    """GPU memory that `ipc` takes, in GiB: a model that does not fit goes through it part by part (docs/scaling.md). 0
    holds a whole copy of the weights."""
    engines_per_gpu: str = choice("auto", "auto", "1", "2", "3", "4")
    """vLLM engines side by side on each GPU: the host's work bounds the decoding of small models, and each engine has a
    process of its own for it. `auto` takes 2 below 1e9 parameters, else 1, and 1 on the CPU."""
    tensor_parallel: int = number(1, least=1)
    """GPUs of one machine over which an engine spreads a model that is too big for one: ranks next to each other share
    an engine, or a server has as many GPUs. Weights go by `file` then."""
    gpu_memory_utilization: float = number(0.35, above=0, most=1)
    """Share of the GPU's memory that all its engines together may take."""
    sleep: str = choice("auto", "auto", "0", "1", "2")
    """While the trainer works, vLLM keeps its memory (0), frees its cache and moves its weights to the host (1), or
    frees both (2); `auto` takes 0 where an estimate says that all fits, else 2, with LoRA 1."""
    max_num_seqs: int = number(256, least=1)
    """Completions that each engine decodes at once."""
    cpu_kv_cache_gb: float = number(1.0, above=0)
    """Memory for the key-value cache where vLLM runs on the CPU, in GiB."""
    enforce_eager: bool = False
    """Run vLLM without CUDA graphs: starts sooner, decodes slower. Always so on the CPU."""
    start_timeout: float = number(600.0, above=0, most=LONGEST_WAIT)
    """Seconds that vLLM may take to start; also, how long a run waits when none of its `servers` answers."""
    refill: RefillConfig = field(default_factory=RefillConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    timeout: float = number(1800.0, above=0, most=LONGEST_WAIT)
    """Seconds that one batch of rollouts, or one push of weights, may take before the engine counts as hung."""
    max_restarts: int = number(2, least=0)
    """How often in a run a dead engine is started anew before the run gives up."""
    verify_every: int = number(10, least=0)
    """Steps between two checks that vLLM runs the trainer's weights; 0 checks never."""

    @property
    def filters(self) -> dict[str, float]:
        """The settings that are on by which vLLM samples from another distribution than the model's."""
        off = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        return {key: value for key, without in off.items() if (value := getattr(self, key)) != without}

    @property
    def overlaps(self) -> bool:
        """Whether the next batch is written while this one trains."""
        return self.max_staleness > 0 and (self.mode == "overlap" or (self.mode == "auto" and bool(self.servers)))


@dataclass
class TrainerConfig:
    """How the policy is updated.

    Example:
        >>> TrainerConfig(steps=60, updates_per_rollout=2, learning_rate=2e-6).updates_per_rollout
        2
    """

    steps: int = number(100, least=1)
    """Rollout batches to train on."""
    updates_per_rollout: int = number(4, least=1)
    """Optimiser updates on each rollout batch."""
    mini_batches: Optional[int] = None
    """Parts into which the rollout batch is cut, one update each, gone through again until all updates are done; null
    takes `updates_per_rollout`, so that each sample is seen once."""
    optimizer: str = choice("adamw", "adamw", ADAMW_8BIT)
    """`adamw` keeps two moments of each weight in float32; `adamw_8bit` in blocks of eight bits, which saves 6 of 16
    bytes a weight, rounds, and needs `pip install 'sapo-train[torchao]'`. Not with weights that are sharded."""
    learning_rate: float = number(1e-6, above=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = number(0.0, least=0)
    """AdamW's weight decay."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's two decay rates."""
    adam_eps: float = number(1e-8, above=0)
    """AdamW's epsilon."""
    schedule: str = choice("constant", "constant", "linear", "cosine")
    """Learning rate after the warm-up."""
    warmup_updates: int = number(0, least=0)
    """Updates over which the learning rate rises from 0."""
    max_grad_norm: float = number(1.0, above=0)
    """Gradients are clipped to this norm."""
    tokens_per_micro_batch: int = number(8192, least=1)
    """Packed tokens in one forward and backward pass; the gradient does not depend on it, memory does."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a quarter slower."""
    compile: bool = True
    """Compile the decoder layers (bfloat16 on a GPU only): faster by far, after up to a minute at the first step."""


@dataclass
class CheckpointConfig:
    """What is kept for a resume, and at the end.

    Example:
        >>> CheckpointConfig(every=20, keep_last=3).save_final
        True
    """

    every: int = number(50, least=0)
    """Steps between two checkpoints; 0 keeps none."""
    keep_last: int = number(2, least=1)
    """Older checkpoints are deleted once a newer one is complete."""
    keep_best: Optional[str] = None
    """A metric of evaluations, e.g. `eval/reward`: the checkpoint of the evaluation where it was highest stays too, and
    `checkpoints/best` leads to it. It is written there and then, whatever `every` is."""
    save_final: bool = True
    """Write the trained model as a Hugging Face folder `final/` at the end."""


@dataclass
class LaunchConfig:
    """On how many processes and machines the run is spread, and how. See docs/scaling.md.

    Example:
        >>> LaunchConfig(profile="fsdp2", num_processes=8).num_machines
        1
    """

    profile: str = "single"
    """`single` is one process. Else settings of Accelerate: `ddp`, `fsdp2`, `zero2`, `zero3`, `multinode`, or the path
    of a file such as `accelerate config` writes. Not used where torchrun or accelerate started the processes."""
    num_processes: int = number(1, least=1)
    """Processes on all machines together, one a GPU, as `accelerate launch` counts them."""
    num_machines: int = number(1, least=1)
    """Machines; the same command runs on each, with its own `machine_rank`."""
    machine_rank: int = number(0, least=0)
    """This machine's number; machine 0 makes the run folder."""
    main_process_ip: Optional[str] = None
    """Address of machine 0, where there are several machines."""
    main_process_port: int = number(29500, least=1, most=65535)
    """Port of machine 0 at which the machines meet."""
    timeout: float = number(1800.0, above=0, most=LONGEST_WAIT)
    """Seconds that processes wait for each other, at the start and in the middle, before the run counts as broken."""


@dataclass
class Config:
    """A whole run.

    Example:
        >>> Config(seed=1, rollout=RolloutConfig(batch_size=512)).rollout.batch_size
        512
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    environments: dict[str, EnvironmentConfig] = field(default_factory=dict)
    """Several, in place of `environment`: each row of the data names its own in the column `environment`. E.g.
    `{easy: {name: guess, args: {high: 9}}, hard: {name: guess}}`."""
    tools: list[str] = field(default_factory=list)
    """Typed functions that the model may call in the middle of an episode, by dotted path: `[my_tools.search]`."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    description: str = ""
    """One line about the recipe, shown by a bare `sapo-train`."""
    seed: int = number(0, least=0, most=2**32 - 1)
    """Seeds data order, sampling and initialisation."""
    reproducible: bool = False
    """Deterministic kernels and a seed for every completion: the same run twice gives the same numbers. Slower."""
    run_dir: Optional[str] = None
    """The run folder, new or empty; in a sweep the parent of its runs' folders. null takes `runs/<recipe>/<time>`."""
    resume: Optional[str] = None
    """A run folder to continue from its last checkpoint, or the folder of a recipe: its newest run. `auto` takes the
    newest run by the same arguments that is not complete, or begins a new one."""
    fork: Optional[str] = None
    """A run folder at one of whose checkpoints a new run begins, with its config and what else is set."""
    step: Optional[int] = number(None, least=1)
    """Step of the checkpoint that `fork` begins at; null takes the last."""
    dry_run: bool = False
    """Print what would happen and stop."""
    check: str = choice("none", "none", "chat", "data", "machine", "rewards")
    """Print how the model's chat template carries a conversation with tools (`chat`), how often the model solves the
    prompts of the data (`data`), what the reward functions say of given completions (`rewards`), or whether a run can
    start on this machine (`machine`), and stop."""

    @property
    def in_flight(self) -> bool:
        """Whether rollouts go on while weights are replaced, so that batches overlap with each other too."""
        return self.rollout.overlaps and not self.reproducible

    @property
    def prefetch(self) -> int:
        """Batches that are begun beyond the one that is trained on."""
        if not self.rollout.overlaps:
            return 0
        return self.rollout.max_staleness if self.in_flight else 1

    @property
    def has_episodes(self) -> bool:
        """Whether an episode may have several turns."""
        return bool(self.played)

    @property
    def has_environment(self) -> bool:
        """Whether an environment is an object of its own that reward functions can look at, not an agent or tools."""
        return any(one.name not in (None, "endpoint") for one in self.played.values())

    @property
    def played(self) -> dict[str, EnvironmentConfig]:
        """What answers the model, by the column `environment`; under "" where it is the same for all rows."""
        alone = {"": self.environment} if self.environment.name is not None or self.tools else {}
        return self.environments or alone

    @property
    def judge(self) -> str:
        """The name of the reward whose mean is `eval/reward`."""
        return self.eval.reward or next(iter(self.rewards), "")

    @property
    def solving(self) -> str:
        """The name of the reward by which a sample counts as solved."""
        return self.data.pass_rate.reward or self.judge

    @property
    def max_episode_tokens(self) -> int:
        """Tokens after a prompt, at most."""
        return max((one.max_tokens for one in self.played.values()), default=self.rollout.max_completion_tokens)

    @property
    def lengths(self) -> dict[str, tuple[int, int]]:
        """Tokens of a prompt and of what follows it, at most: in training under "", and by set of `eval.sets`."""
        data, reply = self.data.max_prompt_tokens, self.eval.max_completion_tokens or 0
        found = {"": (data, max(self.max_episode_tokens, 0 if self.has_episodes else reply))}
        for name, one in self.eval.sets.items():
            reply = one.max_completion_tokens or self.rollout.max_completion_tokens
            follows = self.max_episode_tokens if self.has_episodes else reply
            found[name] = (one.data.max_prompt_tokens or data, follows)
        return found

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens of a prompt, at most, of whatever set."""
        return max(prompt for prompt, _ in self.lengths.values())

    @property
    def max_sequence_tokens(self) -> int:
        """Tokens of a prompt and what follows it, at most."""
        return max(map(sum, self.lengths.values()))

    @property
    def rewards(self) -> dict[str, RewardFunctionConfig]:
        """What an episode is rewarded by: the reward functions, then the environment, with weight 1."""
        named = [one.name for one in self.played.values() if one.name is not None]
        return self.reward.functions | ({ENVIRONMENT: RewardFunctionConfig(named[0])} if named else {})
