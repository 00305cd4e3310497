"""Layouts: how a model divides over ranks. Every value that an error suggests is one that these rules accept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from megatron_flashi2v.config.bounds import check_bounds
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import ParallelArguments

ShardingStrategy = Literal["no_shard", "optim", "optim_grads", "optim_grads_params"]
FULLY_SHARDED = ("optim_grads", "optim_grads_params")


def check_layout(parallel: ParallelArguments, model: ModelConfig, world_size: int) -> None:
    """Check that a model divides over the ranks, and that there are ranks for whole replicas.

    Raises:
        ConfigError: names the rule and the nearest valid choice.
    """
    check_bounds(parallel)
    _check_tensor(parallel, model)
    stage_layer_counts(parallel, model.num_layers)
    _check_context(parallel, model)
    ranks = model_ranks(parallel)
    if world_size % ranks:
        raise ConfigError(
            f"{world_size} processes were started, but tensor {parallel.tensor_model_parallel_size} x pipeline "
            f"{parallel.pipeline_model_parallel_size} x context {parallel.context_parallel_size} parallel takes "
            f"{ranks} for each replica; start a multiple of {ranks}"
        )
    _check_sharding(parallel, world_size)


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


def asked_sharding(parallel: ParallelArguments) -> ShardingStrategy:
    """What replicas and context shards are to divide among them, if there are any."""
    given = parallel.data_parallel_sharding_strategy
    return given or ("optim" if parallel.use_distributed_optimizer else "no_shard")


def sharding_strategy(parallel: ParallelArguments, world_size: int) -> ShardingStrategy:
    """What the replicas and context shards of a run divide among them.

    Where one rank would have all of it, ``optim`` instead of more: Megatron-FSDP adds up gradients wrongly then.
    """
    asked = asked_sharding(parallel)
    return "optim" if asked in FULLY_SHARDED and sharding_ranks(parallel, world_size) == 1 else asked


def is_fully_sharded(parallel: ParallelArguments, world_size: int) -> bool:
    """Whether gradients are sharded, which Megatron-FSDP does: megatron-core's DistributedDataParallel does not."""
    return sharding_strategy(parallel, world_size) in FULLY_SHARDED


def sharding_ranks(parallel: ParallelArguments, world_size: int) -> int:
    """Ranks that one copy of what is sharded is divided over."""
    if asked_sharding(parallel) == "no_shard":
        return 1
    return _reduced_ranks(parallel, world_size) // parallel.num_distributed_optimizer_instances


def _reduced_ranks(parallel: ParallelArguments, world_size: int) -> int:
    """Ranks whose gradients are reduced together: replicas times context shards."""
    return data_parallel_size(parallel, world_size) * parallel.context_parallel_size


def ulysses_degree(parallel: ParallelArguments) -> int:
    """Context-parallel ranks that trade tokens for heads with one another."""
    whole = parallel.context_parallel_size
    return {"ulysses": whole, "ring": 1, "usp": parallel.ulysses_degree or whole}[parallel.context_parallel_algo]


def ring_degree(parallel: ParallelArguments) -> int:
    """Context-parallel ranks that pass keys and values around, one of each Ulysses group."""
    return parallel.context_parallel_size // ulysses_degree(parallel)


def virtual_stages(parallel: ParallelArguments) -> int:
    """Stages that each pipeline rank holds."""
    return parallel.num_virtual_stages_per_pipeline_rank or 1


