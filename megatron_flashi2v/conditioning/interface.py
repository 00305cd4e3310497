"""The interface of an image-to-video paradigm: what it adds to the DiT's input, its draws, and its facts.

A paradigm is one class in one file, named once in the list of ``conditioning/build.py``. The DiT, training, sampling,
the key table, converters, FLOP counts and model cards ask the class, and know no paradigm by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.sample import ImageSettings
from megatron_flashi2v.config.train import DataArguments

Extras = Mapping[str, Tensor]
"""A paradigm's own draws and settings by name: one row per sample, [B, ...]."""

GeneratorOf = Callable[[str], torch.Generator]
"""From a draw's purpose to the host generator keyed by it and by the sample's position."""

MODULE = "conditioning"
"""Name of a paradigm's module in the model: its tensors are ``conditioning.NAME`` in a checkpoint."""


@dataclass(frozen=True)
class ConditionedInput:
    """Inputs of the first stage's embeddings.

    Attributes:
        latents_BCTHW: input of the patch embedding, fp32; C is the paradigm's ``input_channels``, the noisy latents
            come first.
        guidance_BCTHW: a second field over the same grid, embedded by the paradigm's ``embed_guidance`` and added to
            the tokens; None where the paradigm has none.
        image_rows_BRX: rows of an image encoder, as many as the paradigm's ``image_rows``, that cross-attention reads
            by keys and values of their own; None where the paradigm has none.
    """

    latents_BCTHW: Tensor
    guidance_BCTHW: Tensor | None = None
    image_rows_BRX: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class OwnTensor:
    """A weight tensor that a paradigm adds to the model.

    Attributes:
        shape: in our module.
        external_shape: in other formats, with the values in the same order; None where it is the same.
        starts_at_zero: the initial values are zeros, not the distribution that the tensor's kind has.
    """

    shape: tuple[int, ...]
    external_shape: tuple[int, ...] | None = None
    starts_at_zero: bool = False


@dataclass(frozen=True, kw_only=True)
class ForeignModel:
    """Facts about weights that come without a configuration of ours.

    Attributes:
        latent_channels: channels of the output.
        input_channels: channels of the patch embedding's input.
        column: the key table's column that the tensors are named by.
        image_dim: width of the image encoder's rows that the model has a branch for; 0 without one.
        shape_of: shape of a tensor, by its name in that column and the number of its dimensions; None if there is none.
    """

    latent_channels: int
    input_channels: int
    column: str = "diffusers"
    image_dim: int = 0
    shape_of: Callable[[str, int], tuple[int, ...] | None] = lambda name, dimensions: None


