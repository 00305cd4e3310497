"""``--mock-data``: samples of random numbers, made when they are needed, to measure a machine without data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from megatron_flashi2v.conditioning.build import paradigm_of
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.prepare import EncodingConfig
from megatron_flashi2v.data.description import DataInfo
from megatron_flashi2v.data.fingerprint import settings_hash
from megatron_flashi2v.data.prepared import BadSample, PreparedSample
from megatron_flashi2v.encoders.video_vae import WAN_STRIDES, read_strides
from megatron_flashi2v.runtime.random import keyed_generator

SAMPLES = 1024
"""In an epoch."""


class MockDataset:
    """Latents, text rows and what the paradigm takes besides, of unit variance, by (seed, index) alone.

    Args:
        config: size and rate of a sample, and the seed; a VAE, if named, gives its strides, or else Wan's hold.
        model: channels of the latents, width and number of text rows, and the paradigm.

    Raises:
        ConfigError: the size does not fit the strides, or the VAE's folder cannot be read.
    """

    is_collective = False
    name = "--mock-data"

    def __init__(self, config: EncodingConfig, model: ModelConfig) -> None:
        clip, vae = config.arguments.clips.wanted, config.arguments.sources.vae
        strides = WAN_STRIDES if vae is None else read_strides(vae)
        self.info = DataInfo(
            latent_shape=(model.latent_channels, *strides.latent_grid(clip.num_frames, clip.height, clip.width)),
            text_dim=model.text_dim, text_length=model.text_length,
            text_cleaning=config.arguments.captions.text_cleaning, fps=clip.fps, frames=clip.num_frames,
            height=clip.height, width=clip.width,
        )
        self._seed = config.seed
        inputs = dict(paradigm_of(model).stored_inputs(model, self.info.latent_shape))
        self.info = dataclasses.replace(self.info, inputs=inputs)
        self.fingerprint = settings_hash({"mock": self.info.to_json(), "seed": self._seed})
        self.empty_text_rows_LD = self._draw("empty-text", 0, 1, model.text_dim).bfloat16()

    def __len__(self) -> int:
        return SAMPLES

    def fetch(self, indices: Sequence[int]) -> list[PreparedSample | BadSample]:
        """The samples, each with as many text rows as a caption may have."""
        return [
            PreparedSample(
                latents_CTHW=self._draw("latents", index, *self.info.latent_shape),
                text_rows_LD=self._draw("text", index, self.info.text_length, self.info.text_dim).bfloat16(),
                caption=f"mock {index}", key=f"mock-{index:04d}",
                inputs={name: self._draw(name, index, *shape) for name, shape in self.info.inputs.items()},
            )
            for index in indices
        ]

    def close(self) -> None:
        """Nothing is open."""

    def _draw(self, what: str, index: int, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=keyed_generator(self._seed, f"mock-{what}", index))
