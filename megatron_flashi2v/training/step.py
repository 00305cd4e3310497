"""One training step: what megatron-core's schedules call for each microbatch, and the step around them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor, nn

from megatron_flashi2v.flow.interpolation import interpolate, velocity_target
from megatron_flashi2v.flow.loss import squared_error_sum
from megatron_flashi2v.models.patches import output_patches
from megatron_flashi2v.models.spec import ModelSpec
from megatron_flashi2v.models.transformer import DiffusionTransformer, DiTInputs
from megatron_flashi2v.parallel.agreement import share_numbers
from megatron_flashi2v.parallel.regions import own_tokens
from megatron_flashi2v.runtime.logging import AGREED
from megatron_flashi2v.training.batch import Microbatch, MicrobatchSource
from megatron_flashi2v.training.clipping import Clipper, scale_gradients
from megatron_flashi2v.training.optimizer import DataParallelStage, apply_gradients, gradient_norm, ready_gradients
from megatron_flashi2v.training.sigma_buckets import WIDTH, BatchLoss, loss_report, read_report

logger = logging.getLogger(__name__)


def forward_step(
    spec: ModelSpec, batches: Iterator[Microbatch], model: nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """x_t = sigma * noise + (1 - sigma) * latents; the model's stage; and the loss that the last stage applies."""
    batch = next(batches)
    inputs = DiTInputs(
        noisy_BCTHW=interpolate(batch.latents_BCTHW, batch.noise_BCTHW, batch.sigma_B),
        sinusoid_BF=batch.sinusoid_BF,
        text_BLX=batch.text_BLX,
        image_latents_BC1HW=batch.latents_BCTHW[:, :, :1],
        extras=batch.extras,
    )
    return model(inputs), partial(flow_matching_loss, spec, batch)


