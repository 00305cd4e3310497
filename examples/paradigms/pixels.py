"""Pixels as latents: space-to-depth in place of a VAE, one row for each law in place of a text encoder.

It is exact and costs nothing, so that small models learn the world and not a codec. Both stand where
:class:`~megatron_flashi2v.sampling.pipeline.ImageToVideoPipeline` takes its encoders.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.data.description import DATASET_FILE, DataInfo, write_description
from megatron_flashi2v.data.fingerprint import settings_hash
from megatron_flashi2v.data.shards import SHARD_FOLDER, ShardWriter
from megatron_flashi2v.data.transforms import to_model_range
from megatron_flashi2v.encoders.video_vae import Strides
from paradigms.world import LAWS, Board, Clip

STRIDE = 2
LATENT_CHANNELS = 3 * STRIDE**2
MEAN, STD = -0.5, 0.3
"""Of the world's pixels in [-1, 1], about: the latents have the noise's scale."""
TEXT_DIM, TEXT_LENGTH = 16, 1
FPS = 8.0
SAMPLES_PER_SHARD = 64


class PixelVAE:
    """Blocks of :data:`STRIDE` x :data:`STRIDE` pixels as channels, with the methods of a ``VideoVAE``."""

    latent_channels = LATENT_CHANNELS
    strides = Strides(temporal=1, spatial=STRIDE)
    temporal_stride, spatial_stride = 1, STRIDE

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the latents, JSON-ready."""
        return {"class": "PixelVAE", "stride": STRIDE, "mean": MEAN, "std": STD}

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of a clip's latents."""
        return self.latent_channels, *self.strides.latent_grid(frames, height, width)

    def encode(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        """RGB in [-1, 1] to latents, fp32 ``[B, 12, T, H / 2, W / 2]``."""
        unshuffled_BTCHW = F.pixel_unshuffle(video_BCTHW.float().transpose(1, 2), STRIDE)
        return (unshuffled_BTCHW.transpose(1, 2) - MEAN) / STD

    def decode(self, latents_BCTHW: torch.Tensor) -> torch.Tensor:
        """The reverse, clamped to [-1, 1]."""
        shuffled_BTCHW = F.pixel_shuffle((latents_BCTHW.float() * STD + MEAN).transpose(1, 2), STRIDE)
        return shuffled_BTCHW.transpose(1, 2).clamp(-1.0, 1.0)


class LawRows:
    """A text encoder that knows the laws' names: one row a caption, which is one-hot."""

    text_dim = TEXT_DIM

    def encode(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """``[1, D]`` for each caption; the empty prompt has a row of its own.

        Raises:
            ConfigError: a prompt that names no law.
        """
        return [self._row(prompt) for prompt in prompts]

    def _row(self, prompt: str) -> torch.Tensor:
        named = [law for law in LAWS if law in prompt.split()]
        if prompt and len(named) != 1:
            raise ConfigError(f"prompt {prompt!r}: names {len(named)} of the laws {', '.join(LAWS)}; name one")
        row_LD = torch.zeros(1, TEXT_DIM)
        row_LD[0, LAWS.index(named[0]) if prompt else len(LAWS)] = TEXT_DIM**0.5
        return row_LD


def clip_latents(clip: Clip) -> torch.Tensor:
    """Latents of the true clip, fp32 ``[C, T, H, W]``."""
    pixels_CTHW = to_model_range(torch.from_numpy(clip.frames_THWC).permute(0, 3, 1, 2))
    return PixelVAE().encode(pixels_CTHW.unsqueeze(0))[0]


def write_shards(folder: Path, clips: Sequence[Clip], board: Board) -> None:
    """Write a prepared data set that ``flashi2v train --data-path`` takes."""
    vae, rows = PixelVAE(), LawRows()
    settings = {"clips": [clip.key for clip in clips], "cells": board.cells, "frames": board.frames, **vae.settings}
    fingerprint = settings_hash(settings)
    shards = folder / SHARD_FOLDER
    shards.mkdir(parents=True, exist_ok=True)
    (folder / DATASET_FILE).unlink(missing_ok=True)
    indices = []
    for number, first in enumerate(range(0, len(clips), SAMPLES_PER_SHARD)):
        writer = ShardWriter(shards, number)
        for clip in clips[first : first + SAMPLES_PER_SHARD]:
            tensors = {
                "latents": clip_latents(clip).contiguous(),
                "text": rows.encode([clip.caption])[0].to(torch.bfloat16),
            }
            writer.add(clip.key, tensors, {"caption": clip.caption, "law": clip.law, "object": clip.object})
        indices.append(writer.publish(fingerprint=fingerprint, dropped=[], seconds=0.0))
    info = DataInfo(
        latent_shape=vae.latent_shape(board.frames, board.pixels, board.pixels),
        text_dim=TEXT_DIM, text_length=TEXT_LENGTH, text_cleaning="light", fps=FPS,
        frames=board.frames, height=board.pixels, width=board.pixels, vae=vae.settings,
        text_encoder={"class": "LawRows", "laws": list(LAWS)},
    )
    write_description(
        folder, info=info, settings=settings, fingerprint=fingerprint, indices=indices,
        empty_text_rows_LD=rows.encode([""])[0].to(torch.bfloat16),
    )
