"""One shard's work: clips and captions through the frozen encoders into a tar."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_flashi2v.conditioning.wan_i2v import GREY_CLIP, IMAGE_ROWS
from megatron_flashi2v.config.clips import given
from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.config.prepare import EncodingConfig
from megatron_flashi2v.data.annotations import Entry
from megatron_flashi2v.data.captions import example_of
from megatron_flashi2v.data.clips import Frames, choose_caption
from megatron_flashi2v.data.decoder import Decoder
from megatron_flashi2v.data.description import DataInfo
from megatron_flashi2v.data.prepared import PreparedSample
from megatron_flashi2v.data.reasons import Drop, DroppedEntry
from megatron_flashi2v.data.shards import ShardIndex, ShardWriter
from megatron_flashi2v.encoders.image import ImageEncoder
from megatron_flashi2v.encoders.image_inputs import encode_image_inputs
from megatron_flashi2v.encoders.text import TextEncoder
from megatron_flashi2v.encoders.text_cleaning import clean_text, lost_most
from megatron_flashi2v.encoders.video_vae import VideoVAE
from megatron_flashi2v.runtime.progress import ProgressReport

MAX_WARNINGS = 20
"""Damaged files that one process warns of; all of them stand in the list of dropped annotations."""

logger = logging.getLogger(__name__)


def make_decoder(config: EncodingConfig) -> Decoder:
    """Return the decoder of this process's clips."""
    clips, decoding = config.arguments.clips, config.arguments.decoding
    return Decoder(clips, config.seed, workers=decoding.decode_workers, limit_s=decoding.decode_timeout_s)


