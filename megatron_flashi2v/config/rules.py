"""Rules between flags: every layout, batch and length that cannot work is refused before anything is built."""

from __future__ import annotations

import math

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.hccl import parse_buffer_sizes
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.prepare import check_clips, require_given
from megatron_flashi2v.config.recipe import flat_values
from megatron_flashi2v.config.train import (
    SLOW_PHASES,
    FaultArguments,
    OptimizerArguments,
    ParallelArguments,
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


def check_layout(parallel: ParallelArguments, model: ModelConfig, world_size: int) -> None:
    """Check that a model divides over the ranks, and that there are ranks for whole replicas.

    Raises:
        ConfigError: names the rule and the nearest valid choice.
    """
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    for name, count in (("num_attention_heads", model.num_attention_heads),
                        ("ffn_hidden_size", model.ffn_hidden_size)):
        if count % tensor:
            raise ConfigError(
                f"--tensor-model-parallel-size {tensor} must divide {name} {count}; "
                f"choose {_nearest_divisor(count, tensor)}"
            )
    stage_layer_counts(parallel, model.num_layers)
    if parallel.sequence_parallel and model.text_length % tensor:
        raise ConfigError(
            f"--sequence-parallel shards text_length {model.text_length} over --tensor-model-parallel-size {tensor}, "
            f"which must divide it; choose {_nearest_divisor(math.gcd(model.text_length, tensor), tensor)}, or leave "
            "--sequence-parallel out"
        )
    ranks = model_ranks(parallel)
    if world_size % ranks:
        raise ConfigError(
            f"{world_size} processes were started, but tensor {tensor} x pipeline {pipeline} x context "
            f"{parallel.context_parallel_size} parallel takes {ranks} for each replica; start a multiple of {ranks}"
        )
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        raise ConfigError("--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce")
    _check_context(parallel, model)


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


def ulysses_degree(parallel: ParallelArguments) -> int:
    """Context-parallel ranks that trade tokens for heads with one another."""
    whole = parallel.context_parallel_size
    return {"ulysses": whole, "ring": 1, "usp": parallel.ulysses_degree or whole}[parallel.context_parallel_algo]


def ring_degree(parallel: ParallelArguments) -> int:
    """Context-parallel ranks that pass keys and values around, one of each Ulysses group."""
    return parallel.context_parallel_size // ulysses_degree(parallel)


def num_microbatches(config: TrainConfig, world_size: int) -> int:
    """Microbatches that each replica runs in one iteration."""
    return config.batch.global_batch_size // (
        config.batch.micro_batch_size * data_parallel_size(config.parallel, world_size)
    )


def virtual_stages(parallel: ParallelArguments) -> int:
    """Model chunks that each pipeline rank holds."""
    return parallel.num_virtual_stages_per_pipeline_rank or 1


