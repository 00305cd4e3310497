"""Rules between flags: every layout, batch and length that cannot work is refused before anything is built."""

from __future__ import annotations

import math

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.hccl import parse_buffer_sizes
from megatron_flashi2v.config.layout import check_layout, data_parallel_size, require_at_least_one, virtual_stages
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.prepare import check_clips, require_given
from megatron_flashi2v.config.recipe import flat_values
from megatron_flashi2v.config.train import (
    SLOW_PHASES,
    FaultArguments,
    OptimizerArguments,
    RecomputeArguments,
    TrainConfig,
)
from megatron_flashi2v.config.watch import check_watch

DEFAULT_HANG_TIMEOUT_S = 600.0


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
    if config.runtime.world_size is not None and not config.runtime.dry_run:
        raise ConfigError(
            f"--world-size is {config.runtime.world_size}, but {world_size} processes were started; it is what "
            "--dry-run plans for: leave it out"
        )
    _check_saving(config)
    check_layout(config.parallel, model, world_size)
    _check_batch(config, world_size)
    _check_recompute(config.recompute)
    _check_fp8(config)
    _check_numbers(config)
    _check_faults(config.faults)
    _check_hang_timeout(config, world_size)
    _check_online_encoding(config)
    check_watch(config.watch, config.checkpoint.save, world_size)
    if config.runtime.use_mindspeed and config.runtime.device != "npu":
        raise ConfigError(
            f"--use-mindspeed adapts megatron-core to NPUs, but --device is {config.runtime.device}; add --device npu, "
            "or leave it out"
        )
    parse_buffer_sizes(config.parallel.hccl_buffer_sizes)
    _ = config.checkpoint.load_weights_source


def num_microbatches(config: TrainConfig, world_size: int) -> int:
    """Microbatches that each replica runs in one iteration."""
    return config.batch.global_batch_size // (
        config.batch.micro_batch_size * data_parallel_size(config.parallel, world_size)
    )


def check_tokens(model: ModelConfig, latent_shape: tuple[int, int, int]) -> None:
    """Check the data's size. Any number of visual tokens fits any layout: they are padded.

    Args:
        model: patch size.
        latent_shape: latent frames, rows and columns.

    Raises:
        ConfigError: the latents do not divide into patches.
    """
    if any(side % patch for side, patch in zip(latent_shape, model.patch_size, strict=True)):
        raise ConfigError(
            f"latents of {latent_shape} (frames, rows, columns) do not divide into patches of {model.patch_size}; "
            "prepare the data with another height, width or number of frames"
        )


def _check_positive(config: TrainConfig) -> None:
    require_at_least_one({
        "micro_batch_size": config.batch.micro_batch_size,
        "global_batch_size": config.batch.global_batch_size,
        "train_iters": config.batch.train_iters,
        "log_interval": config.runtime.log_interval,
        "world_size": config.runtime.world_size,
        "save_interval": config.checkpoint.save_interval,
        "exit_interval": config.checkpoint.exit_interval,
        "keep_last": config.checkpoint.keep_last,
        "keep_every": config.checkpoint.keep_every,
        "recompute_num_layers": config.recompute.recompute_num_layers,
        "lr_decay_iters": config.optimizer.lr_decay_iters,
        "spike_window": config.faults.spike_window,
    })


def _check_saving(config: TrainConfig) -> None:
    checkpoint = config.checkpoint
    if checkpoint.keep_every is not None and checkpoint.keep_last is None:
        raise ConfigError(
            f"--keep-every is {checkpoint.keep_every}, but without --keep-last everything is kept; give --keep-last too"
        )
    decay = config.optimizer.ema_decay
    if decay is not None and not 0 <= decay < 1:
        raise ConfigError(f"--ema-decay is {decay}; it must be at least 0 and less than 1, such as 0.9999")
    minutes = checkpoint.exit_duration_minutes
    if minutes is not None and not minutes > 0:
        raise ConfigError(f"--exit-duration-minutes is {minutes}; it must be more than 0")


def _check_batch(config: TrainConfig, world_size: int) -> None:
    micro, whole = config.batch.micro_batch_size, config.batch.global_batch_size
    replicas = data_parallel_size(config.parallel, world_size)
    pipeline = config.parallel.pipeline_model_parallel_size
    least = pipeline if virtual_stages(config.parallel) > 1 else 1
    if whole % (micro * replicas):
        fits = max(round(whole / (micro * replicas)), least) * micro * replicas
        raise ConfigError(
            f"--global-batch-size {whole} must be a multiple of --micro-batch-size {micro} x {replicas} data-parallel "
            f"replicas; choose {fits}"
        )
    count = whole // (micro * replicas)
    if count < least:
        raise ConfigError(
            f"the interleaved schedule of --num-virtual-stages-per-pipeline-rank needs at least as many microbatches "
            f"as --pipeline-model-parallel-size {pipeline}, but --global-batch-size {whole} makes {count} of "
            f"{micro} on each of {replicas} replicas; choose at least {micro * replicas * pipeline}"
        )


def _check_recompute(recompute: RecomputeArguments) -> None:
    granularity, default = recompute.recompute_granularity, RecomputeArguments()
    if granularity == "full":
        return
    for name in ("recompute_method", "recompute_num_layers"):
        value = getattr(recompute, name)
        if value != getattr(default, name):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag} {value} belongs to --recompute-granularity full, "
                + (f"which is not given; add it, or leave {flag} out" if granularity is None
                   else f"but {granularity} covers every block; leave {flag} out")
                + f" (where a recipe gives it: {flag} {getattr(default, name)})"
            )


