"""A user's recipe and flags: a mistake in them ends in two lines with the key or the file, and no file runs code."""

from __future__ import annotations

import dataclasses
import pickle
import re
from itertools import combinations
from pathlib import Path

import command
import pytest
from inside import sapo_train
from omegaconf import OmegaConf
from tiny import make_stand_in
from transformers import TrainingArguments

from sapo_rl.config.schema import schema
from sapo_rl.errors import UserError, brief
from sapo_rl.errors.files import DEEPEST, parse_json
from sapo_rl.run import compose
from sapo_rl.run.explain import nearest_key
from sapo_rl.run.keys import every_key
from sapo_rl.run.other_names import OPENRLHF, OTHER_NAMES, TRL, VERL, hint

GROUPS = ("data=arithmetic", "reward=numeric", "model.path=model")


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with a model that passes as long as nobody loads it."""
    make_stand_in(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*arguments: str) -> str:
    """What is said of a command line that is refused as it should be."""
    code, _, told = sapo_train(*arguments)
    lines = told.splitlines()
    assert code == 2 and 1 <= len(lines) <= 2 and len(told) < 1600, told
    assert lines[0].startswith("sapo-train: ") and "Traceback" not in told, told
    return told


ANCHORS = "\n".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 9 if n else ['1'] * 9)}]" for n in range(9))
SHAPES = {
    "loss: grpo": ["loss (mine.yaml): is 'grpo'", "{override /loss: grpo}, _self_]", "keys under `loss:`"],
    "launch: ddp": ["launch (mine.yaml): is 'ddp'", "override /launch: ddp"],
    "loss: my_losses.Mine": ["loss (mine.yaml): is 'my_losses.Mine'; write loss: {name: my_losses.Mine}"],
    "model: Qwen/Qwen3-0.6B": ["model (mine.yaml)", "write model: {path: Qwen/Qwen3-0.6B}"],
    "loss: .inf": ["loss (mine.yaml): is inf, must be a mapping"],
    "loss:": ["loss (mine.yaml): is empty"],
    "data: {args: [a]}": ["data.args (mine.yaml): is ['a'], must be a mapping"],
    "reward: {functions: {b: mod.f}}": ["reward.functions.b (mine.yaml): is 'mod.f'; write b: {function: mod.f}"],
    "trainer: {steps: [1]}": ["trainer.steps (mine.yaml): is [1], must be one value"],
    "trainer: {betas: 3}": ["trainer.betas (mine.yaml): is 3, must be a list"],
    "trainer: {betas: [a, b]}": ["trainer.betas[0] (mine.yaml)", "'a'"],
    "trainer: {5: 6}": ["trainer.5 (mine.yaml): no such key"],
    "trainer: {steps: '${nope}'}": ["trainer.steps (mine.yaml): Interpolation key 'nope' not found"],
    "trainer: {steps: '${oc.env:NOPE}'}": ["trainer.steps (mine.yaml)", "NOPE"],
    "trainer: {steps: '${'}": ["trainer.steps (mine.yaml)"],
    "logging: {tags: '${data}'}": ["logging.tags"],
    f"rollout: {{temperature: {'9' * 400}}}": ["rollout.temperature (mine.yaml)", "more than 300 digits"],
    "seed: !!int abc": ["mine.yaml", "abc"],
    "seed: !!bool maybe": ["mine.yaml", "maybe"],
    "a: !!python/object/apply:os.getcwd []": ["mine.yaml:1: no valid YAML", "os.getcwd"],
    "model: &m {path: *m}": ["mine.yaml:1: '*m' stands inside what it refers to"],
    f"a: {'[' * 100}{']' * 100}": ["mine.yaml:1: is nested deeper than 50 levels"],
    ANCHORS: ["mine.yaml: holds more than 100,000 values"],
    "- 1": ["mine.yaml must hold a mapping"],
    "a page of text": ["mine.yaml must hold a mapping"],
    "17": ["mine.yaml must hold a mapping"],
    "a: b: c": ["mine.yaml:1: no valid YAML"],
    "trainer: {}\ntrainer: {}": ["mine.yaml:2: no valid YAML: found duplicate key trainer"],
    "defaults: quickstart": ["mine.yaml: `defaults` is 'quickstart', must be a list"],
    "defaults: [5]": ["mine.yaml: in `defaults`, 5 is neither"],
    "defaults: [{model: a, data: b}]": ["mine.yaml: in `defaults`, {'model': 'a', 'data': 'b'} is neither"],
    "defaults: [mine]": ["mine.yaml: in `defaults`, 'mine' is this file itself"],
    "defaults: [quickstrat]": ["config (mine.yaml): no recipe 'quickstrat'; did you mean 'quickstart'"],
    "defaults: [{override loss: grpo}]": [
        "config (mine.yaml): in `defaults`, no group '/loss'",
        "override /loss: grpo",
    ],
    "defaults: [quickstart, {/loss: m2po}, _self_]": ["loss (mine.yaml): in `defaults`", "`- override /loss: NAME`"],
    "defaults: [/train]": ["mine.yaml: something in it refers to itself"],
    "lora: {rank: 8}": ["lora (mine.yaml): no such key; did you mean model.lora?"],
}


@pytest.mark.parametrize("text", SHAPES)
def test_a_recipe_that_cannot_be_is_named_with_its_key_or_line(workspace: Path, text: str) -> None:
    (workspace / "mine.yaml").write_text(text)
    told = refused("config=mine.yaml", *GROUPS)
    assert all(word in told for word in SHAPES[text]), told


@pytest.mark.parametrize(
    "text",
    [
        "hydra: {callbacks: {x: {_target_: os.mkdir, path: made}}}",
        "hydra: {job_logging: {version: 1, handlers: {x: {(): os.mkdir, path: made}}}}",
        "hydra: {sweeper: {_target_: os.mkdir, path: made}}",
        "hydra: {launcher: {_target_: os.mkdir, path: made}}",
        "hydra: {sweeper: {params: {+hydra.callbacks.x._target_: os.mkdir}}}",
        "hydra: {searchpath: [file:///tmp]}",
        "hydra: null",
        "defaults: [{override /hydra/job_logging: default}]",
        "defaults: [{/loss@hydra.callbacks: sapo}]",
    ],
)
def test_a_recipe_or_run_folder_runs_no_code(workspace: Path, text: str) -> None:
    (workspace / "config.yaml").write_text(text)
    for arguments in (("config=config.yaml",), ("resume=.",)):
        told = refused(*arguments, *GROUPS, "dry_run=true")
        assert "config.yaml" in told and "hydra" in told and "run code" in told
    assert sorted(path.name for path in workspace.iterdir()) == ["config.yaml", "model"]


def test_a_recipe_may_say_what_a_sweep_goes_over(workspace: Path) -> None:
    (workspace / "mine.yaml").write_text("hydra: {mode: MULTIRUN, sweeper: {params: {loss.tau_pos: '0.0,5.0'}}}")
    done = command.sapo_train("config=mine.yaml", *GROUPS, cwd=workspace)
    code, told = done.returncode, done.stderr
    assert code == 2 and ": is 0.0; must be above 0" in told and "below loss.tau_pos = 5.0" in told, told


def test_no_pickle_is_read(workspace: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (Path("touched"),)  # pyright: ignore[reportReturnType]

    (workspace / "config.pickle").write_bytes(pickle.dumps(Evil()))
    told = refused("--experimental-rerun", "config.pickle", "config=quickstart")
    assert "--experimental-rerun" in told and "resume=" in told
    assert not (workspace / "touched").exists()


LONG = "x" * 3000
RECIPE = ("config=quickstart", "model.path=model")
TYPED = {
    "no name": ([*RECIPE, "model=null"], ["model (command line): 'null' is no name; valid: smollm2-135m"]),
    "a number": ([*RECIPE, "model=5"], ["model (command line): '5' is no name"]),
    "a list for a choice": ([*RECIPE, "+loss=[[1]]"], ["loss (command line): '[[1]]' is a list, must be a name"]),
    "a list of one choice": ([*RECIPE, "loss=[m2po]"], ["loss (command line): '[m2po]' is a list", "'m2po'? valid:"]),
    "numbers for a choice": ([*RECIPE, "reward=1,2"], ["reward (command line): '1,2' is no name"]),
    "a reference for a choice": ([*RECIPE, "logging=${oc.env:NOPE}"], ["logging (command line): '${oc.env:NOPE}'"]),
    "no key": ([*RECIPE, "+=1"], ["'+=1' (command line): there is no key"]),
    "text for a function": (
        [*RECIPE, "reward.functions.correct=mod.f"],
        ["reward.functions.correct (command line)", "reward.functions.correct.function=..."],
    ),
    "text for a new function": (
        [*RECIPE, "++reward.functions.b=x"],
        ["reward.functions.b (command line): is a str", "reward.functions.b.function=..."],
    ),
    "no home": (["config=~nosuch/x.yaml"], ["config: no file '~nosuch/x.yaml'"]),
    "no home to resume": (["resume=~nosuch"], ["resume: '~nosuch' is no run folder"]),
    "a file that begins with ~": (["config=~there.yaml"], ["trainer.steps (~there.yaml)"]),
    "long recipe": ([f"config={LONG}.yaml"], ["config: no file", "characters) ..."]),
    "long run folder": ([f"resume={LONG}"], ["resume: ", "is no run folder"]),
    "long data": ([*RECIPE, "data.source=file", f"data.path={LONG}.jsonl"], ["data.path (command line)", ".jsonl'"]),
    "long module": ([*RECIPE, f"loss.name=a.{LONG}"], ["loss.name (command line)", "there is no module 'a'"]),
    "long value": ([*RECIPE, f"loss.name={LONG}"], ["loss.name (command line)", "characters) ...", "dotted path"]),
    "a NUL": (["config=a\0b.yaml"], ["config: no file 'a\\x00b.yaml'"]),
    "a loop of links": (["config=loop.yaml"], ["config: no file 'loop.yaml'"]),
    "no reference": ([*RECIPE, "trainer.steps=${nope}"], ["trainer.steps (command line)", "'nope' not found"]),
    "400 digits": ([*RECIPE, f"rollout.temperature={'9' * 400}"], ["rollout.temperature (command line)"]),
    "a sweep without -m": ([*RECIPE, "loss.tau_neg=1.0,1.05"], ["add -m to sweep", "loss.tau_neg=[1.0,1.05]"]),
    "no launcher": ([*RECIPE, "hydra/launcher=joblib"], ["pip install hydra-joblib-launcher"]),
    "a sweeper as a value": (
        [*RECIPE, "-m", "hydra.sweeper=x"],
        ["hydra.sweeper (command line)", "hydra/sweeper=NAME"],
    ),
    "no profile": (
        [*RECIPE, "launch.profile=bad.yaml", "launch.num_processes=2"],
        ["launch.profile (command line)", "bad.yaml"],
    ),
    "resolve": ([*RECIPE, "--resolve"], ["--resolve: goes with --cfg"]),
    "a section alone": ([*RECIPE, "-p", "loss"], ["--package: goes with --cfg"]),
    "no section": ([*RECIPE, "--cfg", "job", "-p", "los"], ["--package: no section 'los'; did you mean 'loss'?"]),
    "no more flags": ([*RECIPE, "--", "-p", "x"], ["'--' (command line): leave it out"]),
    "no folder of one's own": ([*RECIPE, "--config-dir", "nope"], ["--config-dir: no folder 'nope'"]),
    "two modes": ([*RECIPE, "--run", "-m"], ["--run and --multirun"]),
    "a sweep that is shown": ([*RECIPE, "-m", "--cfg", "job"], ["--multirun and --cfg"]),
    "no shell": (["-sc", "nope"], ["--shell-completion: takes install="]),
    "Hydra's name for it": (["-cn", "quickstart"], ["write config=quickstart"]),
    "another folder": (["-cp", "x", *RECIPE], ["--config-path", "--config-dir"]),
}


@pytest.mark.parametrize("case", TYPED)
def test_odd_arguments_are_told_in_two_lines(workspace: Path, case: str) -> None:
    (workspace / "loop.yaml").symlink_to("loop.yaml")
    (workspace / "~there.yaml").write_text("trainer: {steps: many}")
    (workspace / "bad.yaml").write_bytes(b"distributed_type: \xff")
    arguments, words = TYPED[case]
    told = refused(*arguments)
    assert all(word in told for word in words), told


def test_recipes_in_a_folder_of_groups_go_by_their_names(workspace: Path) -> None:
    for name, text in {"config/mybase": "trainer: {steps: 7}", "loss/mine": "name: grpo"}.items():
        (workspace / name).parent.mkdir()
        (workspace / f"{name}.yaml").write_text(text)
    code, told, _ = sapo_train("config=mybase", "loss=mine", "--config-dir", ".", "--cfg", "job")
    assert code == 0 and "steps: 7" in told and "name: grpo" in told
    (workspace / "config/mybase.yaml").write_text("hydra: {callbacks: {x: {_target_: os.system}}}")
    assert "can run code" in refused("config=mybase", "--config-dir", ".")
    (workspace / "config/mybase.yaml").write_text("defaults: [other]")
    (workspace / "config/other.yaml").write_text("defaults: [mybase]")
    assert "config/mybase.yaml: something in it refers to itself" in refused("config=mybase", "--config-dir", ".")


def test_the_page_of_flags_is_shown_beside_a_recipe() -> None:
    code, told, _ = sapo_train(*RECIPE, "--hydra-help")
    assert code == 0 and "--config-dir" in told


def test_a_name_with_a_dot_in_it_is_found_in_its_file(workspace: Path) -> None:
    (workspace / "mine.yaml").write_text("advantage: {s.ale: 1}")
    assert "advantage.s.ale (mine.yaml): no such key" in refused("config=mine.yaml", "model.path=model")


@pytest.mark.parametrize("wanted", [False, True])
def test_what_nobody_thought_of_is_told_too_and_its_traceback_on_demand(
    monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setitem(compose.check.__globals__["RULES"], "model.path", broken)
    monkeypatch.setenv(compose.FULL_ERROR, "1" if wanted else "0")
    if wanted:
        with pytest.raises(ZeroDivisionError):
            sapo_train(*RECIPE)
    else:
        told = refused(*RECIPE)
        assert "model.path: ZeroDivisionError: by zero" in told and compose.FULL_ERROR in told


def test_a_job_that_fails_in_a_process_of_its_own_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = iter([1, 2, 2, 2, 2])  # the command line's, then the job's, as a launcher such as joblib has it
    monkeypatch.setattr("sapo_rl.run.cli.os.getpid", lambda: next(processes, 2))
    code, _, told = sapo_train(*RECIPE, "trainer.steps=0", "-m")
    assert code == 2 and "trainer.steps (command line): is 0; must be at least 1" in told
    assert "Traceback" not in told and compose.FULL_ERROR not in told


def test_a_failure_of_the_program_itself_is_no_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("sapo_rl.run.cli.run", broken)
    with pytest.raises(ZeroDivisionError):
        sapo_train(*RECIPE)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("data.train_batch_size=8", ["rollout.batch_size", "prompts there", "completions", "rollout.group_size"]),
        ("per_device_train_batch_size=8", ["trainer.tokens_per_micro_batch", "in tokens"]),
        ("trainer.total_epochs=3", ["trainer.steps", "an epoch has"]),
        ("data.max_response_length=64", ["rollout.max_completion_tokens"]),
        ("num_train_epochs=3", ["trainer.steps", "an epoch has"]),
        ("trainer.total_training_steps=9", ["trainer.steps", "updates"]),
        ("actor_rollout_ref.rollout.n=8", ["rollout.group_size"]),
        ("trainer.output_dir=x", ["there is none", "runs/<recipe>/<time>"]),
        ("rollout.n_samples_per_prompt=8", ["rollout.group_size"]),
        ("rollout_batch_size=128", ["rollout.batch_size", "it counts completions: prompts x rollout.group_size"]),
        ("adam_offload=true", ["there is none", "adamw_8bit"]),
        ("push_to_hub=true", ["there is none: sapo-export RUN --push USER/NAME"]),
        ("load_best_model_at_end=true", ["did you mean checkpoint.keep_best?"]),
        (
            "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2",
            ["there is none: there is no context parallelism"],
        ),
        (
            "actor_rollout_ref.rollout.multi_turn.enable=true",
            ["did you mean environment.max_turns?", "has several turns"],
        ),
        ("algorithm.kl_ctrl.type=fixed", ["did you mean loss.kl.coef?", "never in rewards"]),
        ("model.lora.dropot=0.1", ["valid: alpha, rank, sync, target_modules"]),
    ],
)
def test_names_of_other_trainers_are_told_with_their_unit(typed: str, words: list[str]) -> None:
    told = nearest_key(typed.partition("=")[0])
    assert all(word in told for word in words), told
    if typed.startswith(("actor_rollout_ref.rollout.n=", "model.lora", "push_to_hub")):  # one of each depth
        assert f"{typed.partition('=')[0]} (command line): no such key; {told}" in refused(*RECIPE, typed)


def test_every_key_that_is_pointed_to_exists() -> None:
    everything = OmegaConf.to_container(schema())
    for key in filter(None, (key for key, _ in OTHER_NAMES.values())):
        node = everything
        for part in key.split("."):
            assert isinstance(node, dict) and part in node, key
            node = node[part]
    for one, other in combinations((TRL, VERL, OPENRLHF), 2):
        shared = one.keys() & other.keys()
        assert {name: one[name] for name in shared} == {name: other[name] for name in shared}


TRL_1_16 = """
    learning_rate model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout cast_lm_head_to_fp32
    remove_unused_columns num_generations num_generations_eval max_completion_length ds3_gather_for_generation
    shuffle_dataset pad_to_multiple_of generation_batch_size steps_per_generation temperature top_p top_k min_p
    generation_kwargs chat_template_kwargs repetition_penalty cache_implementation use_vllm vllm_mode
    vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url vllm_server_host
    vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length
    vllm_tensor_parallel_size beta num_iterations epsilon delta epsilon_high sapo_temperature_neg
    sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg importance_sampling_level
    reward_weights multi_objective_aggregation scale_rewards loss_type mask_truncated_completions sync_ref_model
    ref_model_mixup_alpha ref_model_sync_steps top_entropy_quantile entropy_coef use_adaptive_entropy
    entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target max_tool_calling_iterations
    vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max
    vllm_importance_sampling_clip_min off_policy_mask_threshold use_bias_correction_kl log_completions
    log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo
    use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged
    vllm_importance_sampling_cap
