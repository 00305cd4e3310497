"""Which clips become samples, and how: flags of ``prepare``, and of ``train`` with ``--online-encoding``.

Field names are the flags' names and the recipe's keys.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_flashi2v.config.errors import ConfigError

FilterRules = Literal["corrected", "reference"]
Interpolation = Literal["bicubic", "bilinear"]
FramePicking = Literal["time", "index"]
PictureReading = Literal["shown", "stored"]


@dataclass(frozen=True, kw_only=True)
class EncodingSources:
    """What is encoded, and with which encoders."""

    annotations: Path | None = None
    """JSON list of clips (path, cap, ...; paths relative to its folder), or a text file of lines root_dir,meta.json."""
    vae: Path | None = None
    """Folder of diffusers' AutoencoderKLWan."""
    text_encoder: Path | None = None
    """Folder of transformers' UMT5EncoderModel."""
    tokenizer: Path | None = None
    """Folder of the text encoder's tokenizer."""

    def missing(self) -> list[str]:
        """Names of the fields that are not set."""
        return [one.name for one in dataclasses.fields(self) if getattr(self, one.name) is None]


@dataclass(frozen=True, kw_only=True)
class FilterSettings:
    """The size and rate of a sample, and which clips become one; defaults are the reference's."""

    num_frames: int = 49
    """Frames of a sample: 1 + a multiple of the VAE's temporal stride."""
    height: int = 480
    """Rows of a sample, in pixels: a multiple of the VAE's spatial stride."""
    width: int = 832
    """Columns of a sample, in pixels: a multiple of the VAE's spatial stride."""
    fps: float = 16.0
    """Frames per second of a sample."""
    min_aspect: float = 0.5
    """Least height / width of a clip."""
    max_aspect: float = 2.0
    """Greatest height / width of a clip."""
    min_pixels: int | None = None
    """Least height * width of a clip; by default that of a sample."""
    too_long_factor: float = 5.0
    """Greatest length of a clip, in samples."""
    min_motion: float = 0.0
    """Least motion score of a clip."""
    max_motion: float = 1.0
    """Greatest motion score of a clip."""
    filter_rules: FilterRules = "corrected"
    """Filter as FlashI2V's reference does to the letter, or with its slips corrected."""
    frame_picking: FramePicking = "time"
    """Pick frames by presentation time, or by number at the header's rate, as FlashI2V's reference does. Clips of a
    constant rate give the same frames either way."""

    @property
    def pixel_floor(self) -> int:
        """Least height * width of a clip."""
        return self.height * self.width if self.min_pixels is None else self.min_pixels


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """What decides a sample's pixels, besides its annotation, its file and the seed."""

    wanted: FilterSettings = field(default_factory=FilterSettings)
    interpolation: Interpolation = "bicubic"
    """How frames are resized (the reference's main branch: bicubic, its npu branch: bilinear)."""
    picture: PictureReading = "shown"
    """Read the picture that players show (square pixels, mirrors, HDR and transparency resolved, BT.709 from 720 lines
    on), or pixels as they are stored, as FlashI2V's reference does."""


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """What decides a sample's text rows, besides its caption and their greatest number."""

    text_cleaning: Literal["full", "light"] = "full"
    """Cleaning of captions: as the released models were trained (full), or of encoding and white space only."""
    text_encoder_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the text encoder; bfloat16 halves its memory. Rows are stored in bfloat16 either way."""


@dataclass(frozen=True, kw_only=True)
class DecodingSettings:
    """The processes that decode videos; none of it changes a sample."""

    decode_workers: int = 1
    """Processes of each rank that decode ahead; 0 decodes in the rank itself, where nothing contains a crash."""
    decode_timeout_s: float = 120.0
    """Seconds that decoding one clip may take before its process is stopped and the clip dropped."""


@dataclass(frozen=True, kw_only=True)
class EncodingArguments:
    """Which clips become samples, and how; the same for `prepare` and for training with `--online-encoding`."""

    sources: EncodingSources = field(default_factory=EncodingSources)
    clips: ClipSettings = field(default_factory=ClipSettings)
    captions: CaptionSettings = field(default_factory=CaptionSettings)
    decoding: DecodingSettings = field(default_factory=DecodingSettings)


def given(path: Path | None, flag: str) -> Path:
    """A path that must be given.

    Raises:
        ConfigError: it is not.
    """
    if path is None:
        raise ConfigError(f"{flag} must be given")
    return path
