"""megatron-core's data parallelism, optimizer and learning-rate schedule, from our configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
import torch.distributed
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    USING_PYTORCH_OPTIMIZER,
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    ParamPredicate,
    get_megatron_optimizer,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_flashi2v.checkpoint.optimizer_state import unchained
from megatron_flashi2v.config.layout import asked_sharding, is_fully_sharded
from megatron_flashi2v.config.train import OptimizerArguments, ParallelArguments
from megatron_flashi2v.models.block import TransformerBlock
from megatron_flashi2v.models.spec import ModelSpec
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.fully_sharded import FullyShardedStage, flat_local

DataParallelStage: TypeAlias = DistributedDataParallel | FullyShardedStage
"""A stage whose gradients are reduced over replicas and context shards."""


def wrap_data_parallel(
    stages: list[DiffusionTransformer],
    parallel: ParallelArguments,
    before_reduction: Callable[[], None] | None = None,
) -> list[DataParallelStage]:
    """This rank's stages with fp32 gradient buffers that are reduced over replicas, and the schedule's hooks set.

    Args:
        stages: this rank's.
        parallel: whether communication overlaps, and is sharded.
        before_reduction: called when an iteration's gradients are there and about to be reduced.
    """

    def finalize(*arguments: Any, **options: Any) -> None:
        if before_reduction is not None:
            before_reduction()
        finalize_model_grads(*arguments, **options)

    spec = stages[0].spec
    wrap = _fully_sharded if is_fully_sharded(parallel, torch.distributed.get_world_size()) else _replicated
    wrapped = [wrap(stage, parallel, index) for index, stage in enumerate(stages)]
    no_sync = [model.no_sync for model in wrapped]
    spec.megatron.finalize_model_grads_func = finalize
    spec.megatron.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def _replicated(stage: DiffusionTransformer, parallel: ParallelArguments, index: int) -> DataParallelStage:
    """megatron-core's DistributedDataParallel."""
    return DistributedDataParallel(
        config=stage.spec.megatron,
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather and parallel.overlap_grad_reduce,
            use_distributed_optimizer=asked_sharding(parallel) != "no_shard",
            num_distributed_optimizer_instances=parallel.num_distributed_optimizer_instances,
        ),
        module=stage,
        # Later stages of an interleaved schedule are reduced while the first is still running: whole is soon enough.
        disable_bucketing=index > 0,
        pg_collection=stage.spec.groups.collection,
    )


def _fully_sharded(stage: DiffusionTransformer, parallel: ParallelArguments, index: int) -> DataParallelStage:
    del index  # there is no pipeline
    spec = stage.spec
    return FullyShardedStage(stage, TransformerBlock, spec.megatron, spec.groups, parallel, spec.device)


def decays(parameter: nn.Parameter) -> bool:
    """Matrices, convolutions and modulation tables decay; biases and norms do not."""
    return parameter.ndim > 1


def make_optimizer(
    models: list[DataParallelStage], arguments: OptimizerArguments, parallel: ParallelArguments, spec: ModelSpec
) -> MegatronOptimizer:
    """AdamW or SGD behind megatron-core's interface, with fp32 master weights.

    Args:
        models: this rank's wrapped stages.
        arguments: which of the two, and its rates.
        parallel: whether its state is sharded.
        spec: precision and groups.
    """
    no_decay = ParamKey(predicate=ParamPredicate(name="no_decay", fn=lambda parameter: not decays(parameter)))
    overrides: dict[ParamKey, Any] = {}
    if arguments.weight_decay_rules == "matrices":
        overrides[no_decay] = {"wd_mult": 0.0}
    if arguments.optimizer == "adam" and USING_PYTORCH_OPTIMIZER:
        # torch's AdamW in one kernel, as those of Transformer Engine and apex are, which megatron-core prefers.
        overrides[ParamKey(predicate=ParamPredicate(name="all", fn=lambda _: True))] = {"fused": True}
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer=arguments.optimizer,
            lr=arguments.lr,
            min_lr=arguments.min_lr,
            weight_decay=arguments.weight_decay,
            adam_beta1=arguments.adam_beta1,
            adam_beta2=arguments.adam_beta2,
            adam_eps=arguments.adam_eps,
            sgd_momentum=arguments.sgd_momentum,
            clip_grad=0.0,  # TrainingStep.apply clips
            bf16=spec.megatron.bf16,
            params_dtype=spec.dtype,
            use_distributed_optimizer=asked_sharding(parallel) != "no_shard",
            overlap_param_gather=parallel.overlap_param_gather,
        ),
        models,
        config_overrides=overrides,
        use_gloo_process_groups=False,  # megatron-core has none where the groups are arguments
        pg_collection=spec.groups.collection,
    )


