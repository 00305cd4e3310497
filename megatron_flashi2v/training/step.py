"""One training step: what megatron-core's schedules call for each microbatch, and the step around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor, nn

from megatron_flashi2v.flow.interpolation import interpolate, velocity_target
from megatron_flashi2v.flow.loss import squared_error_sum
from megatron_flashi2v.flow.sigmas import timesteps_of
from megatron_flashi2v.models.patches import output_patches
from megatron_flashi2v.models.spec import ModelSpec
from megatron_flashi2v.models.transformer import DiffusionTransformer, DiTInputs
from megatron_flashi2v.parallel.regions import shard_tokens
from megatron_flashi2v.training.batch import Microbatch


def forward_step(
    spec: ModelSpec, batches: Iterator[Microbatch], model: nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """x_t = sigma * noise + (1 - sigma) * latents; the model's stage; and the loss that the last stage applies."""
    batch = next(batches)
    inputs = DiTInputs(
        noisy_BCTHW=interpolate(batch.latents_BCTHW, batch.noise_BCTHW, batch.sigma_B),
        timestep_B=timesteps_of(batch.sigma_B),
        text_BLX=batch.text_BLX,
        image_latents_BC1HW=batch.latents_BCTHW[:, :, :1],
        extras=batch.extras,
    )
    return model(inputs), partial(flow_matching_loss, spec, batch)


def flow_matching_loss(spec: ModelSpec, batch: Microbatch, velocity_SBP: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's part of the mean squared error against noise - latents, and a copy of it to report.

    The sum over this rank's tokens is divided by the element count of the whole microbatch, so that shards of any
    size weigh right: the parts of a microbatch sum up to its mean.
    """
    target_SBP = output_patches(velocity_target(batch.latents_BCTHW, batch.noise_BCTHW), spec.config.patch_size)
    part = squared_error_sum(velocity_SBP, shard_tokens(target_SBP, spec.groups)) / target_SBP.numel()
    # The schedule scales the loss in place, so the report needs its own storage.
    return part, part.detach().clone()


class TrainingStep:
    """Forward and backward over an iteration's microbatches, and the optimizer's step.

    Args:
        spec: what the model was built with.
        stage: this rank's part of the model.
        model: the same, wrapped in megatron-core's DistributedDataParallel.
        optimizer: megatron-core's optimizer over it.
        num_microbatches: microbatches per replica and iteration.
        micro_batch_size: samples in one.
    """

    def __init__(
        self,
        spec: ModelSpec,
        stage: DiffusionTransformer,
        model: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        *,
        num_microbatches: int,
        micro_batch_size: int,
    ) -> None:
        self.spec, self.stage, self.model, self.optimizer = spec, stage, model, optimizer
        self.num_microbatches, self.micro_batch_size = num_microbatches, micro_batch_size
        groups = spec.groups
        self._schedule = get_forward_backward_func(pp_size=groups.pp.size(), vp_size=None)
        self._communicator = P2PCommunicator(pp_group=groups.pp, config=spec.megatron)

    def losses_and_gradients(
        self,
        batches: Iterator[Microbatch],
        latent_shape: tuple[int, int, int],
        count: Callable[[], int] = lambda: 0,
    ) -> tuple[float, int]:
        """Accumulate the gradients of one iteration.

        Args:
            batches: as many microbatches as the step was made for.
            latent_shape: latent frames, rows and columns.
            count: this rank's count of something, asked for when all microbatches have been taken.

        Returns:
            The global batch's mean loss, and the sum of all ranks' counts: the same on every rank.
        """
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        packed = self.stage.packed_shape(self.stage.grid(latent_shape))
        groups = self.spec.groups
        parts = self._schedule(
            forward_step_func=partial(forward_step, self.spec),
            data_iterator=batches,
            model=[self.model],
            num_microbatches=self.num_microbatches,
            # The schedule divides by CP, and by TP under sequence parallelism, to get the rows of one hop.
            seq_length=packed.rows * groups.cp.size() * groups.token_shards,
            micro_batch_size=self.micro_batch_size,
            p2p_communicator=self._communicator,
            pg_collection=groups.collection,
        )
        return global_mean_loss(parts, self.spec, self.num_microbatches, count())

    def update(self) -> float:
        """Apply the gradients; their global L2 norm before clipping."""
        _, grad_norm, _ = self.optimizer.step()
        return float(grad_norm)


def global_mean_loss(
    parts: list[Tensor], spec: ModelSpec, num_microbatches: int, count: int = 0
) -> tuple[float, int]:
    """Mean over the global batch of the parts that the last stages' ranks hold, and the sum of all ranks' counts.

    Under sequence and context parallelism the parts of one replica add up; plain tensor-parallel ranks all hold the
    whole, and replicas average. The count travels with the loss, so that it costs no exchange of its own.
    """
    groups = spec.groups
    copies = 1 if groups.sequence_parallel else groups.tp.size()
    total = torch.zeros(2, device=spec.device)
    for part in parts:
        total[0] += (part / (num_microbatches * groups.dp.size() * copies)).squeeze()
    total[1] = count
    torch.distributed.all_reduce(total)
    loss, counted = total.tolist()
    return loss, int(counted)