"""


@pytest.mark.parametrize("name", TRL_1_16.split())
def test_every_setting_of_trls_grpo_config_is_pointed_to_or_said_to_be_missing(name: str) -> None:
    own = {key.name.rpartition(".")[2] for key in every_key()}
    assert name in own or hint(name, []).startswith(("did you mean ", "there is none: "))


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainingArguments)])
def test_every_setting_of_transformers_training_arguments_is_pointed_to_or_said_to_be_missing(name: str) -> None:
    own = {key.name.rpartition(".")[2] for key in every_key()}
    assert name in own or hint(name, []).startswith(("did you mean ", "there is none: "))


VERLS = """
    actor_rollout_ref.model.path .lora_rank .enable_gradient_checkpointing .use_remove_padding .external_lib .use_liger
    .use_fused_kernels .override_config .lora_adapter_path
    actor_rollout_ref.actor.strategy .ppo_mini_batch_size .use_dynamic_bsz .ppo_max_token_len_per_gpu .grad_clip
    .clip_ratio .clip_ratio_low .clip_ratio_high .clip_ratio_c .loss_agg_mode .entropy_coeff .use_kl_loss .kl_loss_coef
    .kl_loss_type .ppo_epochs .shuffle .ulysses_sequence_parallel_size .policy_loss.loss_mode .use_torch_compile
    .policy_loss.clip_cov_ratio .loss_scale_factor .entropy_checkpointing .checkpoint.save_contents .profiler.enable
    actor_rollout_ref.actor.optim.lr .lr_warmup_steps .lr_warmup_steps_ratio .warmup_style .lr_scheduler_type
    .min_lr_ratio .num_cycles .weight_decay .total_training_steps .betas
    actor_rollout_ref.actor.fsdp_config.param_offload .optimizer_offload .offload_policy .fsdp_size
    .reshard_after_forward .wrap_policy.min_num_params
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu
    actor_rollout_ref.rollout.name .mode .temperature .top_k .top_p .prompt_length .response_length .dtype
    .gpu_memory_utilization .ignore_eos .enforce_eager .free_cache_engine .load_format .tensor_model_parallel_size
    .max_num_batched_tokens .max_model_len .max_num_seqs .enable_chunked_prefill .do_sample .n .calculate_log_probs
    .val_kwargs.n .val_kwargs.do_sample .multi_turn.enable .multi_turn.max_assistant_turns .multi_turn.format
    .multi_turn.max_user_turns .multi_turn.tool_config_path .multi_turn.max_tool_response_length
    .multi_turn.interaction_config_path .agent.num_workers .engine_kwargs.vllm.swap_space .data_parallel_size
    data.train_files .val_files .prompt_key .reward_fn_key .max_prompt_length .max_response_length .train_batch_size
    .val_batch_size .shuffle .filter_overlong_prompts .truncation .image_key .video_key .custom_cls.path
    .return_raw_chat .sampler.class_path .apply_chat_template_kwargs .train_max_samples .tokenizer
    reward_model.enable .reward_manager .launch_reward_fn_async .sandbox_fusion.url
    .reward_kwargs.overlong_buffer_cfg.enable custom_reward_function.path custom_reward_function.name
    algorithm.gamma .lam .adv_estimator .norm_adv_by_std_in_grpo .use_kl_in_reward .kl_penalty .kl_ctrl.kl_coef
    .kl_ctrl.type .kl_ctrl.horizon .kl_ctrl.target_kl .filter_groups.enable .filter_groups.metric
    .rollout_correction.rollout_is .rollout_correction.rollout_is_threshold .rollout_correction.rollout_rs
    .rollout_correction.bypass_mode .use_pf_ppo
    trainer.total_epochs .total_training_steps .project_name .experiment_name .logger .log_val_generations
    .rollout_data_dir .nnodes .n_gpus_per_node .save_freq .test_freq .critic_warmup .val_only .val_before_train
    .resume_mode .resume_from_path .default_local_dir .default_hdfs_dir .max_actor_ckpt_to_keep .balance_batch
    .ray_wait_register_center_timeout critic.model.path critic.cliprange_value ray_kwargs.ray_init.num_cpus
    global_profiler.tool
