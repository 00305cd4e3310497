"""FlashI2V (arXiv 2509.25187): latent shifting and Fourier guidance.

    x_in    = x_t - phi(z_0)
    tokens += E_F(|high-pass(z_0)|)

phi is a learned projection of the image's latents; the high-pass keeps the bins of the 2-D spectrum beyond the radius
that holds the sample's cutoff ratio of the spectrum's magnitude. The target does not contain phi. Both added parts end
in a layer that starts at zero, so that the first step equals the text-to-video model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_flashi2v.conditioning.interface import (
    ConditionedInput,
    Extras,
    ForeignModel,
    GeneratorOf,
    ImageConditioning,
    OwnTensor,
)
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.sample import ImageSettings
from megatron_flashi2v.config.train import DataArguments
from megatron_flashi2v.flow.highpass import cutoff_ratios, high_frequency_features

CUTOFF_RATIO = "cutoff_ratio"


class LatentShift(nn.Module):
    """phi: two convolutions over latents with a SiLU between, in fp32 whatever the run's precision.

    With a kernel that spans time, the order matters: on one frame the kernel sees zero padding, on the frame repeated
    over time it sees its neighbours. The released 3x3x3 weights were trained with the repeated frame.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        kernel = config.phi_kernel_size
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        channels, hidden = config.latent_channels, config.phi_hidden_channels
        self.conv_in = nn.Conv3d(channels, hidden, kernel, padding=padding, dtype=torch.float32)
        self.conv_out = nn.Conv3d(hidden, channels, kernel, padding=padding, dtype=torch.float32)
        self.repeat_first = config.phi_order == "repeat_then_conv"

    def forward(self, image_latents_BC1HW: Tensor, frames: int) -> Tensor:
        """The shift [B, C, T, H, W], or [B, C, 1, H, W] to be broadcast over ``frames``."""
        source = image_latents_BC1HW.float()
        if self.repeat_first:
            source = source.expand(-1, -1, frames, -1, -1)
        return self.conv_out(F.silu(self.conv_in(source)))