def ready_gradients(optimizer: MegatronOptimizer) -> list[Tensor]:
    """The gradients, in fp32, that the next :func:`apply_gradients` applies on this rank."""
    parameters = (parameter for part in unchained(optimizer) for parameter in part.get_parameters())
    gradients = (parameter.grad for parameter in parameters if parameter.grad is not None)
    return [_local(gradient) for gradient in gradients]


def _local(gradient: Tensor) -> Tensor:
    """What this rank holds of a gradient, which is a DTensor where ranks divide it."""
    return flat_local(gradient) if isinstance(gradient, DTensor) else gradient


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer, device: torch.device) -> Tensor:
    """The global L2 norm of the prepared gradients, a scalar in fp32 that stays on the device; collective.

    megatron-core's ``get_grad_norm`` counts the same gradients, but without apex brings each one's norm to the host.

    Args:
        optimizer: whose ``prepare_grads`` was called.
        device: where models live.
    """
    gradients = [_local(grad) for part in unchained(optimizer) for grad in part.get_main_grads_for_grad_norm()]
    square = torch.zeros((), device=device)
    if gradients:  # a stage may have nothing to train
        square = torch.stack(torch._foreach_norm(gradients)).square().sum()
    torch.distributed.all_reduce(square, group=optimizer.get_grad_stats_parallel_group())
    return square.sqrt()


@torch.no_grad()
def apply_gradients(optimizer: MegatronOptimizer) -> None:
    """Update the weights by the prepared gradients, as ``step_with_ready_grads`` does.

    megatron-core copies masters to weights one by one, in hundreds of kernels; here they are copied together.
    """
    for part in unchained(optimizer):
        groups = list(_weights_and_masters(part))
        if not groups:  # weights in fp32 are their own masters
            part.step_with_ready_grads()
            continue
        part.optimizer.step()
        for weights, masters in groups:
            torch._foreach_copy_(weights, masters)
        if isinstance(part, DistributedOptimizer) and not part.ddp_config.overlap_param_gather:
            for model in part.model_chunks:
                model.start_param_sync()


def _weights_and_masters(optimizer: MegatronOptimizer) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield bf16 weights, of the distributed optimizer this rank's stretches of them, and their fp32 masters."""
    if isinstance(optimizer, DistributedOptimizer) and optimizer.ddp_config.use_megatron_fsdp:
        return  # its buffers copy themselves
    if isinstance(optimizer, DistributedOptimizer):
        pairs = zip(optimizer.shard_float16_groups, optimizer.shard_fp32_from_float16_groups, strict=True)
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        pairs = zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True)
    else:
        return
    yield from ((weights, masters) for weights, masters in pairs if weights)


def make_scheduler(
    optimizer: MegatronOptimizer, arguments: OptimizerArguments, train_iters: int, done: int = 0
) -> OptimizerParamScheduler:
    """The learning-rate schedule in iterations, standing after ``done`` of them.

    A function of the iteration and the flags alone, so that a resumed run follows its flags.
    """
    decay_iters = arguments.lr_decay_iters or train_iters
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=arguments.lr,
        min_lr=arguments.min_lr,
        lr_warmup_steps=arguments.lr_warmup_iters,
        lr_decay_steps=max(decay_iters, arguments.lr_warmup_iters + 1),
        lr_decay_style=arguments.lr_decay_style,
        start_wd=arguments.weight_decay,
        end_wd=arguments.weight_decay,
        wd_incr_steps=train_iters,
        wd_incr_style="constant",
    )
    scheduler.step(increment=done)
    return scheduler