def stage_layer_counts(parallel: ParallelArguments, num_layers: int) -> tuple[int, ...]:
    """Blocks of every pipeline stage, in the activation's order.

    Raises:
        ConfigError: more stages than blocks, or a ``pipeline_layer_split`` that does not fit.
    """
    pipeline, virtual = parallel.pipeline_model_parallel_size, virtual_stages(parallel)
    if virtual > 1 and pipeline == 1:
        most = num_layers // virtual
        raise ConfigError(
            f"--num-virtual-stages-per-pipeline-rank {virtual} divides the work of pipeline ranks, but "
            "--pipeline-model-parallel-size is 1; leave it out"
            + (f", or choose {_from_two(most)} pipeline ranks" if most > 1 else "")
        )
    if pipeline * virtual > num_layers:
        kind = "--pipeline-model-parallel-size" if virtual == 1 else (
            "--pipeline-model-parallel-size x --num-virtual-stages-per-pipeline-rank"
        )
        raise ConfigError(
            f"{kind} makes {pipeline * virtual} stages of num_layers {num_layers}, and each needs a block; "
            f"{_fewer_stages(pipeline, virtual, num_layers)}"
        )
    if parallel.pipeline_layer_split is not None:
        return _given_split(parallel.pipeline_layer_split, pipeline * virtual, num_layers)
    return _even_split(pipeline * virtual, num_layers)


