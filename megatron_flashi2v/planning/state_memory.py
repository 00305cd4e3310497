"""Bytes that a rank keeps between iterations, and what sharding adds while it computes; counted, not measured."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_flashi2v.config.layout import FULLY_SHARDED, sharding_ranks, sharding_strategy
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.parallel.fully_sharded import communication_unit
from megatron_flashi2v.training.holdings import Holding

FP32, BF16 = 4, 2


@dataclass(frozen=True, kw_only=True)
class StateMemory:
    """Bytes on one rank; stretches that ranks divide count as equal, up to the padding of their buckets.

    Attributes:
        weights: in the model's dtypes.
        gradients: fp32 sums over the microbatches.
        optimizer: fp32 copies of the weights and the optimizer's moments.
        average: of ``--ema-decay``.
        in_flight: at most, while it computes: weights that are gathered, gradients that are being reduced.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    in_flight: int

    @property
    def kept(self) -> int:
        """All of it but what is in flight."""
        return self.weights + self.gradients + self.optimizer + self.average


def state_memory(held: Holding, config: TrainConfig, world_size: int) -> StateMemory:
    """What a rank keeps of its part of the model.

    Args:
        held: counted in the run's dtypes.
        config: flags and recipe, checked.
        world_size: processes of the run.
    """
    parallel, optimizer = config.parallel, config.optimizer
    strategy, ranks = sharding_strategy(parallel, world_size), sharding_ranks(parallel, world_size)
    fully = strategy in FULLY_SHARDED
    weights = _bytes(held.parameters, held.bf16_parameters)
    # Under bf16, Megatron-FSDP keeps fp32 copies of what is fp32 already; the other optimizers do not.
    copied = held.trained if fully and config.batch.bf16 else held.bf16_trained
    moments = 2 if optimizer.optimizer == "adam" else int(optimizer.sgd_momentum > 0)
    in_flight = 0
    if fully:
        # One portion is being reduced while the next block's gradients come.
        unit = communication_unit(parallel, held.largest_block) + held.largest_block
        in_flight = FP32 * min(unit, held.parameters)
    if strategy == "optim_grads_params":
        blocks = min(2, sum(len(stage.layers) for stage in held.stages))  # one computes, one is gathered ahead
        in_flight += blocks * _bytes(held.largest_block, held.largest_block_bf16) + held.outside_blocks
    return StateMemory(
        weights=weights // (ranks if strategy == "optim_grads_params" else 1),
        gradients=FP32 * held.trained // (ranks if fully else 1),
        optimizer=FP32 * (copied + moments * held.trained) // ranks,
        average=FP32 * held.trained // ranks if optimizer.ema_decay is not None else 0,
        in_flight=in_flight,
    )


def _bytes(values: int, of_them_bf16: int) -> int:
    return FP32 * values - (FP32 - BF16) * of_them_bf16
