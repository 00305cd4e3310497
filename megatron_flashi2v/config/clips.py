"""Which clips become samples, and how: flags of ``prepare``, and of ``train`` with ``--online-encoding``.

Field names are the flags' names and the recipe's keys.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from megatron_flashi2v.config.bounds import Above, AtLeast
from megatron_flashi2v.config.errors import ConfigError

FilterRules = Literal["corrected", "reference"]
Interpolation = Literal["bicubic", "bilinear"]
FramePicking = Literal["time", "index"]
PictureReading = Literal["shown", "stored"]


@dataclass(frozen=True, kw_only=True)
class EncodingSources:
    """Annotations and encoders."""

    annotations: Path | None = None
    """Clips (path, cap, ...; paths relative to its folder) as a JSON list, JSON lines or CSV; a folder of videos with a
    .txt each; or a text file of lines root_dir,meta.json."""
    vae: Path | None = None
    """Folder of diffusers' AutoencoderKLWan, or of a release with it, or OWNER/NAME:SUBFOLDER of a Hub repository."""
    text_encoder: Path | None = None
    """Folder of transformers' UMT5EncoderModel, likewise."""
    tokenizer: Path | None = None
    """Folder of the text encoder's tokenizer, likewise."""
    image_encoder: Path | None = None
    """Folder of transformers' CLIPVisionModel, likewise, with its image processor: its rows of each condition image are
    stored too, for --conditioning wan_i2v."""

    def missing(self) -> list[str]:
        """Names of the fields that are not set and must be."""
        return [
            one.name for one in dataclasses.fields(self)
            if one.name != "image_encoder" and getattr(self, one.name) is None
        ]


@dataclass(frozen=True, kw_only=True)
class FilterSettings:
    """Size and rate of a sample, and the clips that become one.

    Defaults are the reference's.
    """

    num_frames: Annotated[int, AtLeast(1)] = 49
    """Frames of a sample: 1 + a multiple of the VAE's temporal stride."""
    height: Annotated[int, AtLeast(1)] = 480
    """Rows of a sample, in pixels: a multiple of the VAE's spatial stride."""
    width: Annotated[int, AtLeast(1)] = 832
    """Columns of a sample, in pixels: a multiple of the VAE's spatial stride."""
    fps: Annotated[float, Above(0)] = 16.0
    """Frames per second of a sample."""
    min_aspect: Annotated[float, Above(0)] = 0.5
    """Least height / width of a clip."""
    max_aspect: Annotated[float, Above(0)] = 2.0
    """Greatest height / width of a clip."""
    min_pixels: Annotated[int | None, AtLeast(0)] = None
    """Least height * width of a clip; by default that of a sample."""
    too_long_factor: Annotated[float, AtLeast(1)] = 5.0
    """Greatest length of a clip, in lengths of a sample."""
    min_motion: float = 0.0
    """Least motion score of a clip."""
    max_motion: float = 1.0
    """Greatest motion score of a clip."""
    filter_rules: FilterRules = "corrected"
    """Filter as FlashI2V's reference does, to the letter, or with its slips corrected."""
    frame_picking: FramePicking = "time"
    """Pick frames by presentation time, or by number at the header's rate, as FlashI2V's reference does. Clips of a
    constant rate give the same frames either way."""

    @property
    def pixel_floor(self) -> int:
        """Least height * width of a clip."""
        return self.height * self.width if self.min_pixels is None else self.min_pixels


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """Settings of a sample's pixels."""

    wanted: FilterSettings = field(default_factory=FilterSettings)
    interpolation: Interpolation = "bicubic"
    """Interpolation when frames are resized (the reference's main branch: bicubic, its npu branch: bilinear)."""
    picture: PictureReading = "shown"
    """Read the picture that players show (square pixels, mirrors, HDR and transparency resolved, BT.709 from 720 lines
    on), or pixels as they are stored, as FlashI2V's reference does."""
    grey_clip: bool = False
    """Store the latents of the clip that shows the image and then mid grey, for --conditioning wan_i2v without an image
    encoder (Wan2.2); --image-encoder stores them as well."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the VAE; bfloat16 takes two thirds of the time (0.71 s against 1.07 s a clip of 49 frames at 480x832
    on an H200) and moves the latents, stored in float32 either way, by 0.57% (the quickstart's VAE)."""


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """Text rows of a sample."""

    text_cleaning: Literal["full", "light"] = "full"
    """Cleaning of captions: full, or light, of encoding and white space only. Full is the default because the released
    models, whose training is continued and whose data are blended, were trained so. It removes Chinese characters, also
    from Japanese; light keeps every script."""
    text_encoder_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the text encoder; bfloat16 halves its memory. Rows are stored in bfloat16 either way."""


@dataclass(frozen=True, kw_only=True)
class DecodingSettings:
    """Decoding of videos, which changes no sample."""

    decode_workers: Annotated[int, AtLeast(0)] = 1
    """Processes of each rank that decode ahead; 0 decodes in the rank itself, which a crash then ends."""
    decode_timeout_s: Annotated[float, Above(0)] = 120.0
    """Stop a decoder and drop its clip after this many seconds."""


@dataclass(frozen=True, kw_only=True)
class EncodingArguments:
    """How clips become samples; the same for `prepare` and for training with `--online-encoding`."""

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