def _even_split(stages: int, num_layers: int) -> tuple[int, ...]:
    """Divide the blocks; if they do not divide evenly, the middle stages hold one more than the first and the last one,
    which embed and project. The first is the fullest, so it gets its extra block last."""
    counts = [num_layers // stages] * stages
    by_room = [*range(1, stages - 1), stages - 1, 0]  # the middle stages, then the head's, then the embeddings'
    for stage in by_room[: num_layers % stages]:
        counts[stage] += 1
    return tuple(counts)


def _given_split(split: str, stages: int, num_layers: int) -> tuple[int, ...]:
    problem = f"--pipeline-layer-split {split}"
    fits = ",".join(map(str, _even_split(stages, num_layers)))
    try:
        counts = tuple(int(part) for part in split.split(","))
    except ValueError:
        raise ConfigError(f"{problem} must be whole numbers with commas between, such as {fits}") from None
    if len(counts) != stages:
        raise ConfigError(
            f"{problem} names {len(counts)} stages, but the layout has {stages}; name that many, such as {fits}"
        )
    if min(counts) < 1:
        raise ConfigError(f"{problem} leaves a stage without a block; each needs at least 1, such as {fits}")
    if sum(counts) != num_layers:
        raise ConfigError(
            f"{problem} adds up to {sum(counts)} blocks, but the model has {num_layers}; they must agree, such as "
            f"{fits}"
        )
    return counts


def _fewer_stages(pipeline: int, virtual: int, num_layers: int) -> str:
    """Every single change that leaves each stage a block."""
    if virtual == 1:
        return f"choose at most {num_layers} pipeline ranks"
    ranks, stages = num_layers // virtual, num_layers // pipeline
    cures = [f"choose {_from_two(ranks)} pipeline ranks"] if ranks > 1 else []
    cures += [f"choose {_from_two(stages)} virtual stages"] if stages > 1 else []
    cures += ["leave --num-virtual-stages-per-pipeline-rank out"
              + (f" with at most {num_layers} pipeline ranks" if pipeline > num_layers else "")]
    return ", or ".join(cures)


def _check_tensor(parallel: ParallelArguments, model: ModelConfig) -> None:
    """Suggest one size that divides heads, feed-forward width and text rows, and suits Ulysses' degree if one does."""
    tensor = parallel.tensor_model_parallel_size
    heads = model.num_attention_heads
    common = math.gcd(heads, model.ffn_hidden_size, model.text_length if parallel.sequence_parallel else 0)
    degree = max(1, ulysses_degree(parallel))
    fits = [size for size in _divisors(common) if heads // size % degree == 0] or _divisors(common)
    for name, count in (("num_attention_heads", heads), ("ffn_hidden_size", model.ffn_hidden_size)):
        if count % tensor:
            raise ConfigError(
                f"--tensor-model-parallel-size {tensor} must divide {name} {count}; choose {_nearest(fits, tensor)}"
            )
    if parallel.sequence_parallel and model.text_length % tensor:
        raise ConfigError(
            f"--sequence-parallel shards text_length {model.text_length} over --tensor-model-parallel-size {tensor}, "
            f"which must divide it; choose {_nearest(fits, tensor)}, or leave --sequence-parallel out"
        )


def _check_context(parallel: ParallelArguments, model: ModelConfig) -> None:
    whole, algo, degree = parallel.context_parallel_size, parallel.context_parallel_algo, parallel.ulysses_degree
    heads = model.num_attention_heads // parallel.tensor_model_parallel_size
    held = f"the {heads} heads of a tensor-parallel rank"
    degrees = _divisors(math.gcd(heads, whole))
    if algo != "usp" and degree is not None:
        raise ConfigError(
            f"--ulysses-degree {degree} belongs to --context-parallel-algo usp, not to {algo}; leave it out"
            + (", or choose usp" if degree in degrees else "")
        )
    if algo == "ulysses" and heads % whole:
        raise ConfigError(
            f"--context-parallel-algo ulysses divides {held} over --context-parallel-size {whole}; choose "
            f"{_nearest(_divisors(heads), whole)}, or --context-parallel-algo ring, or usp with --ulysses-degree "
            f"{degrees[-1]}"
        )
    if algo == "usp" and degree is None:
        raise ConfigError(
            f"--context-parallel-algo usp needs --ulysses-degree, a divisor of --context-parallel-size {whole} and "
            f"of {held}; choose {degrees[-1]}"
        )
    if algo == "usp" and degree is not None and degree not in degrees:
        raise ConfigError(
            f"--ulysses-degree {degree} must divide --context-parallel-size {whole} and {held}; choose "
            f"{_nearest(degrees, degree)}"
        )


def _check_sharding(parallel: ParallelArguments, world_size: int) -> None:
    strategy, instances = asked_sharding(parallel), parallel.num_distributed_optimizer_instances
    pipeline = parallel.pipeline_model_parallel_size
    flag = f"--data-parallel-sharding-strategy {strategy}"
    if strategy in FULLY_SHARDED and pipeline > 1:
        raise ConfigError(
            f"{flag} cannot be combined with --pipeline-model-parallel-size {pipeline}: megatron-core shards over a "
            "mesh of all ranks, which stages are not; choose --pipeline-model-parallel-size 1, or "
            "--data-parallel-sharding-strategy optim"
        )
    if instances > 1 and strategy == "no_shard":
        raise ConfigError(
            f"--num-distributed-optimizer-instances {instances} divides ranks that shard the optimizer's state, and "
            "none do; add --data-parallel-sharding-strategy optim, or leave it out"
        )
    if (ranks := _reduced_ranks(parallel, world_size)) % instances:
        raise ConfigError(
            f"--num-distributed-optimizer-instances {instances} must divide the {ranks} ranks of replicas and context "
            f"shards; choose {_nearest(_divisors(ranks), instances)}"
        )
    if parallel.suggested_communication_unit_size is not None and strategy not in FULLY_SHARDED:
        raise ConfigError(
            f"--suggested-communication-unit-size {parallel.suggested_communication_unit_size} belongs to "
            f"--data-parallel-sharding-strategy optim_grads or optim_grads_params, not to {strategy}; leave it out"
        )
    # Megatron-FSDP always reduces beside the backward pass.
    reduces_early = parallel.overlap_grad_reduce or strategy in FULLY_SHARDED
    if parallel.overlap_param_gather and (strategy == "no_shard" or not reduces_early):
        raise ConfigError(
            "--overlap-param-gather requires --use-distributed-optimizer and --overlap-grad-reduce; add them, or leave "
            "it out"
        )


def _divisors(count: int) -> list[int]:
    return [divisor for divisor in range(1, count + 1) if count % divisor == 0]


def _nearest(choices: Sequence[int], wanted: int) -> int:
    """The nearest choice; the smaller of two that are equally near."""
    return min(choices, key=lambda choice: (abs(choice - wanted), choice))


def _from_two(most: int) -> str:
    return "2" if most == 2 else f"2 to {most}"
