"""The configuration of ``flashi2v prepare``; field names are the flags' names and the recipe's keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from megatron_flashi2v.config.clips import EncodingArguments, given
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.recipe import FlagNames


@dataclass(frozen=True, kw_only=True)
class EncodingConfig:
    """Everything that decides the samples."""

    arguments: EncodingArguments = field(default_factory=EncodingArguments)
    text_length: int = 512
    """Most text rows of a caption; longer ones are cut."""
    seed: int = 1234
    """Seed of the draws of frame windows and captions."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(FlagNames):
    """What is prepared, from what, and with which encoders."""

    command: ClassVar[str] = "flashi2v prepare"

    encoding: EncodingConfig = field(default_factory=EncodingConfig)
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
        return given(self.output, "--output")


def check_clips(arguments: EncodingArguments) -> None:
    """Refuse values that cannot work, before anything heavy is loaded.

    Raises:
        ConfigError: names the flag, its value and the rule.
    """
    wanted = arguments.clips.wanted
    for name in ("num_frames", "height", "width"):
        _require(wanted, name, getattr(wanted, name) >= 1, "at least 1")
    for owner, name in ((wanted, "fps"), (wanted, "min_aspect"), (wanted, "max_aspect"),
                        (arguments.decoding, "decode_timeout_s")):
        value = getattr(owner, name)
        _require(owner, name, math.isfinite(value) and value > 0, "above 0")
    _require(wanted, "max_aspect", wanted.max_aspect >= wanted.min_aspect, f"at least min_aspect {wanted.min_aspect:g}")
    _require(wanted, "min_pixels", wanted.pixel_floor >= 0, "at least 0")
    _require(wanted, "too_long_factor", wanted.too_long_factor >= 1, "at least 1")
    _require(wanted, "max_motion", wanted.max_motion >= wanted.min_motion, f"at least min_motion {wanted.min_motion:g}")
    _require(arguments.decoding, "decode_workers", arguments.decoding.decode_workers >= 0, "at least 0")


def check_prepare(config: PrepareConfig) -> None:
    """:func:`check_clips`, and what else ``prepare`` takes; all paths must be given.

    Raises:
        ConfigError: names the flag, its value and the rule.
    """
    _require(config, "samples_per_shard", config.samples_per_shard >= 1, "at least 1")
    _require(config.encoding, "text_length", config.encoding.text_length >= 1, "at least 1")
    check_clips(config.encoding.arguments)
    output = ["output"] if config.output is None else []
    require_given([*config.encoding.arguments.sources.missing(), *output], "prepare")


def require_given(missing: Sequence[str], command: str) -> None:
    """Refuse flags that are not set, if there are any.

    Raises:
        ConfigError: names them.
    """
    if missing:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise ConfigError(f"{flags} must be given; `flashi2v {command} --help` explains every flag")


def _require(config: Any, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise ConfigError(f"--{name.replace('_', '-')} is {getattr(config, name)}; it must be {rule}")
