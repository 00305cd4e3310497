"""Bytes of a rank's state: weights, gradients, the optimizer's tensors and the average. Activations come on top."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_flashi2v.config.train import OptimizerArguments
from megatron_flashi2v.training.holdings import Holding

FP32 = 4
"""Bytes of a value."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes that a rank keeps from one iteration to the next.

    Attributes:
        weights: the model's tensors, as the forward pass reads them.
        gradients: always fp32, and whole on every replica.
        optimizer: fp32 weights of those in bf16, and the moments.
        average: the moving average of ``--ema-decay``.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.average


def state_bytes(held: Holding, optimizer: OptimizerArguments, shards: int) -> StateBytes:
    """Count the state of a rank.

    Args:
        held: the rank's part of the model.
        optimizer: which moments there are, and whether there is an average.
        shards: ranks that divide the optimizer's tensors and the average among them; 1 if each holds all.
    """
    in_bf16 = (FP32 * held.parameters - held.weight_bytes) // 2
    moments = 2 if optimizer.optimizer == "adam" else 1 if optimizer.sgd_momentum else 0
    return StateBytes(
        weights=held.weight_bytes,
        gradients=FP32 * held.parameters,
        optimizer=FP32 * (in_bf16 + moments * held.parameters) // shards,
        average=FP32 * held.parameters // shards if optimizer.ema_decay is not None else 0,
    )
