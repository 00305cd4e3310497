"""The loss on samples that are not trained on, at fixed noise levels and with fixed noise.

Every evaluation asks the same questions, whatever the run's seed and layout, so that its numbers can be compared over
a run and between runs. Nothing that training depends on is touched.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import BatchArguments, DataArguments
from megatron_flashi2v.data.blend import Blend
from megatron_flashi2v.training.batch import MicrobatchSource
from megatron_flashi2v.training.datasets import VALIDATION_SEED
from megatron_flashi2v.training.sigma_buckets import BUCKETS, BatchLoss
from megatron_flashi2v.training.step import TrainingStep
from megatron_flashi2v.training.watching.observer import Observer, Row
from megatron_flashi2v.training.watching.schedule import Schedule

if TYPE_CHECKING:
    from megatron_flashi2v.training.state import TrainState

logger = logging.getLogger(__name__)


class ValidationSource(MicrobatchSource):
    """Reads validation samples: with their text, and with the middles of the sigma buckets in turn for noise levels.

    Of an expert's range the buckets divide the range.
    """

    def sigmas(self, positions: Sequence[int], latent_size: tuple[int, int]) -> Tensor:
        """Noise levels [B]."""
        middles = (torch.tensor([position % BUCKETS for position in positions]) + 0.5) / BUCKETS
        low, high = self.flow.sigma_min, self.flow.sigma_max
        return middles if (low, high) == (0.0, 1.0) else low + (high - low) * middles

    def _drops_text(self, position: int) -> bool:
        return False


class Validation(Observer):
    """The validation loss of a model in training, recorded when it is due; all ranks find it together.

    Args:
        source: of the samples; it ends after ``iterations``.
        step: runs the model.
        iterations: global batches of one evaluation.
        schedule: when it is due.
        begin_part: called before each global batch with what begins; False, on all ranks alike, stops the evaluation.
        record: takes the row.
    """

    def __init__(
        self,
        source: ValidationSource,
        step: TrainingStep,
        iterations: int,
        schedule: Schedule,
        begin_part: Callable[[str], bool],
        record: Callable[[Row], None],
    ) -> None:
        self._source, self._step, self._iterations = source, step, iterations
        self._schedule, self._begin_part, self._record = schedule, begin_part, record
        self._told = False

    def between_iterations(self, state: TrainState) -> None:
        """Evaluate and record where it is due; a run that leaves before the end records nothing."""
        if not self._schedule.is_due(state.iteration):
            return
        found = self.run(lambda: self._begin_part(f"the validation of iteration {state.iteration}"))
        if found is None:
            return
        self._record({"iteration": state.iteration, "consumed_samples": state.consumed_samples, **found})
        logger.info("validation at iteration %d | loss %.4f | %.1f s", state.iteration, found["loss"], found["seconds"])

    def run(self, go_on: Callable[[], bool]) -> dict[str, Any] | None:
        """The figures of a row: ``loss``, ``loss_by_sigma``, ``samples_by_sigma`` and ``seconds``.

        Args:
            go_on: asked before each global batch; the same on all ranks.

        Returns:
            None where it was stopped.
        """
        start = time.perf_counter()
        losses = []
        for index in range(self._iterations):
            if not go_on():
                return None
            position = index * self._source.batch.global_batch_size
            batches = self._step.batches(self._source, position)
            losses.append(self._step.evaluate(batches, self._source.data.latent_shape(position)[1:]))
            self._tell_bad_samples()
        self._told = True
        joined = mean_loss(losses)
        return {
            "loss": joined.mean, "loss_by_sigma": joined.by_sigma, "samples_by_sigma": joined.samples_by_sigma,
            "seconds": time.perf_counter() - start,
        }

    def close(self) -> None:
        """Stop reading."""
        self._source.abandon()

    def _tell_bad_samples(self) -> None:
        if self._told:  # the next evaluation meets the same ones
            return
        for row in self._source.bad:
            logger.warning("bad validation sample: %s; replaced by another", row.reason)


def validation_source(
    data: Blend,
    model: ModelConfig,
    flow: DataArguments,
    batch: BatchArguments,
    step: TrainingStep,
    *,
    iterations: int,
    ahead: int,
) -> ValidationSource:
    """What reads this replica's validation samples.

    Args:
        data: validation data.
        model: as it was fitted to the training data.
        flow: distributions of the draws.
        batch: sizes.
        step: runs the model.
        iterations: global batches of one evaluation.
        ahead: microbatches that are read ahead.
    """
    groups = step.spec.groups
    return ValidationSource(
        data, model, flow, dataclasses.replace(batch, seed=VALIDATION_SEED), dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(), device=step.spec.device, shapes_only=step.reading_stage is None, ahead=ahead,
        end=iterations * batch.global_batch_size,
    )


def mean_loss(losses: Sequence[BatchLoss]) -> BatchLoss:
    """The loss of several global batches of one size together."""
    counts = tuple(sum(column) for column in zip(*(loss.samples_by_sigma for loss in losses), strict=True))
    sums = [0.0] * len(counts)
    for loss in losses:
        for bucket, (mean, count) in enumerate(zip(loss.by_sigma, loss.samples_by_sigma, strict=True)):
            sums[bucket] += 0.0 if mean is None else mean * count
    return BatchLoss(
        mean=sum(loss.mean for loss in losses) / len(losses),
        by_sigma=tuple(total / count if count else None for total, count in zip(sums, counts, strict=True)),
        samples_by_sigma=counts,
    )