class FourierEmbedding(nn.Module):
    """E_F: a patch projection and a pointwise layer that starts at zero, without an activation between."""

    def __init__(self, patch_dim: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv_in = nn.Linear(patch_dim, hidden_size, dtype=dtype)
        self.conv_out = nn.Linear(hidden_size, hidden_size, dtype=dtype)

    def forward(self, patches_SBP: Tensor) -> Tensor:
        """Token features [S, B, d] in the layer's dtype."""
        return self.conv_out(self.conv_in(patches_SBP.to(self.conv_in.weight.dtype)))


class FlashI2V(ImageConditioning):
    """Latent shifting and Fourier guidance.

    Args:
        config: dimensions; phi's kernel and order.
        highpass: the chosen implementation of the Fourier high-pass.
        dtype: dtype of the Fourier embedding's matrix products; phi and the high-pass are always fp32.
    """

    name = "flashi2v"
    config_fields = ("phi_kernel_size", "phi_hidden_channels", "phi_order")
    # The names of FlashI2V's main branch, which has Wan's for the rest of the model, and of its npu branch.
    external_modules = {
        "phi.conv_in": {"wan": "learnable_proj.proj.0", "flashi2v_npu": "learnable_proj.0"},
        "phi.conv_out": {"wan": "learnable_proj.proj.2", "flashi2v_npu": "learnable_proj.2"},
        "fourier_embedding.conv_in": {"wan": "fourier_embedding.0", "flashi2v_npu": "fourier_embedding.0"},
        "fourier_embedding.conv_out": {"wan": "fourier_embedding.1", "flashi2v_npu": "fourier_embedding.1"},
    }
    token_modules = ("fourier_embedding",)
    latent_modules = ("phi",)

    def __init__(
        self,
        config: ModelConfig,
        highpass: Callable[..., Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(config)
        self.highpass = highpass
        self.phi = LatentShift(config)
        self.fourier_embedding = FourierEmbedding(config.patch_dim, config.hidden_size, dtype)

    def forward(self, noisy_BCTHW: Tensor, image_latents_BC1HW: Tensor, extras: Extras) -> ConditionedInput:
        """Shift the latents, and extract the high-frequency magnitude of the image's latents, repeated over time."""
        frames = noisy_BCTHW.shape[2]
        shifted_BCTHW = noisy_BCTHW.float() - self.phi(image_latents_BC1HW, frames)
        features_BCHW = high_frequency_features(
            image_latents_BC1HW[:, :, 0], extras[CUTOFF_RATIO], highpass=self.highpass
        )
        return ConditionedInput(shifted_BCTHW, features_BCHW.unsqueeze(2).expand(-1, -1, frames, -1, -1))

    def embed_guidance(self, patches_SBP: Tensor) -> Tensor:
        """E_F of the features' patches."""
        return self.fourier_embedding(patches_SBP)

    @classmethod
    def training_extras(
        cls, data: DataArguments, image_shape: tuple[int, int, int, int], generator_of: GeneratorOf
    ) -> dict[str, Tensor]:
        """A cutoff ratio, uniform between the flags' bounds."""
        draw = torch.rand(1, generator=generator_of("cutoff-ratio"))
        return {CUTOFF_RATIO: cutoff_ratios(draw, data.cutoff_ratio_min, data.cutoff_ratio_max)[0]}

    @classmethod
    def sampling_extras(
        cls, settings: ImageSettings, image_shape: tuple[int, int, int, int], generator_of: GeneratorOf
    ) -> dict[str, Tensor]:
        """The cutoff ratio of the settings."""
        return {CUTOFF_RATIO: torch.tensor(settings.cutoff_ratio, dtype=torch.float32)}

    @classmethod
    def meaningful_fields(cls, config: ModelConfig) -> tuple[str, ...]:
        """Without a kernel over time both orders of phi are the same."""
        kernel_frames = config.phi_kernel_size[0]
        return tuple(field for field in cls.config_fields if field != "phi_order" or kernel_frames > 1)

    @classmethod
    def own_tensors(cls, config: ModelConfig) -> dict[str, OwnTensor]:
        """phi's convolutions, and E_F's linears, which are convolutions over patches elsewhere."""
        channels, hidden, width = config.latent_channels, config.phi_hidden_channels, config.hidden_size
        as_convolution = (width, channels, *config.patch_size)
        return {
            "phi.conv_in.weight": OwnTensor(shape=(hidden, channels, *config.phi_kernel_size)),
            "phi.conv_in.bias": OwnTensor(shape=(hidden,)),
            "phi.conv_out.weight": OwnTensor(shape=(channels, hidden, *config.phi_kernel_size), starts_at_zero=True),
            "phi.conv_out.bias": OwnTensor(shape=(channels,)),
            "fourier_embedding.conv_in.weight": OwnTensor(
                shape=(width, config.patch_dim), external_shape=as_convolution
            ),
            "fourier_embedding.conv_in.bias": OwnTensor(shape=(width,)),
            "fourier_embedding.conv_out.weight": OwnTensor(
                shape=(width, width), external_shape=(width, width, 1, 1, 1), starts_at_zero=True
            ),
            "fourier_embedding.conv_out.bias": OwnTensor(shape=(width,)),
        }

    @classmethod
    def multiply_adds(cls, config: ModelConfig, latent_shape: tuple[int, int, int], tokens: int) -> dict[str, int]:
        """phi on one frame or on all, and E_F on every token."""
        frames, height, width = latent_shape
        positions = height * width * (frames if config.phi_order == "repeat_then_conv" else 1)
        per_position = math.prod(config.phi_kernel_size) * config.latent_channels * config.phi_hidden_channels
        return {
            "latent_shift": 2 * positions * per_position,
            "fourier_embedding": tokens * (config.patch_dim * config.hidden_size + config.hidden_size**2),
        }

    @classmethod
    def recognise(cls, foreign: ForeignModel) -> dict[str, Any] | None:
        """By phi, whose kernel and width its first convolution shows."""
        shape = foreign.shape_of(cls.external_name("phi.conv_in.weight", foreign.column), 5)
        return None if shape is None else {"phi_hidden_channels": shape[0], "phi_kernel_size": shape[2:]}

    @classmethod
    def card_rows(cls, config: ModelConfig) -> dict[str, str]:
        """phi's kernel and order."""
        kernel = "x".join(str(side) for side in config.phi_kernel_size)
        return {"phi": f"kernel {kernel}, order {config.phi_order}"}