class Encoders:
    """The VAE, the text encoder and, if asked for, the image encoder, loaded when first needed.

    A run that finds everything done loads nothing.

    Args:
        config: checked.
        device: where they run.
    """

    def __init__(self, config: EncodingConfig, device: torch.device) -> None:
        self._text_length = config.text_length
        self._sources, self._clips = config.arguments.sources, config.arguments.clips
        self._wanted = self._clips.wanted
        self._captions = config.arguments.captions
        self._device = device

    @functools.cached_property
    def vae(self) -> VideoVAE:
        """The video VAE; the sample's sizes fit its strides."""
        vae = VideoVAE.load(given(self._sources.vae, "--vae"), self._device, getattr(torch, self._clips.vae_dtype))
        vae.latent_shape(self._wanted.num_frames, self._wanted.height, self._wanted.width)
        return vae

    @functools.cached_property
    def text(self) -> TextEncoder:
        """The text encoder."""
        return TextEncoder.load(
            given(self._sources.text_encoder, "--text-encoder"),
            given(self._sources.tokenizer, "--tokenizer"),
            self._text_length,
            self._device,
            getattr(torch, self._captions.text_encoder_dtype),
        )

    @functools.cached_property
    def image(self) -> ImageEncoder | None:
        """The image encoder; None where none is asked for."""
        folder = self._sources.image_encoder
        return None if folder is None else ImageEncoder.load(folder, self._device)

    @functools.cached_property
    def info(self) -> DataInfo:
        """Properties common to all samples."""
        wanted, image = self._wanted, self.image
        latent_shape = self.vae.latent_shape(wanted.num_frames, wanted.height, wanted.width)
        stores_clip = self._clips.grey_clip or image is not None
        inputs: dict[str, tuple[int, ...]] = {GREY_CLIP: latent_shape} if stores_clip else {}
        if image is not None:
            inputs[IMAGE_ROWS] = image.shape
        return DataInfo(
            latent_shape=latent_shape,
            text_dim=self.text.text_dim,
            text_length=self._text_length,
            text_cleaning=self._captions.text_cleaning,
            fps=wanted.fps,
            frames=wanted.num_frames,
            height=wanted.height,
            width=wanted.width,
            interpolation=self._clips.interpolation,
            vae=self.vae.settings,
            text_encoder=self.text.settings,
            inputs=inputs,
            image_encoder={} if image is None else image.settings,
        )

    def latents(self, video_CTHW: torch.Tensor) -> torch.Tensor:
        """fp32 [C, T, H, W] on the host."""
        return self.vae.encode(video_CTHW[None])[0].cpu().contiguous()

    def inputs(self, video_CTHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a sample holds beside latents and text, on the host: of its first frame, fp32; rows in bf16."""
        first_BC1HW, names = video_CTHW[None, :, :1], self.info.inputs
        found = encode_image_inputs(names, first_BC1HW, video_CTHW.shape[1], self.vae, self.image)
        # As text rows are.
        dtypes = {name: torch.bfloat16 if name == IMAGE_ROWS else torch.float32 for name in found}
        return {name: rows[0].to(device="cpu", dtype=dtypes[name]).contiguous() for name, rows in found.items()}

    def text_rows(self, caption: str) -> torch.Tensor:
        """bf16 [L, text_dim] on the host, of a cleaned caption."""
        return self.text.encode([caption])[0].to(device="cpu", dtype=torch.bfloat16).contiguous()


@dataclass(frozen=True, kw_only=True)
class EncodedClip:
    """One sample as the encoders made it.

    Attributes:
        sample: with the cleaned caption, as it was tokenised.
        caption_raw: as annotated.
    """

    sample: PreparedSample
    caption_raw: str


def encode_clip(config: EncodingConfig, encoders: Encoders, entry: Entry, frames: Frames) -> EncodedClip | Drop:
    """A clip's frames and one of its captions through the encoders."""
    raw = choose_caption(entry, seed=config.seed)
    caption = clean_text(raw, config.arguments.captions.text_cleaning)
    video_CTHW = frames.clip().video_CTHW
    sample = PreparedSample(
        latents_CTHW=encoders.latents(video_CTHW), text_rows_LD=encoders.text_rows(caption), caption=caption,
        key=entry.key, inputs=encoders.inputs(video_CTHW),
    )
    for name, tensor in sample.tensors.items():
        if not torch.isfinite(tensor).all():
            return Drop("not_finite", f"{entry.source}: {name} of {entry.file} are not finite")
    return EncodedClip(sample=sample, caption_raw=raw)


class ShardWork:
    """Turns annotations into shards.

    Args:
        config: checked.
        encoders: shared by all shards.
        folder: the data set's ``shards`` folder.
        fingerprint: hash of the settings, written into every index and record.
        report: is advanced once per annotation.
        strict: raise at the first damaged file.
    """

    def __init__(
        self, config: EncodingConfig, encoders: Encoders, folder: Path, fingerprint: str, report: ProgressReport,
        *, strict: bool = False,
    ) -> None:
        self._config, self._strict = config, strict
        self._decoder = make_decoder(config)
        self._encoders = encoders
        self._folder = folder
        self._fingerprint = fingerprint
        self._report = report
        self._errors = 0
        self._emptied: list[str] = []

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
        self._emptied = []
        writer = ShardWriter(self._folder, number)
        try:
            with contextlib.closing(self._decoder.decode(entries)) as clips:
                for entry, found in zip(entries, clips, strict=True):
                    drop = self._add(writer, entry, found)
                    if drop is not None:
                        dropped.append(entry.dropped(self._refused(drop)))
                    self._report.advance()
            return writer.publish(
                fingerprint=self._fingerprint,
                dropped=[row.to_json() for row in dropped],
                seconds=time.monotonic() - began,
                emptied=len(self._emptied),
                emptied_example=next(iter(self._emptied), ""),
            )
        except BaseException:
            writer.discard()
            raise

    def close(self) -> None:
        """End the decoder's processes."""
        self._decoder.close()

    def _add(self, writer: ShardWriter, entry: Entry, found: Frames | Drop) -> Drop | None:
        if isinstance(found, Drop):
            return found
        encoded = encode_clip(self._config, self._encoders, entry, found)
        if isinstance(encoded, Drop):
            return encoded
        if lost_most(encoded.caption_raw, encoded.sample.caption):
            self._emptied.append(example_of(encoded.caption_raw, encoded.sample.caption))
        writer.add(entry.key, encoded.sample.tensors, self._record(entry, found, encoded))
        return None

    def _refused(self, drop: Drop) -> Drop:
        if drop.is_error:
            if self._strict:
                raise DataError(drop.detail)
            self._errors += 1
            if self._errors <= MAX_WARNINGS:
                logger.warning("dropped (%s): %s", drop.reason, drop.detail)
            if self._errors == MAX_WARNINGS:
                logger.warning("further damaged files are not logged; the list at the end names them")
        return drop

    def _record(self, entry: Entry, frames: Frames, encoded: EncodedClip) -> dict[str, Any]:
        return {
            "caption": encoded.sample.caption,
            "caption_raw": encoded.caption_raw,
            "source": entry.shown_path,
            "text_rows": len(encoded.sample.text_rows_LD),
            "entry": entry.index,
            "frames": list(frames.indices),
            "fps": self._config.arguments.clips.wanted.fps,
            "source_fps": frames.facts.fps,
            "source_frames": frames.facts.num_frames,
            "source_height": frames.facts.height,
            "source_width": frames.facts.width,
            "crop": None if entry.crop is None else list(entry.crop),
            "settings": self._fingerprint,
        }
