"""Videos that the model in training makes of a few validation images, always the same ones from the same noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_flashi2v.conditioning.build import paradigm_of
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.sample import DEFAULT_SHIFT, ImageSettings
from megatron_flashi2v.config.watch import WatchArguments
from megatron_flashi2v.data.blend import Blend
from megatron_flashi2v.data.prepared import PreparedSample, pad_text_rows
from megatron_flashi2v.encoders.video_vae import VideoVAE
from megatron_flashi2v.flow.sigmas import inference_sigmas
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.sampling.denoise import Conditions, denoise
from megatron_flashi2v.sampling.guidance import with_guidance
from megatron_flashi2v.sampling.load import velocity_of
from megatron_flashi2v.sampling.noise import sample_extras, sample_noise
from megatron_flashi2v.sampling.solvers import EulerSolver

if TYPE_CHECKING:
    from megatron_flashi2v.training.state import TrainState

SAMPLE_SEED = 0


@dataclass(frozen=True, kw_only=True)
class MadeVideo:
    """A validation sample, and the latents [1, C, T, H, W] that were made from its image and its text, on the host."""

    sample: PreparedSample
    latents_BCTHW: Tensor


class ValidationVideos:
    """Makes the videos for all observers that want them; all ranks do it together, and the replicas share the videos.

    Args:
        arguments: how many, with how many steps, and the VAE.
        data: validation data; the first positions of its order are the conditions.
        model: resolved dimensions.
        groups: this rank's.
        device: what this rank runs on.
        begin_part: called before each replica's next video with what begins; False, on all ranks alike, stops.

    Attributes:
        data: as given.
        keeps: whether this rank is its replica's that gets the videos.

    Raises:
        ConfigError: the VAE cannot be loaded, or is not the one of the data.
    """

    def __init__(
        self,
        arguments: WatchArguments,
        data: Blend,
        model: ModelConfig,
        groups: Groups,
        device: Device,
        begin_part: Callable[[str], bool],
    ) -> None:
        self.data, self._arguments, self._model = data, arguments, model
        self._device, self._begin_part = device, begin_part
        self._replica, self._replicas = groups.dp.rank(), groups.dp.size()
        self.keeps = not (groups.tp.rank() or groups.cp.rank() or groups.pp.rank())
        self._last: tuple[int, dict[int, MadeVideo]] | None = None
        if arguments.sample_vae is not None and self.keeps and self._replica == 0:
            self._require_fitting(VideoVAE.load(arguments.sample_vae, "cpu"))

    def make(self, state: TrainState) -> dict[int, MadeVideo] | None:
        """This replica's videos by their places, on the rank that keeps them; None where the run leaves before the end.

        A second observer at the same iteration gets what was made for the first.
        """
        if self._last is None or self._last[0] != state.iteration:
            made = self._made(state)
            if made is None:
                return None
            self._last = state.iteration, made
        return self._last[1]

    def _made(self, state: TrainState) -> dict[int, MadeVideo] | None:
        state.gather_weights()
        for model in state.models:
            model.eval()
        try:
            made = {}
            for first in range(0, self._arguments.sample_count, self._replicas):
                if not self._begin_part(f"the samples of iteration {state.iteration}"):
                    return None
                index = first + self._replica
                if index < self._arguments.sample_count:
                    made[index] = self._sample(state, index)
                elif state.gathers_blocks:  # from all replicas, so that all compute
                    self._sample(state, self._arguments.sample_count - 1)
            return made if self.keeps else {}
        finally:
            for model in state.models:
                model.train()

    @torch.no_grad()
    def _sample(self, state: TrainState, index: int) -> MadeVideo:
        (sample,), _ = self.data.read([index])
        shape, device = sample.latents_CTHW.shape, self._device.torch_device
        text_BLD, empty_BLD = (
            pad_text_rows(rows_LD, self._model.text_length).unsqueeze(0).to(device)
            for rows_LD in (sample.text_rows_LD, self.data.empty_text_rows_LD)
        )
        paradigm = paradigm_of(self._model)
        extras = {
            **sample_extras(paradigm, ImageSettings(), SAMPLE_SEED, [index], shape),
            **{name: sample.inputs[name].unsqueeze(0) for name in paradigm.stored_inputs(self._model, shape)},
        }
        latents_BCTHW = denoise(
            velocity_of(state.stages),
            sample_noise(SAMPLE_SEED, [index], shape).to(device),
            Conditions(
                text_BLD=text_BLD,
                image_latents_BC1HW=sample.latents_CTHW[:, :1].unsqueeze(0).to(device),
                extras={name: value.to(device) for name, value in extras.items()},
            ),
            EulerSolver(inference_sigmas(self._arguments.sample_num_steps, DEFAULT_SHIFT)),
            guidance=partial(
                with_guidance, negative_text_BLD=empty_BLD, guidance_scale=self._arguments.sample_guidance_scale
            ),
        )
        return MadeVideo(sample=sample, latents_BCTHW=latents_BCTHW.cpu())

    def _require_fitting(self, vae: VideoVAE) -> None:
        info = self.data.info
        for shape in self.data.latent_shapes:
            if vae.latent_channels != shape[0] or vae.temporal_stride != (info.temporal_stride or vae.temporal_stride):
                raise ConfigError(
                    f"--sample-vae {self._arguments.sample_vae} makes latents of {vae.latent_channels} channels with "
                    f"temporal stride {vae.temporal_stride}; those of {self.data.name} have {shape[0]} and "
                    f"{info.temporal_stride}: give the VAE that prepared the data"
                )
