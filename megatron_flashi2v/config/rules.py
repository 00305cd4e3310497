"""Rules that cross flags: every layout, batch and length that cannot work is refused before anything is built.

What bounds a single flag stands at its field (:mod:`megatron_flashi2v.config.bounds`).
"""

from __future__ import annotations

import math
import re

from megatron_flashi2v.config.bounds import check_bounds
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.fields import spelling
from megatron_flashi2v.config.hccl import parse_buffer_sizes
from megatron_flashi2v.config.layout import (
    FULLY_SHARDED,
    asked_sharding,
    check_layout,
    data_parallel_size,
    virtual_stages,
)
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.prepare import check_clips, require_given
from megatron_flashi2v.config.train import (
    SLOW_PHASES,
    CheckpointArguments,
    OptimizerArguments,
    RecomputeArguments,
    TrainConfig,
)
from megatron_flashi2v.config.watch import check_watch

DEFAULT_HANG_TIMEOUT_S = 600.0


def check_train(config: TrainConfig, model: ModelConfig, world_size: int) -> None:
    """Check the bounds and rules that need no data.

    Args:
        config: flags and recipe.
        model: resolved dimensions.
        world_size: processes that were started.

    Raises:
        ConfigError: a rule is broken; the message names the flag, its value and the nearest valid choice.
    """
    check_bounds(config)
    if config.runtime.world_size is not None and not config.runtime.dry_run:
        raise ConfigError(
            f"--world-size is {config.runtime.world_size}, but {world_size} processes were started; it belongs to "
            "--dry-run: leave it out"
        )
    _check_saving(config.checkpoint)
    check_layout(config.parallel, model, world_size)
    _check_batch(config, world_size)
    _check_recompute(config.recompute)
    _check_fp8(config)
    _check_fully_sharded(config)
    _check_partial(config)
    _check_optimizer(config)
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


def _check_saving(checkpoint: CheckpointArguments) -> None:
    save, load = checkpoint.save, checkpoint.load
    if checkpoint.fresh and save is None:
        raise ConfigError("--fresh sets the --save folder aside, and there is none; give --save, or leave --fresh out")
    if checkpoint.fresh and save is not None and load is not None and load.resolve().is_relative_to(save.resolve()):
        raise ConfigError(
            f"--fresh starts anew, and --load {load} goes on from the same --save folder; give one of them"
        )
    if checkpoint.keep_every is not None and checkpoint.keep_last is None:
        raise ConfigError(
            f"--keep-every is {checkpoint.keep_every}, but without --keep-last everything is kept; give --keep-last too"
        )


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
            flag = spelling(name)
            raise ConfigError(
                f"{flag} {value} belongs to --recompute-granularity full, "
                + (f"which is not given; add it, or leave {flag} out" if granularity is None
                   else f"but {granularity} covers every block; leave {flag} out")
                + f" (where a recipe gives it: {flag} {getattr(default, name)})"
            )


def _check_fp8(config: TrainConfig) -> None:
    backend, granularity = config.runtime.backend, config.recompute.recompute_granularity
    if backend.fp8_format is None:
        return
    if backend.transformer_impl != "transformer_engine" or not config.batch.bf16:
        raise ConfigError(
            f"--fp8-format {backend.fp8_format} needs --transformer-impl transformer_engine and --bf16; add them, or "
            "leave it out"
        )
    if granularity is not None:
        raise ConfigError(
            f"--fp8-format {backend.fp8_format} cannot be combined with --recompute-granularity {granularity}: the "
            "scales of a recomputed product would be found twice; leave one of them out"
        )


def _check_fully_sharded(config: TrainConfig) -> None:
    """Refuse what nobody has run with Megatron-FSDP."""
    strategy, runtime = asked_sharding(config.parallel), config.runtime
    if strategy not in FULLY_SHARDED:
        return
    for name, given in (
        ("--use-mindspeed", runtime.use_mindspeed),
        ("--transformer-impl transformer_engine", runtime.backend.transformer_impl == "transformer_engine"),
    ):
        if given:
            raise ConfigError(
                f"--data-parallel-sharding-strategy {strategy} has not been tried with {name}; leave that out, or "
                "choose --data-parallel-sharding-strategy optim"
            )


