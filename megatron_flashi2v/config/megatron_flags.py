"""Flags of Megatron-LM and other trainers that people type by habit, and what each is here; none of the same name."""

from __future__ import annotations

_ARCHITECTURE = "the architecture is Wan's and fixed; --model and the sizes below it are all that there is to choose"
_TOKENS = "the number of tokens follows from the frames and the size of the data"
_TEXT = "`flashi2v prepare` tokenises; with --online-encoding, --tokenizer names the tokenizer"
_FORMAT = "leave it out: checkpoints have one format, safetensors written by all ranks, which any layout loads"
_WEIGHTS_ONLY = "--load-weights megatron:PATH takes weights alone; --load resumes the whole run"
_WHOLE = "leave it out: a checkpoint always holds the whole run"
_WARMUP = "--lr-warmup-iters counts iterations"
_DECAY = "--lr-decay-iters counts iterations"
_FUSED = "leave it out: the fastest kernels that run on the device are chosen, and listed at the start"
_FSDP = "--data-parallel-sharding-strategy optim_grads_params"
_LOSS_SCALE = "leave it out: --bf16 needs no loss scale, and there is no fp16"
_EXPERTS = "leave it out: the model has no experts"
_PRINTED = "leave it out: metrics.jsonl under --save and --tensorboard-dir hold it in every iteration"
_SPLIT = "--pipeline-layer-split names the blocks of every stage"
_ANY_LAYOUT = "leave it out: a checkpoint loads at any layout"

