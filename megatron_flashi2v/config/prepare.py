"""The configuration of ``flashi2v prepare``; field names are the flags' names and the recipe's keys."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_flashi2v.config.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PrepareInputs:
    """The paths that ``prepare`` cannot do without."""

    annotations: Path
    output: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What is prepared, from what, and with which encoders."""

    annotations: Path | None = None
    """JSON list of clips (path, cap, ...; paths relative to its folder), or a text file of lines root_dir,meta.json."""
    output: Path | None = None
    """Folder of the prepared data set; an unfinished one is continued."""
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
    samples_per_shard: int = 64
    """Clips per shard; a shard is the unit of work of one process and what a killed run can lose."""
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
    text_length: int = 512
    """Most text rows of a caption; longer ones are cut."""
    text_encoder_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the text encoder; bfloat16 halves its memory. Rows are stored in bfloat16 either way."""
    device: Literal["auto", "cuda", "npu", "cpu"] = "auto"
    """Where the encoders run."""
    seed: int = 1234
    """Seed of the draws of frame windows and captions."""
    strict: bool = False
    """Stop at the first malformed annotation or damaged file instead of dropping it with its reason."""
    fresh: bool = False
    """Delete what an earlier run left in the output folder and start over."""

    @property
    def pixel_floor(self) -> int:
        """Least height * width of a clip."""
        return self.height * self.width if self.min_pixels is None else self.min_pixels

    def inputs(self) -> PrepareInputs:
        """The paths, all given.

        Raises:
            ConfigError: some are not.
        """
        names = [field.name for field in dataclasses.fields(PrepareInputs)]
        missing = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is None]
        if missing:
            raise ConfigError(f"{', '.join(missing)} must be given; `flashi2v prepare --help` explains every flag")
        return PrepareInputs(**{name: getattr(self, name) for name in names})


def check_prepare(config: PrepareConfig) -> PrepareInputs:
    """Refuse values that cannot work, before anything heavy is loaded.

    Returns:
        The paths, all given.

    Raises:
        ConfigError: names the flag, its value and the rule.
    """
    for name in ("num_frames", "height", "width", "samples_per_shard", "text_length"):
        _require(config, name, getattr(config, name) >= 1, "at least 1")
    for name in ("fps", "min_aspect", "max_aspect"):
        value = getattr(config, name)
        _require(config, name, math.isfinite(value) and value > 0, "above 0")
    _require(config, "max_aspect", config.max_aspect >= config.min_aspect, f"at least min_aspect {config.min_aspect:g}")
    _require(config, "min_pixels", config.pixel_floor >= 0, "at least 0")
    _require(config, "too_long_factor", config.too_long_factor >= 1, "at least 1")
    _require(config, "max_motion", config.max_motion >= config.min_motion, f"at least min_motion {config.min_motion:g}")
    return config.inputs()


def _require(config: PrepareConfig, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise ConfigError(f"--{name.replace('_', '-')} is {getattr(config, name)}; it must be {rule}")
