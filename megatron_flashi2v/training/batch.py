"""From positions in the global order to a microbatch: samples, and every random draw that training makes.

Each draw is keyed by (seed, purpose, position) and made on the host, so that two layouts with the same global batch see
the same numbers, on every device type.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_flashi2v.conditioning.build import paradigm_of
from megatron_flashi2v.conditioning.interface import Extras, stack_extras
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import BatchArguments, DataArguments
from megatron_flashi2v.data.blend import BadPosition, Blend
from megatron_flashi2v.data.prepared import PreparedSample, pad_text_rows
from megatron_flashi2v.flow.sigmas import (
    dynamic_shift,
    logit_normal_sigmas,
    shift_sigmas,
    sigmas_between,
    timesteps_of,
    uniform_sigmas,
)
from megatron_flashi2v.flow.sinusoid import timestep_sinusoid
from megatron_flashi2v.runtime.device import bind_thread
from megatron_flashi2v.runtime.random import keyed_generator
from megatron_flashi2v.training.prefetch import Prefetcher

MICROBATCHES_AHEAD = 4
"""Read while the present one is computed; a few even out slow reads, and more only cost memory."""


@dataclass(frozen=True)
class Microbatch:
    """B samples with their draws, on the host or on the device.

    Attributes:
        latents_BCTHW: normalised latents of the clips, fp32; frame 0 is the condition image's.
        noise_BCTHW: standard normal, fp32.
        sigma_B: noise levels after the shift, fp32.
        sinusoid_BF: features of the timesteps 1000 * sigma, fp32.
        text_BLX: text rows, zero-padded, bf16.
        extras: the paradigm's own draws and stored inputs by name, one row per sample.
    """

    latents_BCTHW: Tensor
    noise_BCTHW: Tensor
    sigma_B: Tensor
    sinusoid_BF: Tensor
    text_BLX: Tensor
    extras: Extras

    def to(self, device: torch.device) -> Microbatch:
        """The same microbatch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Microbatch:
        """The same microbatch in host memory that a GPU can fetch from by itself."""
        return self._each(lambda tensor: tensor if tensor.is_meta else tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Microbatch:
        tensors = {name: change(value) for name, value in vars(self).items() if name != "extras"}
        return Microbatch(**tensors, extras={name: change(value) for name, value in self.extras.items()})


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


@dataclass(frozen=True)
class LoadedMicrobatch:
    """A microbatch on the host, and the bad samples that were met while it was read."""

    batch: Microbatch
    bad: list[BadPosition]


class MicrobatchSource:
    """Reads samples and makes draws for one replica; every rank of the replica gets the same.

    Reading and drawing go ahead of training in a background thread.

    Args:
        data: what is read.
        model: text length, and the paradigm.
        flow: distributions of the draws.
        batch: sizes and the seed.
        dp_rank: this replica.
        dp_size: replicas.
        device: where microbatches go.
        shapes_only: this rank is a middle pipeline stage, which needs no values: tensors live on the meta device.
        ahead: microbatches that are read ahead; 0 reads in this thread, when they are asked for.
        end: position at which the run ends, past which nothing is read.
    """

    def __init__(
        self,
        data: Blend,
        model: ModelConfig,
        flow: DataArguments,
        batch: BatchArguments,
        *,
        dp_rank: int,
        dp_size: int,
        device: torch.device,
        shapes_only: bool = False,
        ahead: int = 0,
        end: int | None = None,
    ) -> None:
        self.data, self.model, self.flow, self.batch = data, model, flow, batch
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.device, self.shapes_only = device, shapes_only
        self.ahead, self.end = ahead, end
        self.paradigm = paradigm_of(model)
        self.bad: list[BadPosition] = []
        self.waited_s = 0.0
        self._prefetcher: Prefetcher[LoadedMicrobatch] | None = None
        self._next_start = 0

    def iteration(self, consumed_samples: int, num_microbatches: int) -> Iterator[Microbatch]:
        """The microbatches of the iteration that starts at ``consumed_samples``.

        As the microbatches are taken, bad samples that are met gather in ``self.bad``, and the seconds that they were
        waited for in ``self.waited_s``.
        """
        self.bad, self.waited_s = [], 0.0
        # Reading begins here, not with the first microbatch: a late pipeline stage takes that one when the first stage
        # has sent its activation, and the first stage may be waiting for this rank's part of the encoding.
        return self._taken(self._loaded(consumed_samples, num_microbatches), num_microbatches)

    def shapes(self, consumed_samples: int, num_microbatches: int) -> Iterator[Microbatch]:
        """The same microbatches without values, for a stage in the middle of the model."""
        for _ in range(num_microbatches):
            yield self.empty(consumed_samples)

    def close(self) -> None:
        """Stop reading ahead, at the same microbatch on all ranks of the replica."""
        if self._prefetcher is not None:
            self._prefetcher.close()

    def abandon(self) -> None:
        """Stop reading ahead without waiting, when this rank fails."""
        if self._prefetcher is not None:
            self._prefetcher.abandon()

    def empty(self, position: int) -> Microbatch:
        """Shapes without values; what only the first stage looks at is left out."""
        size, meta = self.batch.micro_batch_size, torch.device("meta")
        latents = torch.empty(size, *self.data.latent_shape(position), device=meta)
        sigma, sinusoid = torch.empty(size, device=meta), torch.empty(size, self.model.freq_dim, device=meta)
        text = torch.empty(size, self.model.text_length, self.model.text_dim, device=meta)
        return Microbatch(latents, latents, sigma, sinusoid, text, {})

    def load(self, positions: Sequence[int]) -> LoadedMicrobatch:
        """The samples at these positions of the global order, with their draws, on the host."""
        if self.shapes_only:
            return LoadedMicrobatch(self.empty(positions[0]), [])
        samples, bad = self.data.read(positions)
        return LoadedMicrobatch(self.draw(positions, samples), bad)

    def load_together(self, spans: Sequence[range]) -> Iterator[LoadedMicrobatch]:
        """The same for the microbatches of an iteration, whose samples all ranks of the replica encode together.

        Middle stages take part, though they need no values.
        """
        size = len(spans[0])
        samples, bad = self.data.read([position for span in spans for position in span])
        for index, span in enumerate(spans):
            part = samples[index * size : (index + 1) * size]
            batch = self.empty(span[0]) if self.shapes_only else self.draw(span, part)
            yield LoadedMicrobatch(batch, [row for row in bad if row.position in span])

    def draw(self, positions: Sequence[int], samples: Sequence[PreparedSample]) -> Microbatch:
        """The samples of these positions with their draws, on the host."""
        text = [
            pad_text_rows(
                self.data.empty_text_rows_LD if self._drops_text(position) else sample.text_rows_LD,
                self.model.text_length,
            )
            for sample, position in zip(samples, positions, strict=True)
        ]
        shape = samples[0].latents_CTHW.shape
        channels, _, height, width = shape
        image_shape = (channels, 1, height, width)
        stored = self.paradigm.stored_inputs(self.model, shape)
        sigma_B = self.sigmas(positions, (height, width))
        return Microbatch(
            latents_BCTHW=torch.stack([sample.latents_CTHW for sample in samples]),
            noise_BCTHW=torch.stack([torch.randn(shape, generator=self._generator("noise", p)) for p in positions]),
            sigma_B=sigma_B,
            # Here, where the sigmas are on the host anyway: made in the forward pass, the device would be waited for.
            sinusoid_BF=timestep_sinusoid(timesteps_of(sigma_B), self.model.freq_dim),
            text_BLX=torch.stack(text),
            extras=stack_extras([
                {**self._extras(position, image_shape), **{name: sample.inputs[name] for name in stored}}
                for position, sample in zip(positions, samples, strict=True)
            ]),
        )

    def sigmas(self, positions: Sequence[int], latent_size: tuple[int, int]) -> Tensor:
        """Noise levels [B] of these positions.

        Args:
            positions: of the global order.
            latent_size: rows and columns of the latents, which the shift follows.
        """
        shift = dynamic_shift(*latent_size) if self.flow.sigma_shift is None else self.flow.sigma_shift
        return torch.cat([self._sigma(position, shift) for position in positions])

    def _taken(self, loaded: Iterator[LoadedMicrobatch], count: int) -> Iterator[Microbatch]:
        for _ in range(count):
            asked = time.perf_counter()
            microbatch = next(loaded)
            self.waited_s += time.perf_counter() - asked
            self.bad += microbatch.bad
            yield microbatch.batch if self.shapes_only else microbatch.batch.to(self.device)

    def _loaded(self, consumed: int, count: int) -> Iterator[LoadedMicrobatch]:
        """The stream of microbatches, standing at the iteration that starts at ``consumed``."""
        if not self.ahead:
            return self._stream(consumed, count)
        if self._prefetcher is None or self._next_start != consumed:
            self.close()
            self._prefetcher = Prefetcher(
                self._stream(consumed, count), self.ahead, begin=lambda: bind_thread(self.device)
            )
        self._next_start = consumed + count * self.batch.micro_batch_size * self.dp_size
        return self._prefetcher

    def _stream(self, consumed: int, count: int) -> Iterator[LoadedMicrobatch]:
        """All microbatches of this replica from ``consumed`` to the end of the run."""
        size = self.batch.micro_batch_size
        for start in itertools.count(consumed, count * size * self.dp_size):
            if self.end is not None and start >= self.end:
                return
            spans = [microbatch_positions(start, index, self.dp_rank, self.dp_size, size) for index in range(count)]
            together = self.data.encodes_together
            for loaded in self.load_together(spans) if together else map(self.load, spans):
                if self.device.type != "cpu":
                    loaded = LoadedMicrobatch(loaded.batch.pinned(), loaded.bad)
                yield loaded

    def _generator(self, purpose: str, position: int) -> torch.Generator:
        return keyed_generator(self.batch.seed, purpose, position)

    def _extras(self, position: int, image_shape: tuple[int, int, int, int]) -> dict[str, Tensor]:
        return self.paradigm.training_extras(
            self.flow, image_shape, lambda purpose: self._generator(purpose, position)
        )

    def _drops_text(self, position: int) -> bool:
        draw = torch.rand(1, generator=self._generator("text-drop", position))
        return draw.item() < self.flow.text_drop_probability

    def _sigma(self, position: int, shift: float) -> Tensor:
        flow, generator = self.flow, self._generator("sigma", position)
        logit = (flow.sigma_logit_mean, flow.sigma_logit_std) if flow.sigma_distribution == "logit_normal" else None
        if (flow.sigma_min, flow.sigma_max) != (0.0, 1.0):
            draw = torch.rand(1, generator=generator, dtype=torch.float64)
            return sigmas_between(draw, flow.sigma_min, flow.sigma_max, logit=logit, shift=shift)
        if logit is None:
            return shift_sigmas(uniform_sigmas(torch.rand(1, generator=generator)), shift)
        return shift_sigmas(logit_normal_sigmas(torch.randn(1, generator=generator), *logit), shift)
