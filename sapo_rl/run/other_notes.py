"""What is to be heeded with several names of other trainers."""

from __future__ import annotations

COMPLETIONS = "it counts completions, of all processes together"
TOKENS = "a micro-batch is counted in tokens"
STEPS = "a step is one rollout batch, with trainer.updates_per_rollout updates"
EPOCH = "in steps: an epoch has rows x rollout.group_size / rollout.batch_size of them"
PROMPTS = "verl counts prompts there, rollout.batch_size counts completions: prompts x rollout.group_size"
SERVERS = "a list of host:port"
NUMBER_OF_PARTS = "the number of parts, not their size: a step's prompts / the size"
WARMUP = "a number of updates, not a share"
OVERLONG = "NAME: {function: length_limit, args: {max_tokens: ..., soft: its len}}"
LONGEST = "it is data.max_prompt_tokens + rollout.max_completion_tokens, or + environment.max_tokens"
FOLDERS = "runs go to runs/<recipe>/<time> below the current folder"
NO_ENTROPY = "there is no entropy bonus"
PREFIX_LEFT = "prompts longer than data.max_prompt_tokens are left out, never cut"
OFFLOAD = "nothing is moved to the host; trainer.optimizer=adamw_8bit or launch=fsdp2 takes less"
PACKED = "samples are packed, not padded"
CHOICE = "launch=fsdp2, zero2 or zero3 on the command line"
NO_CRITIC = "there is no critic: advantages are those of groups"
NO_CONTEXT_PARALLEL = "there is no context parallelism"
TEXT = "prompts are text alone"
WHOLE = "a checkpoint has all that a resume needs; final/ and sapo-export have the model alone"
SHOWN = "completions/ in the run folder has all; logging.completions counts rows of a table"
KERNELS = "layers are compiled, log-probabilities are taken in chunks by kernels of their own"
SCHEDULE = "constant, linear or cosine, the last two down to 0"
KL = "the penalty is in the loss, never in rewards, with a fixed coefficient"
MODEL = "model has dtype, revision and trust_remote_code"
IN_MEMORY = "prompts are tokenized once and stay in memory"
NO_TRACES = "time/ in the metrics has the seconds of each part of a step"
RANK_0 = "rank 0 alone writes"


def shared(groups: dict[tuple[str, str], str]) -> dict[str, tuple[str, str]]:
    """Names, in one string, by the answer that they share, turned round."""
    return {name: answer for answer, names in groups.items() for name in names.split()}