def _check_fp8(config: TrainConfig) -> None:
    runtime, granularity = config.runtime, config.recompute.recompute_granularity
    if runtime.fp8_format is None:
        return
    if runtime.transformer_impl != "transformer_engine" or not config.batch.bf16:
        raise ConfigError(
            f"--fp8-format {runtime.fp8_format} needs --transformer-impl transformer_engine and --bf16; add them, or "
            "leave it out"
        )
    if granularity is not None:
        raise ConfigError(
            f"--fp8-format {runtime.fp8_format} cannot be combined with --recompute-granularity {granularity}: the "
            "scales of a recomputed product would be found twice; leave one of them out"
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
                "clip_grad_extreme_norm": optimizer.clip_grad_extreme_norm,
                "distributed_timeout_minutes": config.parallel.distributed_timeout_minutes}
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be more than 0")
    at_least_zero = {"clip_grad": optimizer.clip_grad, "weight_decay": optimizer.weight_decay,
                     "sigma_logit_std": data.sigma_logit_std, "image_noise_log_std": data.image_noise_log_std,
                     "lr": optimizer.lr, "max_bad_samples": data.max_bad_samples,
                     "encoding_cache_mib": data.encoding_cache_mib}
    for name, value in at_least_zero.items():
        if not value >= 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 0")
    if not 0.0 <= optimizer.min_lr <= optimizer.lr:
        raise ConfigError(f"--min-lr {optimizer.min_lr} must be between 0 and --lr {optimizer.lr}")
    for name, value in (("adam_beta1", optimizer.adam_beta1), ("adam_beta2", optimizer.adam_beta2),
                        ("sgd_momentum", optimizer.sgd_momentum),
                        ("clip_grad_ema_decay", optimizer.clip_grad_ema_decay)):
        if not 0.0 <= value < 1.0:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 0 and below 1")
    _check_clipping(optimizer)
    if optimizer.optimizer == "sgd" and config.parallel.use_distributed_optimizer:
        raise ConfigError("--use-distributed-optimizer takes --optimizer adam only (megatron-core's rule)")


def _check_clipping(optimizer: OptimizerArguments) -> None:
    if optimizer.clip_grad_method != "norm" and optimizer.clip_grad == 0:
        raise ConfigError(
            f"--clip-grad is 0, but --clip-grad-method {optimizer.clip_grad_method} starts from it; give it a norm, or "
            "turn clipping off with --clip-grad-method norm"
        )
    if optimizer.clip_grad_rules != "corrected" and optimizer.clip_grad_method != "adaptive-npu":
        raise ConfigError(
            f"--clip-grad-rules {optimizer.clip_grad_rules} belongs to --clip-grad-method adaptive-npu, not to "
            f"{optimizer.clip_grad_method}; leave it out"
        )


def hang_timeout_s(config: TrainConfig, world_size: int) -> float:
    """``--hang-timeout-s``, or its default; 0 watches nothing."""
    given = config.faults.hang_timeout_s
    if given is not None:
        return given
    return min(DEFAULT_HANG_TIMEOUT_S, _longest_hang_timeout_s(config)) if world_size > 1 else 0.0


def _longest_hang_timeout_s(config: TrainConfig) -> float:
    """So that a hang is told, also in a slow phase, before the collectives of the ranks that wait for it fail."""
    return 60 * config.parallel.distributed_timeout_minutes / (SLOW_PHASES + 1)


def _check_hang_timeout(config: TrainConfig, world_size: int) -> None:
    given = config.faults.hang_timeout_s
    if given is not None and given < 0:
        raise ConfigError(f"--hang-timeout-s is {given}; it must be at least 0, which watches nothing")
    longest = _longest_hang_timeout_s(config)
    if given is not None and world_size > 1 and given > longest:
        raise ConfigError(
            f"--hang-timeout-s is {given:g}; it must be at most {longest:g}, a fifth of --distributed-timeout-minutes "
            f"{config.parallel.distributed_timeout_minutes:g}, or collectives fail first: set that to "
            f"{math.ceil(given * (SLOW_PHASES + 1) / 60)} or more"
        )


def _check_faults(faults: FaultArguments) -> None:
    if faults.max_skipped_updates < 0:
        raise ConfigError(
            f"--max-skipped-updates is {faults.max_skipped_updates}; it must be at least 0, which stops at the first"
        )
    for name in ("skip_loss_spike_factor", "skip_grad_norm_spike_factor"):
        factor = getattr(faults, name)
        if factor is not None and not factor > 1:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {factor}; it is compared with the median and must be more than 1, such "
                "as 3; leave it out to skip no spikes"
            )


def _check_online_encoding(config: TrainConfig) -> None:
    if not config.data.online_encoding:
        given = {"annotations": config.encoding.sources.annotations, "encoding_cache": config.data.encoding_cache}
        for name, value in given.items():
            if value is not None:
                raise ConfigError(f"--{name.replace('_', '-')} {value} is of no use without --online-encoding")
        return
    require_given(config.encoding.sources.missing(), "train")
    check_clips(config.encoding)