def _check_partial(config: TrainConfig) -> None:
    """Rules of a run whose base stays frozen."""
    adapter, strategy = config.adapter, asked_sharding(config.parallel)
    if adapter.lora_rank is None:
        for flag, value in (
            ("--lora-alpha", adapter.lora_alpha), ("--lora-targets", " ".join(adapter.lora_targets)),
            ("--load-adapter", adapter.load_adapter),
        ):
            if value:
                raise ConfigError(f"{flag} {value} belongs to --lora-rank, which is not given; add it, or leave it out")
    if not adapter.is_partial:
        return
    flag = "--train-only" if adapter.lora_rank is None else f"--lora-rank {adapter.lora_rank}"
    if config.checkpoint.load_weights is None:
        raise ConfigError(f"{flag} needs the weights that stay frozen: give them as --load-weights FORMAT:PATH")
    if strategy in FULLY_SHARDED:
        raise ConfigError(
            f"{flag} cannot be combined with --data-parallel-sharding-strategy {strategy}, which divides weights that "
            "are trained; choose --data-parallel-sharding-strategy optim"
        )
    if config.runtime.backend.transformer_impl != "local":
        raise ConfigError(
            f"{flag} needs megatron-core's own linears; leave out --transformer-impl "
            f"{config.runtime.backend.transformer_impl}" + (" and --fp8-format" if config.runtime.backend.fp8_format
                                                            else "")
        )
    if adapter.train_only is not None:
        try:
            re.compile(adapter.train_only)
        except re.error as error:
            raise ConfigError(f"--train-only {adapter.train_only!r} is no regular expression: {error}") from error


def _check_expert(config: TrainConfig) -> None:
    """Rules of a model that trains on a part of the noise levels, and so samples no video alone."""
    data, watch = config.data, config.watch
    if data.sigma_distribution == "logit_normal" and data.sigma_logit_std == 0:
        raise ConfigError(
            "--sigma-logit-std 0 draws one noise level, which no --sigma-min and --sigma-max divide; leave these out"
        )
    for flag, interval in (
        ("--sample-interval", watch.sample_interval), ("--evaluation-interval", watch.evaluation_interval)
    ):
        if interval is not None:
            raise ConfigError(
                f"{flag} {interval} samples from pure noise to none, but --sigma-min {data.sigma_min} and --sigma-max "
                f"{data.sigma_max} train a part of these levels; leave it out, and sample the pair by `flashi2v sample "
                "--low-noise`"
            )


def _check_optimizer(config: TrainConfig) -> None:
    data, optimizer = config.data, config.optimizer
    if data.sigma_min >= data.sigma_max:
        raise ConfigError(f"--sigma-min {data.sigma_min} must be below --sigma-max {data.sigma_max}")
    if (data.sigma_min, data.sigma_max) != (0.0, 1.0):
        _check_expert(config)
    if data.cutoff_ratio_min > data.cutoff_ratio_max:
        raise ConfigError(
            f"--cutoff-ratio-min {data.cutoff_ratio_min} must be at most --cutoff-ratio-max {data.cutoff_ratio_max}"
        )
    longest = optimizer.lr_decay_iters or config.batch.train_iters
    if optimizer.lr_warmup_iters > longest:
        raise ConfigError(
            f"--lr-warmup-iters is {optimizer.lr_warmup_iters}; it must be at most the decay's {longest} iterations"
        )
    if optimizer.min_lr > optimizer.lr:
        raise ConfigError(f"--min-lr {optimizer.min_lr} must be at most --lr {optimizer.lr}")
    _check_clipping(optimizer)
    strategy = asked_sharding(config.parallel)
    if optimizer.optimizer == "sgd" and strategy != "no_shard":
        raise ConfigError(
            f"--data-parallel-sharding-strategy {strategy} (--use-distributed-optimizer is optim) requires --optimizer "
            "adam (megatron-core's rule)"
        )


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
    """The watch must act, also in a slow phase, before the collectives of the ranks that wait fail."""
    return 60 * config.parallel.distributed_timeout_minutes / (SLOW_PHASES + 1)


def _check_hang_timeout(config: TrainConfig, world_size: int) -> None:
    given = config.faults.hang_timeout_s
    longest = _longest_hang_timeout_s(config)
    if given is not None and world_size > 1 and given > longest:
        raise ConfigError(
            f"--hang-timeout-s is {given:g}; it must be at most {longest:g}, a fifth of --distributed-timeout-minutes "
            f"{config.parallel.distributed_timeout_minutes:g}, or collectives fail first: set that to "
            f"{math.ceil(given * (SLOW_PHASES + 1) / 60)} or more"
        )


def _check_online_encoding(config: TrainConfig) -> None:
    if config.data.mock_data and config.data.online_encoding:
        raise ConfigError("--mock-data makes samples up, and --online-encoding encodes videos; give one of them")
    if not config.data.online_encoding:
        given = {"annotations": config.encoding.sources.annotations, "encoding_cache": config.data.encoding_cache}
        for name, value in given.items():
            if value is not None:
                raise ConfigError(f"{spelling(name)} {value} requires --online-encoding")
        return
    require_given(config.encoding.sources.missing(), "train")
    check_clips(config.encoding.clips.wanted)
