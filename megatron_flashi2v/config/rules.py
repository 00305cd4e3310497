"""Rules between flags: every layout, batch and length that cannot work is refused before anything is built."""

from __future__ import annotations

import math

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.hccl import parse_buffer_sizes
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.recipe import flat_values
from megatron_flashi2v.config.train import ParallelArguments, TrainConfig


def check_train(config: TrainConfig, model: ModelConfig, world_size: int) -> None:
    """Check everything that needs no data.

    Args:
        config: flags and recipe.
        model: resolved dimensions.
        world_size: processes that were started.

    Raises:
        ConfigError: a rule is broken; the message names the flag, its value and the nearest valid choice.
    """
    _check_positive(config)
    _check_unavailable(config.parallel)
    _check_layout(config.parallel, model, world_size)
    _check_batch(config, world_size)
    _check_numbers(config)
    parse_buffer_sizes(config.parallel.hccl_buffer_sizes)


def data_parallel_size(parallel: ParallelArguments, world_size: int) -> int:
    """Replicas that see different samples."""
    return world_size // model_ranks(parallel)


def model_ranks(parallel: ParallelArguments) -> int:
    """Ranks that one replica of the model takes."""
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )


def num_microbatches(config: TrainConfig, world_size: int) -> int:
    """Microbatches that each replica runs in one iteration."""
    return config.batch.global_batch_size // (
        config.batch.micro_batch_size * data_parallel_size(config.parallel, world_size)
    )


def check_tokens(model: ModelConfig, parallel: ParallelArguments, latent_shape: tuple[int, int, int]) -> None:
    """Check the layout against the data's size.

    Args:
        model: patch and text length.
        parallel: the layout.
        latent_shape: latent frames, rows and columns.

    Raises:
        ConfigError: the latents do not divide into patches, or tokens or text rows not over the ranks.
    """
    if any(side % patch for side, patch in zip(latent_shape, model.patch_size, strict=True)):
        raise ConfigError(
            f"latents of {latent_shape} (frames, rows, columns) do not divide into patches of {model.patch_size}; "
            "prepare the data with another height, width or number of frames"
        )
    if not parallel.sequence_parallel:
        return
    shards = parallel.tensor_model_parallel_size
    tokens = 1
    for side, patch in zip(latent_shape, model.patch_size, strict=True):
        tokens *= side // patch
    for name, count in (("visual tokens", tokens), ("text rows", model.text_length)):
        if count % shards:
            raise ConfigError(
                f"--sequence-parallel shards {count} {name} over --tensor-model-parallel-size {shards}, which must "
                f"divide them; choose {_nearest_divisor(count, shards)}, or leave --sequence-parallel out"
            )


def _check_positive(config: TrainConfig) -> None:
    values = {
        "tensor_model_parallel_size": config.parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": config.parallel.pipeline_model_parallel_size,
        "context_parallel_size": config.parallel.context_parallel_size,
        "micro_batch_size": config.batch.micro_batch_size,
        "global_batch_size": config.batch.global_batch_size,
        "train_iters": config.batch.train_iters,
        "log_interval": config.runtime.log_interval,
        "save_interval": config.checkpoint.save_interval,
        "exit_interval": config.checkpoint.exit_interval,
        "recompute_num_layers": config.recompute.recompute_num_layers,
        "lr_decay_iters": config.optimizer.lr_decay_iters,
    }
    for name, value in values.items():
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def _check_unavailable(parallel: ParallelArguments) -> None:
    if parallel.context_parallel_size > 1:
        raise ConfigError("--context-parallel-size above 1 is not available yet; use tensor or pipeline parallelism")
    if parallel.num_virtual_stages_per_pipeline_rank not in (None, 1):
        raise ConfigError("--num-virtual-stages-per-pipeline-rank above 1 is not available yet; leave it out")


