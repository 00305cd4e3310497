"""The image's way into a released model: the component beside diffusers' transformer that holds what that lacks.

Weights lie under the names of FlashI2V's main branch, which are this module's own. Paradigms that only concatenate
channels have none; their component is its configuration.

Shape suffixes: B samples, C latent channels, T latent frames, H and W latent rows and columns.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_flashi2v.conditioning.build import build_conditioning
from megatron_flashi2v.conditioning.flashi2v import CUTOFF_RATIO
from megatron_flashi2v.conditioning.interface import ConditionedInput, Extras
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.flow.highpass import high_frequency_features


class LatentShift(nn.Module):
    """phi: two convolutions over latents with a SiLU between."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        kernel = config.phi_kernel_size
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        channels, hidden = config.latent_channels, config.phi_hidden_channels
        self.proj = nn.Sequential(
            nn.Conv3d(channels, hidden, kernel, padding=padding),
            nn.SiLU(),
            nn.Conv3d(hidden, channels, kernel, padding=padding),
        )
        self.repeat_first = config.phi_order == "repeat_then_conv"

    def forward(self, image_latents_BC1HW: Tensor, frames: int) -> Tensor:
        """The shift [B, C, T, H, W], or [B, C, 1, H, W] to be broadcast over ``frames``."""
        # fp32 whatever the pipeline's dtype: the shift moves the latents themselves.
        source = image_latents_BC1HW.float()
        if self.repeat_first:
            source = source.expand(-1, -1, frames, -1, -1)
        return _convolve(F.silu(_convolve(source, self.proj[0])), self.proj[2])


def _convolve(values: Tensor, layer: Any) -> Tensor:
    return F.conv3d(values, layer.weight.float(), layer.bias.float(), padding=layer.padding)


class FlashI2VImageConditioning(ModelMixin, ConfigMixin):
    """Makes a transformer's input from noisy latents and the image's, by the paradigm that the model was trained with.

    Arguments are the fields of :class:`~megatron_flashi2v.config.model.ModelConfig`.
    """

    _keep_in_fp32_modules = ["learnable_proj"]

    @register_to_config
    def __init__(
        self,
        num_layers: int = 30,
        hidden_size: int = 1536,
        ffn_hidden_size: int = 8960,
        num_attention_heads: int = 12,
        latent_channels: int = 16,
        patch_size: Sequence[int] = (1, 2, 2),
        freq_dim: int = 256,
        text_dim: int = 4096,
        text_length: int = 512,
        norm_eps: float = 1e-6,
        conditioning: str = "flashi2v",
        phi_kernel_size: Sequence[int] = (1, 3, 3),
        phi_hidden_channels: int = 64,
        phi_order: str = "conv_then_broadcast",
        mask_channels: int = 4,
        text_cleaning: str = "full",
    ) -> None:
        super().__init__()
        settings = {key: value for key, value in self.config.items() if not key.startswith("_")}
        self.model_config = ModelConfig.from_json(
            {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()},
            source="image_conditioning/config.json",
        )
        # A component without parameters must still know its device.
        self.register_buffer("place", torch.zeros(()), persistent=False)
        if conditioning == "flashi2v":
            patch, channels = self.model_config.patch_size, latent_channels
            self.learnable_proj = LatentShift(self.model_config)
            self.fourier_embedding = nn.Sequential(
                nn.Conv3d(channels, hidden_size, patch, stride=patch), nn.Conv3d(hidden_size, hidden_size, 1)
            )
        else:
            self.concatenation = build_conditioning(self.model_config, None, torch.float32)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **options: Any) -> FlashI2VImageConditioning:
        """As diffusers' models load; a paradigm without weights has no file of them.

        Args:
            path: folder, or Hub repository with ``subfolder``.
            options: as of ``ModelMixin.from_pretrained``.
        """
        places = ("subfolder", "revision", "cache_dir", "local_files_only", "token", "force_download", "proxies")
        config: Any = cls.load_config(path, **{key: options[key] for key in places if key in options})
        if config.get("conditioning", "flashi2v") == "flashi2v":
            return super().from_pretrained(path, **options)
        return cls.from_config(config).eval()

    def forward(self, noisy_BCTHW: Tensor, image_latents_BC1HW: Tensor, extras: Extras) -> ConditionedInput:
        """The transformer's input, and, of FlashI2V, the features that its tokens take up.

        Args:
            noisy_BCTHW: state of the sampler, not shifted, fp32.
            image_latents_BC1HW: normalised latents of the image, fp32.
            extras: what the paradigm takes besides, one row per sample.
        """
        if self.model_config.conditioning != "flashi2v":
            return self.concatenation(noisy_BCTHW, image_latents_BC1HW, extras)
        frames = noisy_BCTHW.shape[2]
        shifted_BCTHW = noisy_BCTHW.float() - self.learnable_proj(image_latents_BC1HW, frames)
        features_BCHW = high_frequency_features(image_latents_BC1HW[:, :, 0], extras[CUTOFF_RATIO])
        return ConditionedInput(shifted_BCTHW, features_BCHW.unsqueeze(2).expand(-1, -1, frames, -1, -1))

    @contextlib.contextmanager
    def guiding(self, transformer: nn.Module, features_BCTHW: Tensor | None) -> Iterator[None]:
        """While open, the transformer's tokens take up the embedded features (nothing, where there are none).

        diffusers' transformer has no input for them; they join the output of its patch embedding.
        """
        if features_BCTHW is None:
            yield
            return
        dtype = next(self.fourier_embedding.parameters()).dtype
        embedded = self.fourier_embedding(features_BCTHW.to(dtype))

        def add(module: nn.Module, inputs: Any, tokens: Tensor) -> Tensor:
            return tokens + embedded.to(tokens.dtype)

        handle = transformer.get_submodule("patch_embedding").register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()
