"""What a run shows of itself while it trains: rows of figures, and the progress line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.runtime.launch import LaunchEnvironment
from megatron_flashi2v.training.metrics import IterationMetrics, MetricsLog, ProgressLine
from megatron_flashi2v.training.norms import NormsByPart
from megatron_flashi2v.training.throughput import DataWaits, Throughput, ThroughputMeter
from megatron_flashi2v.training.writers import Writers


class Watch:
    """Everything that looks at a run; training goes on the same without it.

    Args:
        config: flags and recipe.
        model: resolved dimensions.
        groups: this rank's.
        device: what it runs on.
        launch: this process's place.
        norms: finds norms by part.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: ModelConfig,
        groups: Groups,
        device: Device,
        launch: LaunchEnvironment,
        norms: NormsByPart,
    ) -> None:
        self._config, self._norms = config, norms
        self._extra: dict[str, Any] = {}
        self._writes = launch.rank == 0
        self._folder = config.checkpoint.save if self._writes else None
        self._meter = ThroughputMeter(config, model, device, launch.world_size)
        self._waits = DataWaits(groups)

    def begin(self, iteration: int) -> None:
        """Open what is written to, and drop from it what is past the iteration that the run goes on from."""
        self._log = MetricsLog(self._folder, iteration)
        self._writers = Writers(self._config, self._folder, iteration) if self._writes else None
        self._progress = ProgressLine(self._config.batch.train_iters, self._config.runtime.log_interval)

    def counts(self, data_wait_s: float) -> tuple[int, ...]:
        """What this rank tells all others with the loss, in sums."""
        return self._waits.counts(data_wait_s)

    def throughput(self, latent_shape: tuple[int, int, int], seconds: float, totals: Sequence[int]) -> Throughput:
        """The figures of an iteration from its time and the sums of all ranks' :meth:`counts`."""
        return self._meter.measure(latent_shape, seconds, self._waits.longest(totals))

    def gradients_ready(self, iteration: int) -> None:
        """Look at an iteration's gradients, before they are clipped."""
        interval = self._config.watch.log_norms_interval
        if interval is not None and iteration % interval == 0:
            norms = self._norms.measure()
            self._extra = {"grad_norm_by_part": norms.gradients, "param_norm_by_part": norms.parameters}

    def iteration_done(self, metrics: IterationMetrics) -> None:
        """Show an iteration."""
        row, self._extra = {**metrics.to_json(), **self._extra}, {}
        self._log.append(row)
        if self._writers is not None:
            self._writers.write("train", row)
        self._progress.update(metrics)

    def end(self) -> None:
        """Write what is still held back."""
        if self._writers is not None:
            self._writers.close()
