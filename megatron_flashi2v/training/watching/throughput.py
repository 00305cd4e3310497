"""How fast a run is: samples, tokens and the model's floating-point operations a second, and waiting for data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.models.flops import training_flops
from megatron_flashi2v.models.patches import token_grid
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.runtime.peaks import peak_tflops

GIGA = 1e9
MICROSECONDS = 1e6


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What an iteration did in its time.

    Attributes:
        samples_per_s: of the global batch.
        tokens_per_s: visual tokens of the global batch, without padding.
        tflops: model-defined TFLOP/s of each device (``models/flops.py``: what is recomputed does not count).
        mfu: those over the device's dense bf16 peak; None where it is not known, in fp32 and with FP8.
        data_wait_s: the longest that a replica waited for its samples.
        memory_gb: 10^9 bytes that rank 0's device held at most since the start, on the CPU its resident set.
    """

    samples_per_s: float
    tokens_per_s: float
    tflops: float
    mfu: float | None
    data_wait_s: float
    memory_gb: float


class ThroughputMeter:
    """Figures of iterations from their times.

    Args:
        config: batch size and precision.
        model: dimensions.
        device: asked for its peak and its memory.
        world_size: devices of the run.
    """

    def __init__(self, config: TrainConfig, model: ModelConfig, device: Device, world_size: int) -> None:
        self._model, self._device, self._world_size = model, device, world_size
        self._samples = config.batch.global_batch_size
        plain = config.batch.bf16 and config.runtime.backend.fp8_format is None
        self._peak = peak_tflops(device, torch.bfloat16 if plain else torch.float32)

    def measure(self, latent_shape: tuple[int, int, int], seconds: float, data_wait_s: float) -> Throughput:
        """The figures of one iteration.

        Args:
            latent_shape: latent frames, rows and columns of its samples.
            seconds: its time.
            data_wait_s: of all replicas, the longest.
        """
        tokens = self._samples * math.prod(token_grid(latent_shape, self._model.patch_size))
        tflops = training_flops(self._model, latent_shape, self._samples) / seconds / self._world_size / 1e12
        return Throughput(
            samples_per_s=self._samples / seconds,
            tokens_per_s=tokens / seconds,
            tflops=tflops,
            mfu=None if self._peak is None else tflops / self._peak,
            data_wait_s=data_wait_s,
            memory_gb=self._device.max_memory_allocated() / GIGA,
        )


class PerReplica:
    """A number of each replica, told to all ranks with the counts that travel with the loss.

    One rank of each replica tells it in a place of its own, so that the sum over ranks keeps them apart.
    """

    def __init__(self, groups: Groups) -> None:
        self._replica, self._replicas = groups.dp.rank(), groups.dp.size()
        self._tells = not (groups.tp.rank() or groups.cp.rank() or groups.pp.rank())

    def counts(self, number: int) -> tuple[int, ...]:
        """This rank's entries; summed over all ranks they are the replicas' numbers."""
        mine = number if self._tells else 0
        return tuple(mine if replica == self._replica else 0 for replica in range(self._replicas))
