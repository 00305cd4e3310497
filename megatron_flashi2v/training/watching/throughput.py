"""How fast a run is: samples, tokens and the model's floating-point operations a second, and waiting for data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import BatchArguments
from megatron_flashi2v.models.flops import training_flops
from megatron_flashi2v.models.patches import token_grid
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.runtime.peaks import peak_tflops
from megatron_flashi2v.training.batch import MicrobatchSource
from megatron_flashi2v.training.watching.observer import Observer, Row

if TYPE_CHECKING:
    from megatron_flashi2v.training.state import TrainState

GIGA = 1e9
MICROSECONDS = 1e6


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Rates of an iteration; the attributes are keys of its row.

    Attributes:
        samples_per_s: of the global batch.
        tokens_per_s: visual tokens of the global batch, without padding.
        tflops: model-defined TFLOP/s of each device (``models/flops.py``: what is recomputed does not count). None
            where weights are frozen: the definition counts the gradients of all.
        mfu: those over the device's dense bf16 peak; None where it is not known, in fp32 and with FP8.
        data_wait_s: the longest that a replica waited for its samples.
        memory_gb: 10^9 bytes that rank 0's device held at most since the start, on the CPU its resident set.
    """

    samples_per_s: float
    tokens_per_s: float
    tflops: float | None
    mfu: float | None
    data_wait_s: float
    memory_gb: float


class ThroughputMeter:
    """Figures of iterations from their times.

    Args:
        batch: its size and precision.
        model: dimensions.
        device: asked for its peak and its memory.
        world_size: devices of the run.
        fp8: whether the blocks' matrix products are in FP8.
        frozen: whether some weights are frozen.
    """

    def __init__(
        self, batch: BatchArguments, model: ModelConfig, device: Device, world_size: int, *, fp8: bool = False,
        frozen: bool = False,
    ) -> None:
        self._model, self._device, self._world_size, self._frozen = model, device, world_size, frozen
        self._samples = batch.global_batch_size
        self._peak = peak_tflops(device, torch.bfloat16 if batch.bf16 and not fp8 else torch.float32)

    def measure(self, latent_shape: tuple[int, int, int], seconds: float, data_wait_s: float) -> Throughput:
        """The figures of one iteration.

        Args:
            latent_shape: latent frames, rows and columns of its samples.
            seconds: its time.
            data_wait_s: of all replicas, the longest.
        """
        tokens = self._samples * math.prod(token_grid(latent_shape, self._model.patch_size))
        tflops = None
        if not self._frozen:
            tflops = training_flops(self._model, latent_shape, self._samples) / seconds / self._world_size / 1e12
        return Throughput(
            samples_per_s=self._samples / seconds,
            tokens_per_s=tokens / seconds,
            tflops=tflops,
            mfu=None if self._peak is None or tflops is None else tflops / self._peak,
            data_wait_s=data_wait_s,
            memory_gb=self._device.max_memory_allocated() / GIGA,
        )


class ThroughputWatch(Observer):
    """Adds :class:`Throughput` to every row.

    Args:
        meter: turns times into figures.
        source: the run's samples, which tells its waits.
        groups: this rank's.
    """

    def __init__(self, meter: ThroughputMeter, source: MicrobatchSource, groups: Groups) -> None:
        self._meter, self._source, self._waits = meter, source, PerReplica(groups)
        self._latent_shape = (0, 0, 0)
        self._wait_s = 0.0

    def before_iteration(self, state: TrainState) -> None:
        """Note the size of the samples."""
        self._latent_shape = self._source.data.latent_shape(state.consumed_samples)[1:]

    def counts(self) -> dict[str, tuple[int, ...]]:
        """The wait for samples, in microseconds, in this replica's place."""
        return {"waits": self._waits.counts(round(self._source.waited_s * MICROSECONDS))}

    def gradients_ready(self, state: TrainState, totals: Mapping[str, Sequence[int]]) -> None:
        """Take the longest wait."""
        self._wait_s = max(totals["waits"]) / MICROSECONDS

    def after_iteration(self, row: Row) -> None:
        """Add the figures."""
        row.update(asdict(self._meter.measure(self._latent_shape, row["step_time_s"], self._wait_s)))


class PerReplica:
    """A number of each replica, in counts that are summed over all ranks.

    One rank of each replica gives it, in the replica's own place, so that the sum keeps the replicas apart.
    """

    def __init__(self, groups: Groups) -> None:
        self._replica, self._replicas = groups.dp.rank(), groups.dp.size()
        self._gives = not (groups.tp.rank() or groups.cp.rank() or groups.pp.rank())

    def counts(self, number: int) -> tuple[int, ...]:
        """This rank's entries; summed over all ranks they are the replicas' numbers."""
        mine = number if self._gives else 0
        return tuple(mine if replica == self._replica else 0 for replica in range(self._replicas))