TRAIN = {
    "accumulate_allreduce_grads_in_fp32": "leave it out: gradients are always reduced in fp32",
    "add_qkv_bias": _ARCHITECTURE,
    "apply_layernorm_1p": _ARCHITECTURE,
    "attention_dropout": _ARCHITECTURE,
    "attention_softmax_in_fp32": "leave it out: attention kernels compute the softmax in fp32",
    "auto_detect_ckpt_format": _FORMAT,
    "calculate_per_token_loss": "leave it out: the loss is the mean over all elements of the global batch",
    "check_for_large_grads": "--skip-grad-norm-spike-factor skips such updates",
    "check_for_spiky_loss": "--skip-loss-spike-factor skips such updates",
    "ckpt_assume_constant_structure": _FORMAT,
    "ckpt_format": _FORMAT,
    "ckpt_fully_parallel_load": _FORMAT,
    "ckpt_fully_parallel_save": _FORMAT,
    "ckpt_step": "--load takes a folder SAVE/iter_0000010 too",
    "cp_comm_type": "--context-parallel-algo ulysses, ring or usp",
    "cross_entropy_loss_fusion": "leave it out: the loss is a mean squared error",
    "data_cache_path": "leave it out: prepared data need no cache; --encoding-cache is that of --online-encoding",
    "dataloader_type": "leave it out: every sample is used once in an epoch, in an order that --seed keys",
    "decoder_first_pipeline_num_layers": _SPLIT,
    "decoder_last_pipeline_num_layers": _SPLIT,
    "deterministic_mode": "--deterministic",
    "disable_bias_linear": _ARCHITECTURE,
    "dist_ckpt_format": _FORMAT,
    "dist_ckpt_strictness": _FORMAT,
    "encoder_num_layers": "--num-layers",
    "encoder_seq_length": _TOKENS,
    "end_weight_decay": "--weight-decay is constant",
    "exit_duration_in_mins": "--exit-duration-minutes",
    "exit_signal": "leave it out: SIGTERM and SIGUSR1 save and leave",
    "exit_signal_handler": "leave it out: it is always on; SIGTERM and SIGUSR1 save and leave",
    "expert_model_parallel_size": _EXPERTS,
    "expert_tensor_parallel_size": _EXPERTS,
    "finetune": "--load-weights megatron:PATH starts a new run from the weights of another",
    "fp16": "--bf16; there is no fp16",
    "group_query_attention": _ARCHITECTURE,
    "hidden_dropout": _ARCHITECTURE,
    "hierarchical_context_parallel_sizes": "--context-parallel-algo usp, with --ulysses-degree",
    "hysteresis": _LOSS_SCALE,
    "init_method_std": _ARCHITECTURE,
    "initial_loss_scale": _LOSS_SCALE,
    "kv_channels": "it is --hidden-size over --num-attention-heads",
    "log_num_zeros_in_grad": "--log-norms-interval writes norms of gradients and parameters by part of the model",
    "log_params_norm": "--log-norms-interval writes norms of gradients and parameters by part of the model",
    "log_throughput": _PRINTED,
    "log_timers_to_tensorboard": _PRINTED,
    "log_validation_ppl_to_tensorboard": "--eval-interval writes the loss on --valid-data-path",
    "loss_scale": _LOSS_SCALE,
    "loss_scale_window": _LOSS_SCALE,
    "lr_decay_samples": _DECAY,
    "lr_warmup_fraction": f"{_WARMUP}: the fraction times --lr-decay-iters, or times --train-iters without it",
    "lr_warmup_init": "leave it out: the warm-up starts from 0",
    "lr_warmup_samples": _WARMUP,
    "lr_wsd_decay_iters": _DECAY,
    "lr_wsd_decay_style": "--lr-decay-style constant, linear, cosine or inverse-square-root",
    "make_vocab_size_divisible_by": "leave it out: there is no vocabulary",
    "max_position_embeddings": _TOKENS,
    "merge_file": _TEXT,
    "min_loss_scale": _LOSS_SCALE,
    "moe_grouped_gemm": _EXPERTS,
    "moe_router_topk": _EXPERTS,
    "no_bias_gelu_fusion": _FUSED,
    "no_bias_swiglu_fusion": _FUSED,
    "no_check_for_nan_in_loss_and_grad": "leave it out: an update with a NaN is always skipped; see "
                                         "--max-skipped-updates",
    "no_gradient_accumulation_fusion": _FUSED,
    "no_load_optim": _WEIGHTS_ONLY,
    "no_load_rng": "leave it out: draws are keyed by --seed and the position, so that there is no state to load",
    "no_masked_softmax_fusion": _FUSED,
    "no_rope_fusion": _FUSED,
    "no_save_optim": _WHOLE,
    "no_save_rng": "leave it out: draws are keyed by --seed and the position, so that there is no state to save",
    "norm_epsilon": _ARCHITECTURE,
    "normalization": _ARCHITECTURE,
    "num_experts": _EXPERTS,
    "num_layers_per_virtual_pipeline_stage": "--num-virtual-stages-per-pipeline-rank counts stages, not layers",
    "num_query_groups": _ARCHITECTURE,
    "num_workers": "leave it out: a thread reads ahead; --decode-workers sets those that decode for --online-encoding",
    "pipeline_model_parallel_layout": _SPLIT,
    "position_embedding_type": _ARCHITECTURE,
    "pretrained_checkpoint": "--load-weights megatron:PATH",
    "qk_layernorm": _ARCHITECTURE,
    "rampup_batch_size": "--global-batch-size is constant",
    "recompute_activations": "--recompute-granularity selective",
    "recompute_modules": "--recompute-granularity selective, skip_attention or full",
    "rotary_base": _ARCHITECTURE,
    "rotary_percent": _ARCHITECTURE,
    "save_retain_interval": "--keep-every, with --keep-last",
    "seq_length": _TOKENS,
    "split": "--valid-data-path names data that were prepared apart",
    "squared_relu": _ARCHITECTURE,
    "start_weight_decay": "--weight-decay is constant",
    "swiglu": _ARCHITECTURE,
    "tensorboard_log_interval": _PRINTED,
    "tensorboard_queue_size": _PRINTED,
    "test_data_path": "--valid-data-path",
    "timing_log_level": "--profile writes traces",
    "tokenizer_model": _TEXT,
    "tokenizer_type": _TEXT,
    "train_data_path": "--data-path",
    "train_samples": "--train-iters counts iterations, of --global-batch-size samples each",
    "untie_embeddings_and_output_weights": _ARCHITECTURE,
    "use_checkpoint_args": "leave it out: --model and the sizes must be those of the checkpoint, which is checked",
    "use_checkpoint_opt_param_scheduler": "leave it out: a resumed run keeps its schedule, unless "
                                          "--override-opt-param-scheduler changes it",
    "use_cpu_initialization": "leave it out: initial weights are drawn on the host, so that no layout changes them",
    "use_custom_fsdp": _FSDP,
    "use_dist_ckpt": _FORMAT,
    "use_flash_attn": "--attention-backend auto takes the fastest that is installed; flash_attn_2 insists",
    "use_legacy_models": "leave it out: the model is always built on megatron-core",
    "use_mcore_models": "leave it out: the model is always built on megatron-core",
    "use_megatron_fsdp": _FSDP,
    "use_persistent_ckpt_worker": "--async-save",
    "use_pytorch_profiler": "--profile",
    "use_rotary_position_embeddings": _ARCHITECTURE,
    "use_torch_fsdp2": _FSDP,
    "vocab_file": _TEXT,
    "vocab_size": "leave it out: there is no vocabulary",
    "wandb_entity": "set WANDB_ENTITY beside --wandb-project",
    "wandb_exp_name": "set WANDB_NAME beside --wandb-project",
    "wandb_save_dir": "set WANDB_DIR beside --wandb-project",
    "weight_decay_incr_style": "--weight-decay is constant",
    "yaml_cfg": "--config",
}  # fmt: skip