class ImageConditioning(nn.Module, ABC):
    """A paradigm. The module lives on the first pipeline stage; the class methods answer anywhere, without a module.

    Its state is its parameters: it registers no buffers.

    Args:
        config: dimensions.
        highpass: the chosen implementation of the Fourier high-pass, for a paradigm that filters.
        dtype: dtype of matrix products; a parameter that must stay fp32 ignores it.

    Attributes:
        name: value of ``ModelConfig.conditioning`` and ``--conditioning``.
        uses_image: whether sampling needs a condition image.
        token_modules: names of its modules, or parameters outside any, that act on single tokens: under sequence
            parallelism their gradient on a rank covers that rank's tokens alone.
        latent_modules: names of its modules that act on whole latents, before they are divided over ranks. Each of its
            modules with weights is in one of both.
        config_fields: fields of :class:`ModelConfig` that this paradigm reads and others ignore.
        external_modules: by the name of one of its modules, that module's names in the key table's columns.
        wan_model_type: ``model_type`` in Wan's config.json.
        told_by: how many input channels tell this paradigm in weights without a configuration; empty if they do not.
        input_channels: channels of the patch embedding's input. The columns of its weight for channels past the
            latents' own start at zero, so that every paradigm starts as the text-to-video model.
    """

    name: ClassVar[str]
    uses_image: ClassVar[bool] = True
    token_modules: ClassVar[tuple[str, ...]] = ()
    latent_modules: ClassVar[tuple[str, ...]] = ()
    config_fields: ClassVar[tuple[str, ...]] = ()
    external_modules: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    wan_model_type: ClassVar[str] = "t2v"
    told_by: ClassVar[str] = ""
    input_channels: int

    def __init__(
        self,
        config: ModelConfig,
        highpass: Callable[..., Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.input_channels = config.latent_channels + self.added_channels(config)

    @abstractmethod
    def forward(self, noisy_BCTHW: Tensor, image_latents_BC1HW: Tensor, extras: Extras) -> ConditionedInput:
        """Bring the image to the noisy latents.

        Args:
            noisy_BCTHW: sigma * noise + (1 - sigma) * latents, fp32.
            image_latents_BC1HW: normalised latents of the condition image, fp32.
            extras: rows of :meth:`training_extras` or :meth:`sampling_extras`, and the :meth:`stored_inputs`.
        """

    def embed_guidance(self, patches_SBP: Tensor) -> Tensor:
        """Token features [S, B, d] of the guidance's patches; only called if :meth:`forward` gave guidance."""
        raise TypeError(f"{type(self).__name__} has no guidance to embed")

    @classmethod
    def training_extras(
        cls, data: DataArguments, image_shape: tuple[int, int, int, int], generator_of: GeneratorOf
    ) -> dict[str, Tensor]:
        """The paradigm's draws for one sample of training, on the host, without a batch axis.

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

    @classmethod
    def stored_inputs(cls, config: ModelConfig, latent_shape: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
        """Tensors that a sample must hold for this paradigm beside latents and text, by name, with their shapes.

        They come to :meth:`forward` among the extras. ``latent_shape`` is the sample's (C, T, H, W).
        """
        return {}

    @classmethod
    def image_rows(cls, config: ModelConfig) -> int:
        """Rows of an image encoder that every block attends to; 0 where there are none."""
        return 0

    @classmethod
    def added_channels(cls, config: ModelConfig) -> int:
        """Channels that the paradigm appends to the noisy latents."""
        return 0

    @classmethod
    def fit_to_data(
        cls, config: ModelConfig, temporal_stride: int | None, inputs: Mapping[str, tuple[int, ...]]
    ) -> ModelConfig:
        """The configuration, completed from the data.

        Args:
            config: as the flags made it.
            temporal_stride: video frames for each latent frame after the first; None where there is only the first.
            inputs: shapes of what a sample holds beside latents and text, see :meth:`stored_inputs`.
        """
        return config

    @classmethod
    def meaningful_fields(cls, config: ModelConfig) -> tuple[str, ...]:
        """Those of ``config_fields`` whose value changes this model."""
        return cls.config_fields

    @classmethod
    def own_tensors(cls, config: ModelConfig) -> dict[str, OwnTensor]:
        """The module's parameters by name, in its order."""
        return {}

    @classmethod
    def external_name(cls, name: str, column: str) -> str:
        """Name of one of :meth:`own_tensors` in a column of the key table; where ``external_modules`` has none, ours
        after the paradigm's name."""
        module, _, parameter = name.rpartition(".")
        theirs = cls.external_modules.get(module, {}).get(column)
        return f"{cls.name}.{name}" if theirs is None else f"{theirs}.{parameter}"

    @classmethod
    def multiply_adds(cls, config: ModelConfig, latent_shape: tuple[int, int, int], tokens: int) -> dict[str, int]:
        """Multiplications with an addition in the paradigm's modules, for one sample, by part of the model.

        Args:
            config: dimensions.
            latent_shape: latent frames, rows and columns.
            tokens: visual tokens.
        """
        return {}

    @classmethod
    def starts_from(cls, other: type[ImageConditioning], config: ModelConfig) -> bool:
        """Whether a run can start from the weights of a model of another paradigm, which has that configuration.

        By default from those whose patch embedding takes the latents alone.
        """
        return other.added_channels(config) == 0

    @classmethod
    def recognise(cls, foreign: ForeignModel) -> dict[str, Any] | None:
        """Values of ``config_fields``, as far as shapes tell, if the weights are of this paradigm; else None."""
        return None

    @classmethod
    def card_rows(cls, config: ModelConfig) -> dict[str, str]:
        """Rows of the model card's table, by title."""
        return {}


def stack_extras(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One sample's extras after the other as one batch."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