"""


def test_the_common_keys_of_verl_are_pointed_to_or_said_to_be_missing() -> None:
    section, bare = "", []
    own = {key.name for key in every_key()}
    for name in VERLS.split():
        section = section if name.startswith(".") else name.rpartition(".")[0]
        key = f"{section}{name}" if name.startswith(".") else name
        if key not in own and not re.match(r"did you mean [a-z][\w.]*( or |\?)|there is none: ", nearest_key(key)):
            bare.append(key)
    assert bare == []


def test_messages_are_kept_short_and_printable() -> None:
    told = str(UserError("a: " + "b" * 5000 + " end"))
    assert len(told) < 800 and told.startswith("a: bbb") and told.endswith("b end")
    assert re.search(r"\(\d,\d{3} characters\)", told)
    assert brief("first\nsecond\n\nthird\n") == "first ... (1 more lines)\nthird"
    assert brief("\x1b[2J\ud800\tx") == "\\x1b[2J\\ud800\\tx"


def test_json_of_a_user_is_bounded() -> None:
    assert parse_json("[" * DEEPEST + "]" * DEEPEST, "f:1")
    for text in ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "[" * 100_000):
        with pytest.raises(UserError, match="f:1: is nested deeper than 50 levels"):
            parse_json(text, "f:1")
    with pytest.raises(UserError, match=r"f:1: a whole number of more than 4,300 digits"):
        parse_json("9" * 5000, "f:1")
