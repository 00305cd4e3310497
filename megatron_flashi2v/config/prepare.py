"""The configuration of ``flashi2v prepare``; field names are the flags' names and the recipe's keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from megatron_flashi2v.config.bounds import AtLeast
from megatron_flashi2v.config.clips import EncodingArguments, FilterSettings, given
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.fields import spelling
from megatron_flashi2v.config.recipe import FlagNames


@dataclass(frozen=True, kw_only=True)
class EncodingConfig:
    """Text length and seed of the samples."""

    arguments: EncodingArguments = field(default_factory=EncodingArguments)
    text_length: Annotated[int, AtLeast(1)] = 512
    """Greatest number of text rows of a caption; longer captions are cut."""
    seed: int = 1234
    """Key of the draws of frame windows and captions."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(FlagNames):
    """Output, shards and device."""

    command: ClassVar[str] = "flashi2v prepare"
    everyday: ClassVar[tuple[str, ...]] = (
        "annotations", "output", "vae", "text_encoder", "tokenizer", "height", "width",
    )

    encoding: EncodingConfig = field(default_factory=EncodingConfig)
    output: Path | None = None
    """Folder of the prepared data set; an unfinished one is continued."""
    samples_per_shard: Annotated[int, AtLeast(1)] = 64
    """Clips in a shard, which is the unit of work of one process; a killed run loses at most one for each process."""
    device: Literal["auto", "cuda", "npu", "cpu"] = "auto"
    """Device of the encoders; auto takes the first that is there."""
    strict: bool = False
    """Stop at the first malformed annotation or damaged file, instead of dropping it with its reason."""
    fresh: bool = False
    """Delete the data set of an earlier run in the output folder, and start over."""

    def folder(self) -> Path:
        """The output folder, which must be given.

        Raises:
            ConfigError: it is not.
        """
        return given(self.output, "--output")


def check_clips(wanted: FilterSettings) -> None:
    """Refuse filters that no clip passes.

    Raises:
        ConfigError: names the flag, its value and the rule.
    """
    for least, most in (("min_aspect", "max_aspect"), ("min_motion", "max_motion")):
        low, high = getattr(wanted, least), getattr(wanted, most)
        if high < low:
            raise ConfigError(f"{spelling(most)} is {high}; it must be at least {spelling(least)} {low:g}")


def check_prepare(config: PrepareConfig) -> None:
    """:func:`check_clips`, and that all paths are given.

    Raises:
        ConfigError: names the flag, its value and the rule.
    """
    check_clips(config.encoding.arguments.clips.wanted)
    output = ["output"] if config.output is None else []
    require_given([*config.encoding.arguments.sources.missing(), *output], "prepare")


def require_given(missing: Sequence[str], command: str) -> None:
    """Refuse flags that are not set, if there are any.

    Raises:
        ConfigError: names them.
    """
    if missing:
        flags = ", ".join(map(spelling, missing))
        raise ConfigError(f"{flags} must be given; `flashi2v {command} --help` explains every flag")