def stage_layer_counts(parallel: ParallelArguments, num_layers: int) -> tuple[int, ...]:
    """Blocks of every pipeline stage, in the activation's order.

    Where the blocks do not divide evenly, the middle stages hold one more than the first and the last one, which
    embed and project; the first is the fullest, so it gets its extra block last.

    Raises:
        ConfigError: more stages than blocks, or a ``pipeline_layer_split`` that does not fit.
    """
    pipeline, virtual = parallel.pipeline_model_parallel_size, virtual_stages(parallel)
    stages = pipeline * virtual
    if virtual > 1 and pipeline == 1:
        raise ConfigError(
            f"--num-virtual-stages-per-pipeline-rank {virtual} divides the work of pipeline ranks, but "
            "--pipeline-model-parallel-size is 1; leave it out, or choose at least 2 pipeline ranks"
        )
    if parallel.pipeline_layer_split is not None:
        return _given_split(parallel.pipeline_layer_split, stages, num_layers)
    if stages > num_layers:
        kind = "--pipeline-model-parallel-size" if virtual == 1 else (
            "--pipeline-model-parallel-size x --num-virtual-stages-per-pipeline-rank"
        )
        raise ConfigError(
            f"{kind} makes {stages} stages of num_layers {num_layers}, and each needs a block; choose at most "
            f"{num_layers // virtual} pipeline ranks"
        )
    counts = [num_layers // stages] * stages
    by_room = [*range(1, stages - 1), stages - 1, 0]  # the middle stages, then the head's, then the embeddings'
    for stage in by_room[: num_layers % stages]:
        counts[stage] += 1
    return tuple(counts)


def _given_split(split: str, stages: int, num_layers: int) -> tuple[int, ...]:
    problem = f"--pipeline-layer-split {split}"
    try:
        counts = tuple(int(part) for part in split.split(","))
    except ValueError:
        raise ConfigError(f"{problem} must be whole numbers with commas between, such as 7,8,8,7") from None
    if len(counts) != stages:
        raise ConfigError(f"{problem} names {len(counts)} stages, but the layout has {stages}; name that many")
    if min(counts) < 1:
        raise ConfigError(f"{problem} leaves a stage without a block; each needs at least 1")
    if sum(counts) != num_layers:
        raise ConfigError(f"{problem} adds up to {sum(counts)} blocks, but the model has {num_layers}; they must agree")
    return counts


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
    values = {
        "tensor_model_parallel_size": config.parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": config.parallel.pipeline_model_parallel_size,
        "context_parallel_size": config.parallel.context_parallel_size,
        "num_virtual_stages_per_pipeline_rank": config.parallel.num_virtual_stages_per_pipeline_rank,
        "micro_batch_size": config.batch.micro_batch_size,
        "global_batch_size": config.batch.global_batch_size,
        "train_iters": config.batch.train_iters,
        "log_interval": config.runtime.log_interval,
        "save_interval": config.checkpoint.save_interval,
        "exit_interval": config.checkpoint.exit_interval,
        "keep_last": config.checkpoint.keep_last,
        "keep_every": config.checkpoint.keep_every,
        "recompute_num_layers": config.recompute.recompute_num_layers,
        "lr_decay_iters": config.optimizer.lr_decay_iters,
        "spike_window": config.faults.spike_window,
    }
    for name, value in values.items():
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


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


def _check_context(parallel: ParallelArguments, model: ModelConfig) -> None:
    whole, algo = parallel.context_parallel_size, parallel.context_parallel_algo
    heads = model.num_attention_heads // parallel.tensor_model_parallel_size
    held = f"the {heads} heads of a tensor-parallel rank"
    if algo != "usp" and parallel.ulysses_degree is not None:
        raise ConfigError(
            f"--ulysses-degree {parallel.ulysses_degree} belongs to --context-parallel-algo usp, not to {algo}; "
            "leave it out, or choose usp"
        )
    if algo == "ulysses" and heads % whole:
        raise ConfigError(
            f"--context-parallel-algo ulysses divides {held} over --context-parallel-size {whole}; choose "
            f"{_nearest_divisor(heads, whole)}, or --context-parallel-algo ring, or usp with --ulysses-degree "
            f"{_nearest_divisor(math.gcd(heads, whole), whole)}"
        )
    if algo == "usp":
        degree, fits = parallel.ulysses_degree, math.gcd(heads, whole)
        if degree is None:
            raise ConfigError(
                f"--context-parallel-algo usp needs --ulysses-degree, a divisor of --context-parallel-size {whole} and "
                f"of {held}; choose {fits}"
            )
        if degree < 1 or fits % degree:
            raise ConfigError(
                f"--ulysses-degree {degree} must divide --context-parallel-size {whole} and {held}; choose "
                f"{_nearest_divisor(fits, degree)}"
            )


def _check_batch(config: TrainConfig, world_size: int) -> None:
    micro, whole = config.batch.micro_batch_size, config.batch.global_batch_size
    replicas = data_parallel_size(config.parallel, world_size)
    if whole % (micro * replicas):
        fits = max(round(whole / (micro * replicas)), 1) * micro * replicas
        raise ConfigError(
            f"--global-batch-size {whole} must be a multiple of --micro-batch-size {micro} x {replicas} data-parallel "
            f"replicas; choose {fits}"
        )
    pipeline, count = config.parallel.pipeline_model_parallel_size, whole // (micro * replicas)
    if virtual_stages(config.parallel) > 1 and count < pipeline:
        raise ConfigError(
            f"the interleaved schedule of --num-virtual-stages-per-pipeline-rank needs at least as many microbatches "
            f"as --pipeline-model-parallel-size {pipeline}, but --global-batch-size {whole} makes {count} of "
            f"{micro} on each of {replicas} replicas; choose at least {micro * replicas * pipeline}"
        )


def _check_recompute(recompute: RecomputeArguments) -> None:
    granularity = recompute.recompute_granularity
    if granularity in ("selective", "skip_attention") and recompute != RecomputeArguments(
        recompute_granularity=granularity
    ):
        raise ConfigError(
            f"--recompute-method and --recompute-num-layers belong to --recompute-granularity full; {granularity} "
            "covers every block: leave them out"
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
        given = {"annotations": config.encoding.annotations, "encoding_cache": config.data.encoding_cache}
        for name, value in given.items():
            if value is not None:
                raise ConfigError(f"--{name.replace('_', '-')} {value} is of no use without --online-encoding")
        return
    require_given(config.encoding, ["annotations", "vae", "text_encoder", "tokenizer"], "train")
    check_clips(config.encoding)


def _nearest_divisor(count: int, wanted: int) -> int:
    divisors = [divisor for divisor in range(1, count + 1) if count % divisor == 0]
    return min(divisors, key=lambda divisor: (abs(divisor - wanted), divisor))
