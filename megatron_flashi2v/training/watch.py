"""What a run shows of itself while it trains: rows of figures, and the progress line."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.parallel.agreement import share_numbers, sum_counts
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.runtime.hang_watch import SLOW, HangWatch
from megatron_flashi2v.runtime.launch import LaunchEnvironment
from megatron_flashi2v.runtime.logging import AGREED
from megatron_flashi2v.training.interrupts import Interrupts
from megatron_flashi2v.training.metrics import IterationMetrics, MetricsLog, ProgressLine
from megatron_flashi2v.training.watching.norms import NormsByPart
from megatron_flashi2v.training.watching.previews import Samples
from megatron_flashi2v.training.watching.profiling import Profiling
from megatron_flashi2v.training.watching.stragglers import ReplicaClock, StragglerWatch
from megatron_flashi2v.training.watching.throughput import MICROSECONDS, PerReplica, Throughput, ThroughputMeter
from megatron_flashi2v.training.watching.validation import VALIDATION_FILE, Validation
from megatron_flashi2v.training.watching.writers import Writers

logger = logging.getLogger(__name__)


class Watch:
    """Everything that looks at a run; training goes on the same without it.

    Args:
        config: flags and recipe.
        model: resolved dimensions.
        groups: this rank's.
        device: what it runs on.
        launch: this process's place.
        norms: finds norms by part.
        clock: tells this replica's time.
        interrupts: ask this rank to leave.
        hang_watch: is told what is looked at.
        validation: finds the validation loss; None where there is none.
        samples: makes videos; None where there are none.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: ModelConfig,
        groups: Groups,
        device: Device,
        launch: LaunchEnvironment,
        norms: NormsByPart,
        clock: ReplicaClock,
        interrupts: Interrupts,
        hang_watch: HangWatch,
        validation: Validation | None,
        samples: Samples | None,
    ) -> None:
        self._config, self._norms, self._validation, self._samples = config, norms, validation, samples
        self._interrupts, self._hang_watch = interrupts, hang_watch
        self._leaving: str | None = None
        self._extra: dict[str, Any] = {}
        self._writes = launch.rank == 0
        self._folder = config.checkpoint.save if self._writes else None
        self._meter = ThroughputMeter(config, model, device, launch.world_size)
        self._waits = PerReplica(groups)
        self._stragglers = StragglerWatch(groups, device, clock)
        self._profiling = Profiling(config.watch, config.checkpoint.save, device, launch.rank)
        self._done, self._trace_asked = 0, False

    def begin(self, iteration: int, consumed_samples: int) -> None:
        """Open what is written to, and drop from it what is past the iteration that the run goes on from.

        What an interrupted run did not come to at that iteration is made up for.
        """
        self._log = MetricsLog(self._folder, iteration)
        self._validation_log = MetricsLog(self._folder, iteration, VALIDATION_FILE)
        self._writers = Writers(self._config, self._folder, iteration) if self._writes else None
        self._progress = ProgressLine(self._config.batch.train_iters, self._config.runtime.log_interval)
        if iteration:
            owes_loss = self._validation_log.last_iteration != iteration
            owes_samples = self._samples is not None and not self._samples.folder(iteration).exists()
            self.look(iteration, consumed_samples, *self._from_rank_0(owes_loss, owes_samples))

    def counts(self, data_wait_s: float) -> dict[str, tuple[int, ...]]:
        """What this rank tells all others with the loss, in sums."""
        return {
            "profile": (self._profiling.asked(),),
            "data_waits": self._waits.counts(round(data_wait_s * MICROSECONDS)),
            "replica_times": self._stragglers.counts(),
        }

    def before_iteration(self, done: int) -> None:
        """Get ready to look at the next iteration; ``done`` are done."""
        self._profiling.before_iteration(done)
        self._stragglers.iteration_begins()

    def throughput(
        self, latent_shape: tuple[int, int, int], seconds: float, totals: Mapping[str, Sequence[int]]
    ) -> Throughput:
        """The figures of an iteration from its time and the sums of all ranks' :meth:`counts`."""
        self._trace_asked = any(totals["profile"])
        self._stragglers.iteration_done()
        for words in self._stragglers.compare(totals["replica_times"]):
            logger.warning("%s", words, extra=AGREED)
        return self._meter.measure(latent_shape, seconds, max(totals["data_waits"]) / MICROSECONDS)

    def gradients_ready(self, iteration: int) -> None:
        """Look at an iteration's gradients, before they are clipped."""
        interval = self._config.watch.log_norms_interval
        if interval is not None and iteration % interval == 0:
            norms = self._norms.measure()
            self._extra = {"grad_norm_by_part": norms.gradients, "param_norm_by_part": norms.parameters}

    def _from_rank_0(self, *mine: bool) -> list[bool]:
        """What rank 0, which has the files, finds."""
        return [bool(found) for found in share_numbers(mine)]

    def iteration_done(self, metrics: IterationMetrics) -> None:
        """Show an iteration."""
        self._done = metrics.iteration
        self._profiling.after_iteration(self._done)
        if self._trace_asked:
            self._profiling.plan(self._done)
        row, self._extra = {**metrics.to_json(), **self._extra}, {}
        self._log.append(row)
        if self._writers is not None:
            self._writers.write("train", row)
        self._progress.update(metrics)

    def looks_at(self, iteration: int) -> bool:
        """Whether it is time for :meth:`look` after an iteration."""
        return self._validates_at(iteration) or self._samples_at(iteration)

    def look(
        self, iteration: int, consumed_samples: int, loss: bool = True, samples: bool = True
    ) -> str | None:
        """Look at the model after an iteration, where it is time; all ranks call it, unless they are about to leave.

        Returns:
            Why all ranks leave before it is done, if they do; a resumed run makes up for it.
        """
        self._leaving = None
        if loss and self._validates_at(iteration):
            self._validate(iteration, consumed_samples)
        if samples and self._samples is not None and self._samples_at(iteration) and self._leaving is None:
            self._samples.run(iteration, partial(self._go_on, f"the samples of iteration {iteration}"))
        return self._leaving

    def _go_on(self, doing: str) -> bool:
        """Begin the next part of looking, unless a rank was asked to leave."""
        self._hang_watch.enter(doing, SLOW)
        self._leaving = self._interrupts.reason(sum_counts(self._interrupts.counts()))
        return self._leaving is None

    def _validates_at(self, iteration: int) -> bool:
        return self._validation is not None and self._is_due(iteration, self._config.watch.eval_interval)

    def _samples_at(self, iteration: int) -> bool:
        return self._samples is not None and self._is_due(iteration, self._config.watch.sample_interval)

    def _is_due(self, iteration: int, interval: int | None) -> bool:
        return interval is not None and (iteration % interval == 0 or iteration == self._config.batch.train_iters)

    def _validate(self, iteration: int, consumed_samples: int) -> None:
        assert self._validation is not None
        found = self._validation.run(partial(self._go_on, f"the validation of iteration {iteration}"))
        if found is None:
            return
        row = {"iteration": iteration, "consumed_samples": consumed_samples, **found}
        self._validation_log.append(row)
        if self._writers is not None:
            self._writers.write("validation", row)
        logger.info("validation at iteration %d | loss %.4f | %.1f s", iteration, row["loss"], row["seconds"])

    def end(self) -> None:
        """Write what is still held back."""
        self._profiling.end(self._done)
        if self._validation is not None:
            self._validation.close()
        if self._writers is not None:
            self._writers.close()