def flow_matching_loss(spec: ModelSpec, batch: Microbatch, velocity_SBP: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's part of the mean squared error against noise - latents, and what is reported of it.

    The sum over this rank's real tokens is divided by the element count of the whole microbatch, so that shards of
    any size weigh right: the parts of a microbatch sum up to its mean. The report is
    :func:`~megatron_flashi2v.training.sigma_buckets.loss_report`'s.
    """
    target_SBP = output_patches(velocity_target(batch.latents_BCTHW, batch.noise_BCTHW), spec.config.patch_size)
    own = own_tokens(len(target_SBP), spec.groups)
    error_B = squared_error_sum(velocity_SBP[: len(own)], target_SBP[own.start : own.stop], dim=(0, 2))
    part_B = error_B / target_SBP.numel()
    # The holder of the first token counts the samples, once for all that share their tokens.
    return part_B.sum(), loss_report(part_B.detach(), batch.sigma_B, counts=own.start == 0)


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """What all ranks together report of a global batch, still on the device: reading it waits for all that was started.

    Attributes:
        numbers: the sums of :func:`~megatron_flashi2v.training.sigma_buckets.loss_report`'s, and all counts; fp32.
        counted: how many counts there are of each name.
        samples: in the batch.
    """

    numbers: Tensor
    counted: Mapping[str, int]
    samples: int

    def read(self, numbers: Sequence[float] | None = None) -> tuple[BatchLoss, dict[str, list[int]]]:
        """The loss and the sums of counts, from ``numbers`` where these have been brought to the host already."""
        numbers = self.numbers.tolist() if numbers is None else numbers
        sums = map(int, numbers[WIDTH:])
        return read_report(numbers[:WIDTH], self.samples), {
            name: list(itertools.islice(sums, length)) for name, length in self.counted.items()
        }


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What is known of an iteration before its update, bit for bit the same on every rank.

    Attributes:
        loss: of the global batch.
        grad_norm: the gradients' global L2 norm before clipping.
        totals: the sums of all ranks' counts.
    """

    loss: BatchLoss
    grad_norm: float
    totals: dict[str, list[int]]


class TrainingStep:
    """Forward and backward over an iteration's microbatches, and the optimizer's step.

    Args:
        spec: what the model was built with.
        stages: this rank's stages.
        models: the same, each wrapped for data parallelism.
        optimizer: megatron-core's optimizer over them.
        clipper: what happens to the gradients before they are applied.
        num_microbatches: microbatches per replica and iteration.
        micro_batch_size: samples in one.
    """

    def __init__(
        self,
        spec: ModelSpec,
        stages: list[DiffusionTransformer],
        models: list[DataParallelStage],
        optimizer: MegatronOptimizer,
        clipper: Clipper,
        *,
        num_microbatches: int,
        micro_batch_size: int,
    ) -> None:
        self.spec, self.stages, self.models, self.optimizer = spec, stages, models, optimizer
        self.clipper = clipper
        self.num_microbatches, self.micro_batch_size = num_microbatches, micro_batch_size
        groups = spec.groups
        interleaved = len(stages) > 1
        if interleaved:
            spec.megatron.microbatch_group_size_per_vp_stage = microbatch_group(num_microbatches, groups.pp.size())
        self._schedule = get_forward_backward_func(
            pp_size=groups.pp.size(), vp_size=len(stages) if interleaved else None
        )
        self._communicator = P2PCommunicator(pp_group=groups.pp, config=spec.megatron)

    @property
    def samples(self) -> int:
        """Samples of one iteration, over all replicas."""
        return self.num_microbatches * self.micro_batch_size * self.spec.groups.dp.size()

    @property
    def reading_stage(self) -> int | None:
        """Which of this rank's stages needs samples: at most one embeds them or computes their loss."""
        ends = (index for index, model in enumerate(self.stages) if model.stage.is_first or model.stage.is_last)
        return next(ends, None)

    def batches(self, source: MicrobatchSource, position: int) -> list[Iterator[Microbatch]]:
        """For each of this rank's stages, the microbatches of the global batch that starts at ``position``."""
        reader = self.reading_stage or 0
        return [
            (source.iteration if index == reader else source.shapes)(position, self.num_microbatches)
            for index in range(len(self.stages))
        ]

    def losses_and_gradients(
        self,
        batches: list[Iterator[Microbatch]],
        latent_shape: tuple[int, int, int],
        counts: Callable[[], Mapping[str, Sequence[int]]] = dict,
    ) -> BatchReport:
        """Accumulate the gradients of one iteration, and sum what all ranks report of it.

        Args:
            batches: for each of this rank's stages, as many microbatches as the step was made for.
            latent_shape: latent frames, rows and columns.
            counts: this rank's counts of things, by name; asked for when all microbatches have been taken.
        """
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(batches, latent_shape, counts)

    @torch.no_grad()
    def evaluate(self, batches: list[Iterator[Microbatch]], latent_shape: tuple[int, int, int]) -> BatchLoss:
        """The loss of a global batch that is not trained on; arguments as for :meth:`losses_and_gradients`."""
        for model in self.models:
            model.eval()
        try:
            loss, _ = self._run(batches, latent_shape, dict, forward_only=True).read()
        finally:
            for model in self.models:
                model.train()
        return loss

    def _run(
        self,
        batches: list[Iterator[Microbatch]],
        latent_shape: tuple[int, int, int],
        counts: Callable[[], Mapping[str, Sequence[int]]],
        *,
        forward_only: bool = False,
    ) -> BatchReport:
        packed = self.stages[0].packed_shape(self.stages[0].grid(latent_shape))
        groups = self.spec.groups
        parts = self._schedule(
            forward_step_func=partial(forward_step, self.spec),
            data_iterator=batches if len(batches) > 1 else batches[0],
            model=self.models,
            num_microbatches=self.num_microbatches,
            # The schedule divides by CP, and by TP under sequence parallelism, to get the rows of one hop.
            seq_length=packed.rows * groups.cp.size() * groups.token_shards,
            micro_batch_size=self.micro_batch_size,
            forward_only=forward_only,
            p2p_communicator=self._communicator,
            pg_collection=groups.collection,
        )
        return global_batch_report(parts, self.spec, self.num_microbatches, self.samples, counts())

    def agree(self, report: BatchReport) -> Agreement:
        """Find the gradients' norm, and bring all that decides on the update to the host, in one read.

        Weights and the optimizer's moments are untouched until :meth:`apply`.

        Args:
            report: of :meth:`losses_and_gradients`.
        """
        self.optimizer.prepare_grads()
        norm = gradient_norm(self.optimizer, self.spec.device)
        grad_norm, *numbers = share_numbers(torch.cat([norm.view(1), report.numbers]))
        loss, totals = report.read(numbers)
        return Agreement(loss=loss, grad_norm=grad_norm, totals=totals)

    def apply(self, grad_norm: float) -> None:
        """Clip the gradients, whose global norm is given, and update the weights by them."""
        clip = self.clipper.clip(grad_norm)
        scale_gradients(ready_gradients(self.optimizer), clip)
        apply_gradients(self.optimizer)
        if clip.factor == 0.0:
            logger.warning("a gradient of norm %g, where %g is usual, was dropped", grad_norm, clip.threshold,
                           extra=AGREED)


def microbatch_group(num_microbatches: int, pipeline_size: int) -> int:
    """Microbatches that a stage runs before the rank's next stage takes them, in the interleaved schedule.

    The fewest, for memory, that megatron-core accepts: no fewer than pipeline ranks, nor may the last group be.
    """
    return next(
        size for size in range(pipeline_size, num_microbatches + 1)
        if num_microbatches % size == 0 or num_microbatches % size >= pipeline_size
    )


def global_batch_report(
    reports: list[Tensor],
    spec: ModelSpec,
    num_microbatches: int,
    samples: int,
    counts: Mapping[str, Sequence[int]] | None = None,
) -> BatchReport:
    """Sum what the last stages' ranks report of a global batch's loss, and all ranks' counts.

    Under sequence and context parallelism the parts of one replica add up; plain tensor-parallel ranks all hold the
    whole, and replicas average. The counts travel with the loss, so that they cost no exchange of their own; every
    rank must give the same names with as many counts each.
    """
    counts = counts or {}
    groups = spec.groups
    copies = 1 if groups.sequence_parallel else groups.tp.size()
    total = torch.tensor([0.0] * WIDTH + [count for part in counts.values() for count in part], device=spec.device)
    for report in reports:
        total[:WIDTH] += report / (num_microbatches * groups.dp.size() * copies)
    torch.distributed.all_reduce(total)
    return BatchReport(
        numbers=total, counted={name: len(part) for name, part in counts.items()}, samples=samples
    )