PREPARE = {
    "append_eod": "leave it out: captions are tokenised as the text encoder expects",
    "input": "--annotations",
    "json_keys": "leave it out: captions stand under `cap` in --annotations",
    "merge_file": "--tokenizer",
    "output_prefix": "--output",
    "partitions": "leave it out: start it under torchrun, and every process does its share",
    "tokenizer_model": "--tokenizer",
    "tokenizer_type": "--tokenizer",
    "vocab_file": "--tokenizer",
    "workers": "--decode-workers; start it under torchrun to use several accelerators",
}

CONVERT = {
    "load_dir": "--from FORMAT PATH",
    "loader": "--from FORMAT PATH",
    "model_type": "leave it out: the source says what it is",
    "save_dir": "--to FORMAT PATH",
    "saver": "--to FORMAT PATH",
    "target_pipeline_parallel_size": _ANY_LAYOUT,
    "target_tensor_parallel_size": _ANY_LAYOUT,
}

_BATCH = "--micro-batch-size counts samples of one device at a time, --global-batch-size those of an update"
_ACCUMULATION = "--global-batch-size, over the replicas times --micro-batch-size, sets the number of microbatches"
_EPOCHS = "--train-iters counts iterations; an epoch has as many as --global-batch-size goes into the samples"
_PRECISION = "--bf16; without it everything is fp32"
_CLIPPING = "--clip-grad"
_INTERVAL = "--save-interval counts iterations"
_WORKERS = "leave it out: start it under torchrun, one process for each device"

OTHER_TRAINERS = {
    "batch_size": _BATCH,
    "ckpt_path": "--load resumes the whole run; --load-weights FORMAT:PATH takes weights alone",
    "checkpointing_steps": _INTERVAL,
    "checkpoints_total_limit": "--keep-last",
    "dataset": "--data-path",
    "epochs": _EPOCHS,
    "gpus": _WORKERS,
    "gradient_accumulation_steps": _ACCUMULATION,
    "gradient_checkpointing": "--recompute-granularity selective or full",
    "instance_data_root": "--data-path",
    "learning_rate": "--lr",
    "lora_checkpoint": "--load-adapter",
    "lora_dropout": "leave it out: adapters have no dropout",
    "lora_r": "--lora-rank",
    "lora_target_modules": "--lora-targets",
    "lr_scheduler": "--lr-decay-style",
    "lr_scheduler_type": "--lr-decay-style",
    "lr_warmup_steps": _WARMUP,
    "max_epochs": _EPOCHS,
    "max_grad_norm": _CLIPPING,
    "max_steps": "--train-iters",
    "max_train_steps": "--train-iters",
    "mixed_precision": _PRECISION,
    "model_name_or_path": "--load-weights FORMAT:PATH",
    "network_alpha": "--lora-alpha",
    "network_dim": "--lora-rank",
    "network_weights": "--load-adapter",
    "num_epochs": _EPOCHS,
    "num_gpus": _WORKERS,
    "num_train_epochs": _EPOCHS,
    "output_dir": "--save",
    "per_device_train_batch_size": _BATCH,
    "precision": _PRECISION,
    "pretrained_model_name_or_path": "--load-weights FORMAT:PATH",
    "rank": "--lora-rank",
    "report_to": "--tensorboard-dir or --wandb-project",
    "resume": "leave it out: a run goes on from the checkpoints under --save; --load names others",
    "resume_from_checkpoint": "leave it out: a run goes on from the checkpoints under --save; --load names others",
    "save_steps": _INTERVAL,
    "save_total_limit": "--keep-last",
    "steps": "--train-iters",
    "target_modules": "--lora-targets",
    "total_steps": "--train-iters",
    "train_batch_size": _BATCH,
    "train_data_dir": "--data-path",
    "warmup_steps": _WARMUP,
}  # fmt: skip
"""Flags of ``train`` as diffusers' scripts, transformers, Lightning and accelerate spell them."""

TABLES = {"train": TRAIN, "prepare": PREPARE, "convert": CONVERT}


def habitual_flag(name: str, command: str) -> str | None:
    """Explain a flag of Megatron-LM or of another trainer.

    Args:
        name: of the flag, with underscores.
        command: ``flashi2v train``, say.

    Returns:
        Whose it is and the replacement, or why there is none, as an error goes on; None for a flag of neither table.
    """
    word = command.split()[-1] if command else ""
    if name in TABLES.get(word, {}):
        return f" (Megatron-LM's); {TABLES[word][name]}"
    if word == "train" and name in OTHER_TRAINERS:
        return f" (other trainers'); {OTHER_TRAINERS[name]}"
    return None
