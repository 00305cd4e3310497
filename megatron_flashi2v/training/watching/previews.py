"""Writes the videos that the model in training makes of validation images."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save

from megatron_flashi2v.encoders.video_vae import VideoVAE
from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.runtime.files import atomic_write_bytes
from megatron_flashi2v.sampling.pipeline import to_frames
from megatron_flashi2v.sampling.video import StripRow, write_comparison, write_mp4
from megatron_flashi2v.training.watching.observer import Observer
from megatron_flashi2v.training.watching.schedule import Schedule
from megatron_flashi2v.training.watching.videos import MadeVideo, ValidationVideos

if TYPE_CHECKING:
    from megatron_flashi2v.training.state import TrainState

SAMPLE_FOLDER = "samples"

logger = logging.getLogger(__name__)


def preview_folder(save: Path, iteration: int) -> Path:
    """Folder of an iteration's videos under ``--save``."""
    return save / SAMPLE_FOLDER / f"iter_{iteration:07d}"


class Previews(Observer):
    """Writes the videos when they are due.

    Args:
        videos: makes them, on all ranks together.
        vae: decodes them; without it their latents are written.
        save: ``--save``.
        device: what decodes.
        schedule: when they are due.
    """

    def __init__(
        self, videos: ValidationVideos, vae: Path | None, save: Path, device: Device, schedule: Schedule
    ) -> None:
        self._videos, self._vae, self._save = videos, vae, save
        self._device, self._schedule = device, schedule

    def between_iterations(self, state: TrainState) -> None:
        """Sample, decode and write where it is due; a run that leaves before the end writes nothing."""
        made = self._videos.make(state) if self._schedule.is_due(state.iteration) else None
        if made:
            try:
                self._write(preview_folder(self._save, state.iteration), made)
            except Exception as error:  # a full disk, the device's memory; no other rank waits for this
                what = (str(error).splitlines() or [""])[0]
                logger.warning("samples of iteration %d are not written: %s: %s; the run goes on", state.iteration,
                               type(error).__name__, what)

    def _write(self, folder: Path, made: dict[int, MadeVideo]) -> None:
        if self._vae is None:
            for index, video in made.items():
                path = folder / f"sample_{index:03d}.safetensors"
                atomic_write_bytes(path, save({"latents_BCTHW": video.latents_BCTHW.contiguous()}))
        else:
            # Loaded each time, so that between samples its memory is training's.
            vae, fps = VideoVAE.load(self._vae, self._device.torch_device), self._videos.data.info.fps
            for index, video in made.items():
                source_THWC, frames_THWC = (
                    to_frames(vae.decode(latents))[0]
                    for latents in (video.sample.latents_CTHW.unsqueeze(0), video.latents_BCTHW)
                )
                write_mp4(folder / f"sample_{index:03d}.mp4", frames_THWC, fps)
                write_comparison(folder / f"sample_{index:03d}.png", [
                    StripRow(frames_THWC=source_THWC, label="validation clip"),
                    StripRow(frames_THWC=frames_THWC, label=f"sample: {video.sample.caption}"),
                ])
            del vae
            self._device.empty_cache()
        logger.info("wrote samples to %s", folder)
