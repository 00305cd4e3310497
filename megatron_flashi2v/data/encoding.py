"""One shard's work: clips and captions through the frozen encoders into a tar."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.config.prepare import PrepareConfig
from megatron_flashi2v.data.annotations import Entry
from megatron_flashi2v.data.clips import Clip, choose_caption, load_clip
from megatron_flashi2v.data.description import DataInfo
from megatron_flashi2v.data.filters import FilterSettings
from megatron_flashi2v.data.reasons import Drop, DroppedEntry
from megatron_flashi2v.data.shards import ShardIndex, ShardWriter
from megatron_flashi2v.encoders.text import TextEncoder
from megatron_flashi2v.encoders.text_cleaning import clean_text
from megatron_flashi2v.encoders.video_vae import VideoVAE
from megatron_flashi2v.runtime.progress import ProgressReport

MAX_WARNINGS = 20
"""Damaged files that one process warns of; all of them stand in the list of dropped annotations."""

logger = logging.getLogger(__name__)


def filter_settings(config: PrepareConfig) -> FilterSettings:
    """What the configuration wants of a clip."""
    return FilterSettings(
        num_frames=config.num_frames,
        height=config.height,
        width=config.width,
        fps=config.fps,
        min_aspect=config.min_aspect,
        max_aspect=config.max_aspect,
        min_pixels=config.pixel_floor,
        too_long_factor=config.too_long_factor,
        min_motion=config.min_motion,
        max_motion=config.max_motion,
        rules=config.filter_rules,
    )


class Encoders:
    """The VAE and the text encoder, loaded when first needed (a run that finds everything done loads nothing).

    Args:
        config: checked.
        device: where they run.
    """

    def __init__(self, config: PrepareConfig, device: torch.device) -> None:
        self._config = config
        self._inputs = config.inputs()
        self._device = device

    @functools.cached_property
    def vae(self) -> VideoVAE:
        """The video VAE in fp32; the sample's sizes fit its strides."""
        vae = VideoVAE.load(self._inputs.vae, self._device)
        vae.latent_shape(self._config.num_frames, self._config.height, self._config.width)
        return vae

    @functools.cached_property
    def text(self) -> TextEncoder:
        """The text encoder."""
        return TextEncoder.load(
            self._inputs.text_encoder,
            self._inputs.tokenizer,
            self._config.text_length,
            self._device,
            getattr(torch, self._config.text_encoder_dtype),
        )

    @functools.cached_property
    def info(self) -> DataInfo:
        """What all samples have in common."""
        config = self._config
        return DataInfo(
            latent_shape=self.vae.latent_shape(config.num_frames, config.height, config.width),
            text_dim=self.text.text_dim,
            text_length=config.text_length,
            text_cleaning=config.text_cleaning,
            fps=config.fps,
            frames=config.num_frames,
            height=config.height,
            width=config.width,
            vae=self.vae.settings,
            text_encoder=self.text.settings,
        )

    def latents(self, video_CTHW: torch.Tensor) -> torch.Tensor:
        """fp32 [C, T, H, W] on the host."""
        return self.vae.encode(video_CTHW[None])[0].cpu().contiguous()

    def text_rows(self, caption: str) -> torch.Tensor:
        """bf16 [L, text_dim] on the host, of a cleaned caption."""
        return self.text.encode([caption])[0].to(device="cpu", dtype=torch.bfloat16).contiguous()


class ShardWork:
    """Turns annotations into shards.

    Args:
        config: checked.
        encoders: shared by all shards.
        folder: the data set's ``shards`` folder.
        fingerprint: hash of the settings, written into every index and record.
        report: is advanced once per annotation.
    """

    def __init__(
        self, config: PrepareConfig, encoders: Encoders, folder: Path, fingerprint: str, report: ProgressReport
    ) -> None:
        self._config = config
        self._filter = filter_settings(config)
        self._encoders = encoders
        self._folder = folder
        self._fingerprint = fingerprint
        self._report = report
        self._errors = 0

    def run(self, number: int, entries: Sequence[Entry]) -> ShardIndex:
        """Write and publish one shard.

        Args:
            number: the shard's.
            entries: the annotations that it is made of.

        Raises:
            DataError: under ``--strict``, the first damaged file.
            UserError: the disk is full or failing.
        """
        began = time.monotonic()
        dropped: list[DroppedEntry] = []
        writer = ShardWriter(self._folder, number)
        try:
            for entry in entries:
                drop = self._add(writer, entry)
                if drop is not None:
                    dropped.append(entry.dropped(drop))
                self._report.advance()
            return writer.publish(
                fingerprint=self._fingerprint,
                dropped=[row.to_json() for row in dropped],
                seconds=time.monotonic() - began,
            )
        except BaseException:
            writer.discard()
            raise

    def _add(self, writer: ShardWriter, entry: Entry) -> Drop | None:
        clip = load_clip(entry, self._filter, seed=self._config.seed, interpolation=self._config.interpolation)
        if isinstance(clip, Drop):
            return self._refused(clip)
        raw = choose_caption(entry, seed=self._config.seed)
        caption = clean_text(raw, self._config.text_cleaning)
        tensors = {"latents": self._encoders.latents(clip.video_CTHW), "text": self._encoders.text_rows(caption)}
        broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if broken:
            return self._refused(Drop("not_finite", f"{entry.source}: {broken[0]} of {entry.file} are not finite"))
        writer.add(entry.key, tensors, self._record(entry, clip, raw, caption))
        return None

    def _refused(self, drop: Drop) -> Drop:
        if drop.is_error:
            if self._config.strict:
                raise DataError(drop.detail)
            self._errors += 1
            if self._errors <= MAX_WARNINGS:
                logger.warning("dropped (%s): %s", drop.reason, drop.detail)
            if self._errors == MAX_WARNINGS:
                logger.warning("no more damaged files are warned of; the list at the end will name them")
        return drop

    def _record(self, entry: Entry, clip: Clip, raw: str, caption: str) -> dict[str, Any]:
        return {
            "caption": caption,
            "caption_raw": raw,
            "source": entry.path,
            "entry": entry.index,
            "frames": list(clip.indices),
            "fps": self._config.fps,
            "source_fps": clip.facts.fps,
            "source_height": clip.facts.height,
            "source_width": clip.facts.width,
            "crop": None if entry.crop is None else list(entry.crop),
            "settings": self._fingerprint,
        }
