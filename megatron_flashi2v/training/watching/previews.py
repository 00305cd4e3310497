"""Videos that the model in training makes of a few validation images, always the same ones from the same noise."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save
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
from megatron_flashi2v.runtime.files import atomic_write_bytes
from megatron_flashi2v.sampling.denoise import Conditions, denoise
from megatron_flashi2v.sampling.guidance import with_guidance
from megatron_flashi2v.sampling.load import velocity_of
from megatron_flashi2v.sampling.noise import sample_extras, sample_noise
from megatron_flashi2v.sampling.pipeline import to_frames
from megatron_flashi2v.sampling.solvers import EulerSolver
from megatron_flashi2v.sampling.video import StripRow, write_comparison, write_mp4
from megatron_flashi2v.training.watching.observer import Observer
from megatron_flashi2v.training.watching.schedule import Schedule

if TYPE_CHECKING:
    from megatron_flashi2v.training.state import TrainState

SAMPLE_FOLDER = "samples"
SAMPLE_SEED = 0

logger = logging.getLogger(__name__)


def preview_folder(save: Path, iteration: int) -> Path:
    """Folder of an iteration's videos under ``--save``."""
    return save / SAMPLE_FOLDER / f"iter_{iteration:07d}"


class Previews(Observer):
    """Makes and writes the videos when they are due; all ranks do it together, and the replicas share the videos.

    Args:
        arguments: how many, with how many steps, and the VAE.
        save: ``--save``.
        data: validation data; the first positions of its order are the conditions.
        model: resolved dimensions.
        groups: this rank's.
        device: what decodes.
        schedule: when they are due.
        begin_part: called before each replica's next video with what begins; False, on all ranks alike, stops.

    Raises:
        ConfigError: the VAE cannot be loaded, or is not the one of the data.
    """

    def __init__(
        self,
        arguments: WatchArguments,
        save: Path,
        data: Blend,
        model: ModelConfig,
        groups: Groups,
        device: Device,
        schedule: Schedule,
        begin_part: Callable[[str], bool],
    ) -> None:
        self._arguments, self._save, self._data, self._model = arguments, save, data, model
        self._device, self._schedule, self._begin_part = device, schedule, begin_part
        self._replica, self._replicas = groups.dp.rank(), groups.dp.size()
        self._writes = not (groups.tp.rank() or groups.cp.rank() or groups.pp.rank())
        if arguments.sample_vae is not None and self._writes and self._replica == 0:
            self._require_fitting(VideoVAE.load(arguments.sample_vae, "cpu"))

    def between_iterations(self, state: TrainState) -> None:
        """Sample, decode and write where it is due; a run that leaves before the end writes nothing."""
        if not self._schedule.is_due(state.iteration):
            return
        state.gather_weights()
        for model in state.models:
            model.eval()
        try:
            made = {}
            for first in range(0, self._arguments.sample_count, self._replicas):
                if not self._begin_part(f"the samples of iteration {state.iteration}"):
                    return
                index = first + self._replica
                if index < self._arguments.sample_count:
                    made[index] = self._sample(state, index)
                elif state.gathers_blocks:  # from all replicas, so that all compute
                    self._sample(state, self._arguments.sample_count - 1)
        finally:
            for model in state.models:
                model.train()
        if self._writes and made:
            try:
                self._write(preview_folder(self._save, state.iteration), made)
            except Exception as error:  # a full disk, the device's memory; no other rank waits for this
                what = (str(error).splitlines() or [""])[0]
                logger.warning("samples of iteration %d are not written: %s: %s; the run goes on", state.iteration,
                               type(error).__name__, what)

    @torch.no_grad()
    def _sample(self, state: TrainState, index: int) -> tuple[PreparedSample, Tensor]:
        """A validation sample, and latents [1, C, T, H, W] made from its image and its text."""
        (sample,), _ = self._data.read([index])
        shape, device = sample.latents_CTHW.shape, self._device.torch_device
        text_BLD, empty_BLD = (
            pad_text_rows(rows_LD, self._model.text_length).unsqueeze(0).to(device)
            for rows_LD in (sample.text_rows_LD, self._data.empty_text_rows_LD)
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
        return sample, latents_BCTHW

    def _write(self, folder: Path, made: dict[int, tuple[PreparedSample, Tensor]]) -> None:
        if self._arguments.sample_vae is None:
            for index, (_, latents_BCTHW) in made.items():
                path = folder / f"sample_{index:03d}.safetensors"
                atomic_write_bytes(path, save({"latents_BCTHW": latents_BCTHW.cpu().contiguous()}))
        else:
            # Loaded each time, so that between samples its memory is training's.
            vae = VideoVAE.load(self._arguments.sample_vae, self._device.torch_device)
            for index, (sample, latents_BCTHW) in made.items():
                source, video = (
                    to_frames(vae.decode(latents))[0] for latents in (sample.latents_CTHW.unsqueeze(0), latents_BCTHW)
                )
                write_mp4(folder / f"sample_{index:03d}.mp4", video, self._data.info.fps)
                write_comparison(folder / f"sample_{index:03d}.png", [
                    StripRow(frames_THWC=source, label="validation clip"),
                    StripRow(frames_THWC=video, label=f"sample: {sample.caption}"),
                ])
            del vae
            self._device.empty_cache()
        logger.info("wrote samples to %s", folder)

    def _require_fitting(self, vae: VideoVAE) -> None:
        info = self._data.info
        for shape in self._data.latent_shapes:
            if vae.latent_channels != shape[0] or vae.temporal_stride != (info.temporal_stride or vae.temporal_stride):
                raise ConfigError(
                    f"--sample-vae {self._arguments.sample_vae} makes latents of {vae.latent_channels} channels with "
                    f"temporal stride {vae.temporal_stride}; those of {self._data.name} have {shape[0]} and "
                    f"{info.temporal_stride}: give the VAE that prepared the data"
                )
