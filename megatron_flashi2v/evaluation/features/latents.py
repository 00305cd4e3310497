"""``latents:FOLDER``: statistics of a video VAE's latents; no network but the one that the model was trained on.

Shapes: C latent channels, T latent frames, H and W latent rows and columns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.encoders.video_vae import VideoVAE
from megatron_flashi2v.evaluation.chunks import Chunks
from megatron_flashi2v.evaluation.features.base import VideoFeatures, folder_sha256
from megatron_flashi2v.evaluation.videos import VideoShape


class LatentFeatures(VideoFeatures):
    """Of each channel: the mean, the spread over positions, and the mean change from one latent frame to the next.

    The video is encoded whole, since the VAE is causal and its latent frames after the first stand for whole groups of
    frames; chunks are cut from the latents.

    Args:
        folder: the VAE's, in diffusers' layout.
        device: where it runs.

    Raises:
        ConfigError: a file is missing or damaged, or the folder holds another model.
    """

    measure = "Fréchet distance of latent statistics"

    def __init__(self, folder: Path, device: torch.device | str) -> None:
        self._vae, self._device = VideoVAE.load(folder, device), device
        self._sha256 = folder_sha256(folder, ("config.json", "*.safetensors"))
        self.width = 3 * self._vae.latent_channels

    def settings(self) -> dict[str, Any]:
        return {"features": "latents", "width": self.width, "sha256": self._sha256,
                "statistics": ["mean", "spread over positions", "change over time"]}  # fmt: skip

    def check(self, chunks: Chunks, shape: VideoShape) -> None:
        stride = self._vae.temporal_stride
        if chunks.first != 1:
            raise ConfigError("--include-first: a VAE's first latent frame is frame 0 alone; leave it out for latents")
        if chunks.frames % stride:
            raise ConfigError(
                f"--chunk-frames is {chunks.frames}; this VAE's temporal stride is {stride}, so it must be a multiple "
                f"of {stride}"
            )
        self._vae.latent_shape(1 + chunks.frames, shape.height, shape.width)

    def of_chunks(self, frames_THWC: torch.Tensor, chunks: Chunks) -> torch.Tensor:
        latents_CTHW = self._encoded(frames_THWC[None, : 1 + chunks.count * chunks.frames])[0]
        length = chunks.frames // self._vae.temporal_stride
        parts = [latents_CTHW[:, place : place + length + 1] for place in range(0, chunks.count * length, length)]
        # The frame before a chunk is there to measure the change into it, and nothing else.
        return torch.stack([statistics(part[:, 1:], part) for part in parts]).cpu()

    def embed(self, clips_BTHWC: torch.Tensor) -> torch.Tensor:
        latents_BCTHW = self._encoded(clips_BTHWC)
        return torch.stack([statistics(latents, latents) for latents in latents_BCTHW])

    def _encoded(self, clips_BTHWC: torch.Tensor) -> torch.Tensor:
        video_BCTHW = clips_BTHWC.to(self._device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        return self._vae.encode(video_BCTHW)


def statistics(latents_CTHW: torch.Tensor, with_before_CTHW: torch.Tensor) -> torch.Tensor:
    """``[3 C]``: mean, spread over positions, and change over time (0 for a single frame)."""
    mean = latents_CTHW.mean(dim=(1, 2, 3))
    spread = latents_CTHW.flatten(2).std(dim=2, unbiased=False).mean(dim=1)
    change = torch.zeros_like(mean)
    if with_before_CTHW.shape[1] > 1:
        change = with_before_CTHW.diff(dim=1).abs().mean(dim=(1, 2, 3))
    return torch.cat((mean, spread, change))
