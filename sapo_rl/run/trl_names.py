"""What TRL, transformers and peft call some keys."""

from __future__ import annotations

from sapo_rl.run.other_notes import (
    CHOICE,
    COMPLETIONS,
    EPOCH,
    IN_MEMORY,
    KERNELS,
    LONGEST,
    MODEL,
    NO_ENTROPY,
    NO_TRACES,
    PACKED,
    RANK_0,
    SCHEDULE,
    SERVERS,
    SHOWN,
    STEPS,
    TEXT,
    TOKENS,
    WARMUP,
    WHOLE,
    shared,
)

TRL: dict[str, tuple[str, str]] = {
    "model_name_or_path": ("model.path", ""),
    "torch_dtype": ("model.dtype", ""),
    "num_generations": ("rollout.group_size", ""),
    "num_generations_eval": ("eval.samples", ""),
    "generation_batch_size": ("rollout.batch_size", COMPLETIONS),
    "steps_per_generation": ("trainer.updates_per_rollout", "it counts optimiser updates, not micro-batches"),
    "num_iterations": ("trainer.updates_per_rollout", "num_iterations x trainer.mini_batches"),
    "per_device_train_batch_size": ("trainer.tokens_per_micro_batch", f"{TOKENS}; rollout.batch_size is a step's"),
    "per_device_eval_batch_size": ("eval.prompts", "vLLM batches them by itself"),
    "gradient_accumulation_steps": ("trainer.tokens_per_micro_batch", f"{TOKENS}, their number follows"),
    "max_completion_length": ("rollout.max_completion_tokens", ""),
    "max_prompt_length": ("data.max_prompt_tokens", "longer prompts are left out, not cut"),
    "shuffle_dataset": ("data.shuffle", ""),
    "dataset_name": ("data.path", ""),
    "dataset_config": ("data.subset", ""),
    "dataset_config_name": ("data.subset", ""),
    "dataset_train_split": ("data.split", ""),
    "dataset_test_split": ("data.eval_split", ""),
    "chat_template_kwargs": ("data.chat_template_args", ""),
    "reward_funcs": ("reward.functions", ""),
    "reward_weights": ("reward.functions", "each function has its weight"),
    "beta": ("loss.kl.coef", ""),
    "epsilon": ("loss.clip_low", ""),
    "epsilon_high": ("loss.clip_high", ""),
    "delta": ("loss.dual_clip", ""),
    "loss_type": ("loss.name", "loss.loss_agg_mode for the aggregation of dapo and dr_grpo"),
    "sapo_temperature_pos": ("loss.tau_pos", ""),
    "sapo_temperature_neg": ("loss.tau_neg", ""),
    "importance_sampling_level": ("loss.ratio_level", ""),
    "vllm_importance_sampling_correction": ("loss.correction.mode", ""),
    "vllm_importance_sampling_mode": ("loss.correction.mode", ""),
    "vllm_importance_sampling_clip_max": ("loss.correction.high", ""),
    "vllm_importance_sampling_clip_min": ("loss.correction.low", ""),
    "scale_rewards": ("advantage.scale", ""),
    "multi_objective_aggregation": ("advantage.combine", ""),
    "mask_truncated_completions": ("advantage.mask_truncated", ""),
    "vllm_mode": ("rollout.servers", "none: vLLM beside the trainer"),
    "vllm_server_base_url": ("rollout.servers", SERVERS),
    "vllm_server_host": ("rollout.servers", SERVERS),
    "vllm_server_port": ("rollout.servers", SERVERS),
    "vllm_server_timeout": ("rollout.timeout", ""),
    "vllm_gpu_memory_utilization": ("rollout.gpu_memory_utilization", ""),
    "vllm_tensor_parallel_size": ("rollout.tensor_parallel", ""),
    "vllm_enable_sleep_mode": ("rollout.sleep", ""),
    "lr": ("trainer.learning_rate", ""),
    "lr_scheduler_type": ("trainer.schedule", ""),
    "warmup_steps": ("trainer.warmup_updates", ""),
    "warmup_ratio": ("trainer.warmup_updates", WARMUP),
    "adam_beta1": ("trainer.betas", "both in a list"),
    "adam_beta2": ("trainer.betas", "both in a list"),
    "adam_epsilon": ("trainer.adam_eps", ""),
    "torch_compile": ("trainer.compile", ""),
    "max_steps": ("trainer.steps", STEPS),
    "num_train_epochs": ("trainer.steps", EPOCH),
    "save_steps": ("checkpoint.every", ""),
    "save_strategy": ("checkpoint.every", "in steps"),
    "save_total_limit": ("checkpoint.keep_last", ""),
    "metric_for_best_model": ("checkpoint.keep_best", "e.g. eval/reward"),
    "eval_steps": ("eval.every", ""),
    "eval_strategy": ("eval.every", "in steps"),
    "resume_from_checkpoint": ("resume", "a run folder"),
    "report_to": ("logging.trackers", "a list"),
    "run_name": ("logging.name", ""),
    "log_completions": ("logging.completions", ""),
    "num_completions_to_print": ("logging.completions", ""),
    "data_seed": ("seed", ""),
    "full_determinism": ("reproducible", ""),
    "ddp_timeout": ("launch.timeout", ""),
    "use_peft": ("model.lora.rank", "above 0"),
    "peft_config": ("model.lora", ""),
    "lora": ("model.lora", ""),
    "lora_r": ("model.lora.rank", ""),
    "r": ("model.lora.rank", ""),
    "lora_target_modules": ("model.lora.target_modules", ""),
    "max_tool_calling_iterations": ("environment.max_turns", "it counts replies"),
    "off_policy_mask_threshold": ("loss.correction.stale_negative_kl", ""),
    "vllm_importance_sampling_cap": ("loss.correction.high", ""),
    "use_cpu": ("launch.profile", "a machine without a GPU trains on the CPU"),
} | shared(
    {
        ("checkpoint.keep_best", "the metric by name; where it is highest is best, checkpoints/best leads there"): (
            "load_best_model_at_end greater_is_better"
        ),
        ("loss.name", "loss=vespo has the paper's k and lambda"): (
            "vespo_k_pos vespo_k_neg vespo_lambda_pos vespo_lambda_neg"
        ),
        ("model.dtype", "bfloat16 or float32"): "bf16 fp16 bf16_full_eval fp16_full_eval",
        ("trainer.optimizer", "adamw or adamw_8bit"): "optim",
        ("trainer.schedule", SCHEDULE): "lr_scheduler_kwargs",
        ("trainer.gradient_checkpointing", "true or false"): "gradient_checkpointing_kwargs",
        ("trainer.compile", "true or false"): "torch_compile_backend torch_compile_mode",
        ("trainer.tokens_per_micro_batch", "set it, the gradient does not depend on it"): "auto_find_batch_size",
        ("launch.profile", CHOICE): "deepspeed fsdp fsdp_config accelerator_config parallelism_config",
        ("", "DDP and its process group have torch's settings; launch.timeout is theirs"): (
            "ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph"
        ),
        ("launch.num_processes", "each finds its own rank"): "local_rank",
        ("logging.console", ""): "disable_tqdm log_level log_level_replica",
        ("logging.trackers", "trackio is one, on this machine"): (
            "trackio_space_id trackio_bucket_id trackio_static_space_id"
        ),
        ("eval.every", "every run with held-out prompts evaluates before its first step"): "eval_on_start eval_delay",
        ("data.sampling", "uniform or pass_rate; samples are packed, whatever their lengths"): (
            "train_sampling_strategy length_column_name"
        ),
        ("", "sapo-export RUN --push USER/NAME sends a model to the hub, once it is trained"): (
            "push_to_hub hub_model_id hub_private_repo hub_strategy hub_always_push hub_revision"
        ),
        ("", "log in with hf auth login, or set HF_TOKEN"): "hub_token",
        ("", "sapo-train trains and evaluates, sapo-eval evaluates"): "do_train do_eval do_predict",
        ("", "evaluations write completions and judge them with the reward functions"): """
            prediction_loss_only label_names include_for_metrics batch_eval_metrics eval_do_concat_batches
            eval_use_gather_object eval_accumulation_steps""",
        ("", "it is for supervised training"): "label_smoothing_factor neftune_noise_alpha",
        ("", "the loss is normalised over the whole batch of an update, of all processes"): (
            "average_tokens_across_devices"
        ),
        ("", "all weights get one learning rate, and AdamW's betas, eps and decay are keys of trainer"): (
            "optim_args optim_target_modules"
        ),
        ("", "the policy computes in model.dtype"): "tf32",
        ("", KERNELS): "use_liger_kernel liger_kernel_config",
        ("", "freed memory is given back where vLLM needs it"): "torch_empty_cache_steps",
        ("", WHOLE): "save_only_model enable_jit_checkpoint",
        ("", "a resume goes on with the very next prompts"): "ignore_data_skip restore_callback_states_from_checkpoint",
        ("", RANK_0): "save_on_each_node log_on_each_node",
        ("", IN_MEMORY): """
            dataloader_num_workers dataloader_drop_last dataloader_pin_memory dataloader_persistent_workers
            dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order""",
        ("", "every step is logged"): """
            logging_steps logging_strategy logging_first_step logging_nan_inf_filter include_num_input_tokens_seen""",
        ("", NO_TRACES): "debug skip_memory_metrics",
        ("", "vLLM writes all rollouts"): "use_vllm",
        ("", "vLLM writes all rollouts, with continuous batching"): """
            use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged
            cache_implementation use_cache""",
        ("", LONGEST): "vllm_max_model_length",
        ("", "vLLM takes its own implementation of the model where it has one"): "vllm_model_impl",
        ("", "what the model writes is not constrained"): "vllm_structured_outputs_regex",
        ("", "the trainer opens a free port, and tells the servers"): "vllm_group_port",
        ("", PACKED): "pad_to_multiple_of",
        ("", "rollout has temperature, top_p, top_k, min_p and repetition_penalty"): "generation_kwargs",
        ("", MODEL): "model_init_kwargs",
        ("", "the loss has no term for balance between experts"): "router_aux_loss_coef",
        ("", "dropout is always off"): "disable_dropout",
        ("", "log-probabilities are taken in float32 from logits in model.dtype"): "cast_lm_head_to_fp32",
        ("", "vLLM holds weights of its own"): "ds3_gather_for_generation",
        ("", "the reference is the model that training started from"): (
            "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps"
        ),
        ("", NO_ENTROPY): """
            entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target""",
        ("", "no tokens are left out by entropy"): "top_entropy_quantile",
        ("", "the penalty is added after any correction, without a ratio"): "use_bias_correction_kl",
        ("", TEXT): "log_multimodal",
        ("", SHOWN): "log_unique_prompts",
        ("", "completions stay in the run folder"): "log_completions_hub_repo",
        ("", "run_dir; without it runs go to runs/<recipe>/<time> below the current folder"): "output_dir",
        ("", "every run has a folder of its own"): "overwrite_output_dir",
        ("", "logs go into the run folder"): "logging_dir",
        ("", "all columns go to reward functions"): "remove_unused_columns",
        ("", "adapters have no dropout"): "lora_dropout",
        ("", "it follows from model and device"): "attn_implementation",
    }
)
"""Our key for a name of TRL's GRPOConfig, of what it inherits or of peft, and what is to be heeded.

Where there is no key the first is empty, and the second says what holds instead.
"""
