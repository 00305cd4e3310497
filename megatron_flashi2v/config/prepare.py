"""The configuration of ``flashi2v prepare``; field names are the flags' names and the recipe's keys."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.recipe import FlagNames


@dataclass(frozen=True, kw_only=True)
class ClipSources:
    """The paths that encoding cannot do without."""

    annotations: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path


@dataclass(frozen=True, kw_only=True)
class ClipArguments:
    """Which clips become samples, and how; the same for `prepare` and for training with `--online-encoding`."""

    annotations: Path | None = None
    """JSON list of clips (path, cap, ...; paths relative to its folder), or a text file of lines root_dir,meta.json."""
    vae: Path | None = None
    """Folder of diffusers' AutoencoderKLWan."""
    text_encoder: Path | None = None
    """Folder of transformers' UMT5EncoderModel."""
    tokenizer: Path | None = None
    """Folder of the text encoder's tokenizer."""
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
    filter_rules: Literal["corrected", "reference"] = "corrected"
    """Filter as FlashI2V's reference does to the letter, or with its slips corrected."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How frames are resized (the reference's main branch: bicubic, its npu branch: bilinear)."""
    text_cleaning: Literal["full", "light"] = "full"
    """Cleaning of captions: as the released models were trained (full), or of encoding and white space only."""
    text_encoder_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the text encoder; bfloat16 halves its memory. Rows are stored in bfloat16 either way."""
    decode_workers: int = 1
    """Processes of each rank that decode ahead; 0 decodes in the rank itself, where nothing contains a crash."""
    decode_timeout_s: float = 120.0
    """Seconds that decoding one clip may take before its process is stopped and the clip dropped."""

    @property
    def pixel_floor(self) -> int:
        """Least height * width of a clip."""
        return self.height * self.width if self.min_pixels is None else self.min_pixels

    def sources(self) -> ClipSources:
        """The paths, all given.

        Raises:
            ConfigError: some are not.
        """
        names = [field.name for field in dataclasses.fields(ClipSources)]
        require_given(self, names)
        return ClipSources(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class EncodingConfig(ClipArguments):
    """Everything that decides the samples."""

    text_length: int = 512
    """Most text rows of a caption; longer ones are cut."""
    seed: int = 1234
    """Seed of the draws of frame windows and captions."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(EncodingConfig, FlagNames):
    """What is prepared, from what, and with which encoders."""

    command: ClassVar[str] = "flashi2v prepare"

    output: Path | None = None
    """Folder of the prepared data set; an unfinished one is continued."""
    samples_per_shard: int = 64
    """Clips per shard; a shard is the unit of work of one process and what a killed run can lose."""
    device: Literal["auto", "cuda", "npu", "cpu"] = "auto"
    """Where the encoders run."""
    strict: bool = False
    """Stop at the first malformed annotation or damaged file instead of dropping it with its reason."""
    fresh: bool = False
    """Delete what an earlier run left in the output folder and start over."""

    def folder(self) -> Path:
        """The output folder, which must be given.

        Raises:
            ConfigError: it is not.
        """
        require_given(self, ["output"])
        assert self.output is not None
        return self.output


def check_clips(config: ClipArguments) -> None:
    """Refuse values that cannot work, before anything heavy is loaded.

    Raises:
        ConfigError: names the flag, its value and the rule.
    """
    for name in ("num_frames", "height", "width"):
        _require(config, name, getattr(config, name) >= 1, "at least 1")
    for name in ("fps", "min_aspect", "max_aspect", "decode_timeout_s"):
        value = getattr(config, name)
        _require(config, name, math.isfinite(value) and value > 0, "above 0")
    _require(config, "max_aspect", config.max_aspect >= config.min_aspect, f"at least min_aspect {config.min_aspect:g}")
    _require(config, "min_pixels", config.pixel_floor >= 0, "at least 0")
    _require(config, "too_long_factor", config.too_long_factor >= 1, "at least 1")
    _require(config, "max_motion", config.max_motion >= config.min_motion, f"at least min_motion {config.min_motion:g}")
    _require(config, "decode_workers", config.decode_workers >= 0, "at least 0")


def check_prepare(config: PrepareConfig) -> None:
    """:func:`check_clips`, and what else ``prepare`` takes; all paths must be given.

    Raises:
        ConfigError: names the flag, its value and the rule.
    """
    for name in ("samples_per_shard", "text_length"):
        _require(config, name, getattr(config, name) >= 1, "at least 1")
    check_clips(config)
    require_given(config, ["annotations", "output", "vae", "text_encoder", "tokenizer"])


def require_given(config: ClipArguments, names: Sequence[str], command: str = "prepare") -> None:
    """Refuse flags that are not set.

    Raises:
        ConfigError: names those that are missing.
    """
    missing = [f"--{name.replace('_', '-')}" for name in names if getattr(config, name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given; `flashi2v {command} --help` explains every flag")


def _require(config: ClipArguments, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise ConfigError(f"--{name.replace('_', '-')} is {getattr(config, name)}; it must be {rule}")
