"""From positions in the global order to a microbatch: samples, and every random draw that training makes.

Each draw is keyed by (seed, purpose, position) and made on the host, so that two layouts with the same global batch see
the same numbers, on every device type.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_flashi2v.conditioning.build import paradigm_of
from megatron_flashi2v.conditioning.interface import Extras, stack_extras
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import BatchArguments, DataArguments
from megatron_flashi2v.data.loader import GlobalOrder
from megatron_flashi2v.data.prepared import PreparedDataset, pad_text_rows
from megatron_flashi2v.flow.sigmas import dynamic_shift, logit_normal_sigmas, shift_sigmas, uniform_sigmas
from megatron_flashi2v.runtime.random import keyed_generator


@dataclass(frozen=True)
class Microbatch:
    """B samples with their draws, on the host or on the device.

    Attributes:
        latents_BCTHW: normalised latents of the clips, fp32; frame 0 is the condition image's.
        noise_BCTHW: standard normal, fp32.
        sigma_B: noise levels after the shift, fp32.
        text_BLX: text rows, zero-padded, bf16.
        extras: the paradigm's own draws by name, one row per sample, fp32.
    """

    latents_BCTHW: Tensor
    noise_BCTHW: Tensor
    sigma_B: Tensor
    text_BLX: Tensor
    extras: Extras

    def to(self, device: torch.device) -> Microbatch:
        """The same microbatch on another device."""
        tensors = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if name != "extras"}
        extras = {name: value.to(device, non_blocking=True) for name, value in self.extras.items()}
        return Microbatch(**tensors, extras=extras)


def microbatch_positions(iteration_start: int, index: int, dp_rank: int, dp_size: int, size: int) -> range:
    """Positions in the global order that one replica's ``index``-th microbatch of an iteration covers.

    Args:
        iteration_start: samples consumed before the iteration.
        index: microbatch within the iteration.
        dp_rank: this replica.
        dp_size: replicas.
        size: samples in a microbatch.
    """
    first = iteration_start + (index * dp_size + dp_rank) * size
    return range(first, first + size)


class MicrobatchSource:
    """Reads samples and makes draws for one replica; every rank of the replica gets the same.

    Args:
        dataset: prepared samples.
        model: text length, and the paradigm.
        data: distributions of the draws.
        batch: sizes and the seed.
        dp_rank: this replica.
        dp_size: replicas.
        device: where microbatches go.
        shapes_only: this rank is a middle pipeline stage, which needs no values: tensors live on the meta device.
    """

    def __init__(
        self,
        dataset: PreparedDataset,
        model: ModelConfig,
        data: DataArguments,
        batch: BatchArguments,
        *,
        dp_rank: int,
        dp_size: int,
        device: torch.device,
        shapes_only: bool = False,
    ) -> None:
        self.dataset, self.model, self.data, self.batch = dataset, model, data, batch
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.device, self.shapes_only = device, shapes_only
        self.order = GlobalOrder(len(dataset), batch.seed)
        self.paradigm = paradigm_of(model)
        channels, _, height, width = dataset.info.latent_shape
        self.image_shape = (channels, 1, height, width)
        self.shift = dynamic_shift(height, width) if data.sigma_shift is None else data.sigma_shift

    def iteration(self, consumed_samples: int, num_microbatches: int) -> Iterator[Microbatch]:
        """The microbatches of the iteration that starts at ``consumed_samples``."""
        for index in range(num_microbatches):
            positions = microbatch_positions(
                consumed_samples, index, self.dp_rank, self.dp_size, self.batch.micro_batch_size
            )
            yield self.empty() if self.shapes_only else self.read(positions).to(self.device)

    def empty(self) -> Microbatch:
        """Shapes without values; what only the first stage looks at is left out."""
        size, meta = self.batch.micro_batch_size, torch.device("meta")
        latents = torch.empty(size, *self.dataset.info.latent_shape, device=meta)
        scalars = torch.empty(size, device=meta)
        text = torch.empty(size, self.model.text_length, self.model.text_dim, device=meta)
        return Microbatch(latents, latents, scalars, text, {})

    def read(self, positions: Sequence[int]) -> Microbatch:
        """The samples at these positions of the global order, with their draws, on the host."""
        samples = [self.dataset[self.order.sample_index(position)] for position in positions]
        text = [
            pad_text_rows(
                self.dataset.empty_text_rows_LD if self._drops_text(position) else sample.text_rows_LD,
                self.model.text_length,
            )
            for sample, position in zip(samples, positions, strict=True)
        ]
        shape = self.dataset.info.latent_shape
        return Microbatch(
            latents_BCTHW=torch.stack([sample.latents_CTHW for sample in samples]),
            noise_BCTHW=torch.stack([torch.randn(shape, generator=self._generator("noise", p)) for p in positions]),
            sigma_B=torch.cat([self._sigma(position) for position in positions]),
            text_BLX=torch.stack(text),
            extras=stack_extras([self._extras(position) for position in positions]),
        )

    def _generator(self, purpose: str, position: int) -> torch.Generator:
        return keyed_generator(self.batch.seed, purpose, position)

    def _extras(self, position: int) -> dict[str, Tensor]:
        return self.paradigm.training_extras(
            self.data, self.image_shape, lambda purpose: self._generator(purpose, position)
        )

    def _drops_text(self, position: int) -> bool:
        draw = torch.rand(1, generator=self._generator("text-drop", position))
        return draw.item() < self.data.text_drop_probability

    def _sigma(self, position: int) -> Tensor:
        generator = self._generator("sigma", position)
        if self.data.sigma_distribution == "uniform":
            sigma = uniform_sigmas(torch.rand(1, generator=generator))
        else:
            sigma = logit_normal_sigmas(
                torch.randn(1, generator=generator), self.data.sigma_logit_mean, self.data.sigma_logit_std
            )
        return shift_sigmas(sigma, self.shift)
