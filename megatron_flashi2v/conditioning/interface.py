"""What an image-to-video paradigm is: new inputs of the DiT, the draws they take, and perhaps features of tokens.

A paradigm is one class in one file. The DiT, the training loop, the sampler and the key table ask it through this
interface and know nothing else of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.sample import ImageSettings
from megatron_flashi2v.config.train import DataArguments

Extras = Mapping[str, Tensor]
"""What a paradigm drew or was set to, by its own names: one row per sample, [B, ...]."""

GeneratorOf = Callable[[str], torch.Generator]
"""From a draw's purpose to the host generator keyed by it and by the sample's position."""


@dataclass(frozen=True)
class ConditionedInput:
    """What the first stage embeds.

    Attributes:
        latents_BCTHW: input of the patch embedding, fp32; C is the paradigm's ``input_channels``, the noisy latents
            come first.
        guidance_BCTHW: a second field over the same grid, embedded by the paradigm's ``embed_guidance`` and added to
            the tokens; None where the paradigm has none.
    """

    latents_BCTHW: Tensor
    guidance_BCTHW: Tensor | None = None


class ImageConditioning(nn.Module, ABC):
    """A paradigm. The module lives on the first pipeline stage; the class methods are asked anywhere.

    Args:
        config: dimensions.
        highpass: the chosen implementation of the Fourier high-pass, for a paradigm that filters.
        dtype: dtype of matrix products.

    Attributes:
        uses_image: whether sampling needs a condition image.
        token_modules: names of its modules that act on single tokens: under sequence parallelism their gradient on a
            rank covers that rank's tokens alone.
        latent_modules: names of its modules that act on whole latents, before they are divided over ranks. Each of its
            modules with weights is in one of both.
        input_channels: channels of the patch embedding's input. The columns of its weight for channels past the
            latents' own start at zero, so that every paradigm starts as the text-to-video model.
    """

    uses_image: ClassVar[bool] = True
    token_modules: ClassVar[tuple[str, ...]] = ()
    latent_modules: ClassVar[tuple[str, ...]] = ()
    input_channels: int

    def __init__(
        self,
        config: ModelConfig,
        highpass: Callable[..., Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.input_channels = config.latent_channels + self.added_channels(config)

    @classmethod
    def added_channels(cls, config: ModelConfig) -> int:
        """Channels that the paradigm appends to the noisy latents."""
        return 0

    @classmethod
    def fit_to_data(cls, config: ModelConfig, temporal_stride: int) -> ModelConfig:
        """The configuration with what the paradigm takes from the data.

        Args:
            config: as the flags made it.
            temporal_stride: video frames for each latent frame after the first.
        """
        return config

    @classmethod
    def training_extras(
        cls, data: DataArguments, image_shape: tuple[int, int, int, int], generator_of: GeneratorOf
    ) -> dict[str, Tensor]:
        """What the paradigm draws for one sample of training, on the host, without a batch axis.

        Args:
            data: distributions of the draws.
            image_shape: (C, 1, H, W) of the image's latents.
            generator_of: keyed by the run's seed and the sample's position in the global order.
        """
        return {}

    @classmethod
    def sampling_extras(
        cls, settings: ImageSettings, image_shape: tuple[int, int, int, int], generator_of: GeneratorOf
    ) -> dict[str, Tensor]:
        """The same for one video to sample, from the user's settings."""
        return {}

    @abstractmethod
    def forward(self, noisy_BCTHW: Tensor, image_latents_BC1HW: Tensor, extras: Extras) -> ConditionedInput:
        """Bring the image to the noisy latents.

        Args:
            noisy_BCTHW: sigma * noise + (1 - sigma) * latents, fp32.
            image_latents_BC1HW: normalised latents of the condition image, fp32.
            extras: rows of what :meth:`training_extras` or :meth:`sampling_extras` made.
        """

    def embed_guidance(self, patches_SBP: Tensor) -> Tensor:
        """Token features [S, B, d] of the guidance's patches; only called if :meth:`forward` gave guidance."""
        raise TypeError(f"{type(self).__name__} has no guidance to embed")


def stack_extras(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One sample's extras after the other as one batch."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