def _check_layout(parallel: ParallelArguments, model: ModelConfig, world_size: int) -> None:
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    for name, count in (("num_attention_heads", model.num_attention_heads),
                        ("ffn_hidden_size", model.ffn_hidden_size)):
        if count % tensor:
            raise ConfigError(
                f"--tensor-model-parallel-size {tensor} must divide {name} {count}; "
                f"choose {_nearest_divisor(count, tensor)}"
            )
    if model.num_layers % pipeline:
        raise ConfigError(
            f"--pipeline-model-parallel-size {pipeline} must divide num_layers {model.num_layers}; "
            f"choose {_nearest_divisor(model.num_layers, pipeline)}"
        )
    ranks = model_ranks(parallel)
    if world_size % ranks:
        raise ConfigError(
            f"{world_size} processes were started, but tensor {tensor} x pipeline {pipeline} x context "
            f"{parallel.context_parallel_size} parallel takes {ranks} for each replica; start a multiple of {ranks}"
        )
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        raise ConfigError("--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce")


def _check_batch(config: TrainConfig, world_size: int) -> None:
    micro, whole = config.batch.micro_batch_size, config.batch.global_batch_size
    replicas = data_parallel_size(config.parallel, world_size)
    if whole % (micro * replicas):
        fits = max(round(whole / (micro * replicas)), 1) * micro * replicas
        raise ConfigError(
            f"--global-batch-size {whole} must be a multiple of --micro-batch-size {micro} x {replicas} data-parallel "
            f"replicas; choose {fits}"
        )


def _check_numbers(config: TrainConfig) -> None:
    data, optimizer = config.data, config.optimizer
    for name, value in flat_values(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be a finite number")
    if not 0.0 <= data.cutoff_ratio_min <= data.cutoff_ratio_max <= 1.0:
        raise ConfigError(
            f"--cutoff-ratio-min {data.cutoff_ratio_min} and --cutoff-ratio-max {data.cutoff_ratio_max} must be in "
            "order within [0, 1]"
        )
    if not 0.0 <= data.text_drop_probability <= 1.0:
        raise ConfigError(f"--text-drop-probability is {data.text_drop_probability}; it must be within [0, 1]")
    if not 0 <= optimizer.lr_warmup_iters < (optimizer.lr_decay_iters or config.batch.train_iters) + 1:
        raise ConfigError(
            f"--lr-warmup-iters is {optimizer.lr_warmup_iters}; it must be at least 0 and at most the decay's "
            f"{optimizer.lr_decay_iters or config.batch.train_iters} iterations"
        )
    positive = {"sigma_shift": data.sigma_shift, "adam_eps": optimizer.adam_eps,
                "distributed_timeout_minutes": config.parallel.distributed_timeout_minutes}
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be more than 0")
    at_least_zero = {"clip_grad": optimizer.clip_grad, "weight_decay": optimizer.weight_decay,
                     "sigma_logit_std": data.sigma_logit_std, "image_noise_log_std": data.image_noise_log_std,
                     "lr": optimizer.lr}
    for name, value in at_least_zero.items():
        if not value >= 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 0")
    if not 0.0 <= optimizer.min_lr <= optimizer.lr:
        raise ConfigError(f"--min-lr {optimizer.min_lr} must be between 0 and --lr {optimizer.lr}")
    for name, value in (("adam_beta1", optimizer.adam_beta1), ("adam_beta2", optimizer.adam_beta2),
                        ("sgd_momentum", optimizer.sgd_momentum)):
        if not 0.0 <= value < 1.0:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 0 and below 1")
    if optimizer.optimizer == "sgd" and config.parallel.use_distributed_optimizer:
        raise ConfigError("--use-distributed-optimizer takes --optimizer adam only (megatron-core's rule)")


def _nearest_divisor(count: int, wanted: int) -> int:
    divisors = [divisor for divisor in range(1, count + 1) if count % divisor == 0]
    return min(divisors, key=lambda divisor: (abs(divisor - wanted), divisor))
