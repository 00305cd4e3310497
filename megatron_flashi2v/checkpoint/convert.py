"""Weights from one format to another, one tensor at a time, published when whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_flashi2v.checkpoint.converters import diffusers, megatron
from megatron_flashi2v.checkpoint.key_table import parameter_count
from megatron_flashi2v.checkpoint.weights import OnBytes, Weights
from megatron_flashi2v.config.errors import CheckpointError, ConfigError, UserError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.runtime.files import staged_folder


@dataclass(frozen=True, kw_only=True)
class Format:
    """How to read and write one format.

    Attributes:
        open: the weights at a path, in their own dtype or the one given.
        write: fill an empty folder with weights, in files of at most so many bytes.
        is_ours: whether a folder may be replaced, as something that this format's ``write`` left.
    """

    open: Callable[[Path, torch.dtype | None], Weights]
    write: Callable[[Path, Weights, int, OnBytes | None], None]
    is_ours: Callable[[Path], bool]


FORMATS: Mapping[str, Format] = {
    "megatron": Format(open=megatron.open_weights, write=megatron.write_weights, is_ours=megatron.is_ours),
    "diffusers": Format(
        open=diffusers.open_weights, write=diffusers.write_weights, is_ours=diffusers.is_ours
    ),
}


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion did."""

    config: ModelConfig
    parameters: int
    bytes: int


def convert(
    source: tuple[str, Path],
    target: tuple[str, Path],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    on_start: Callable[[int], None] | None = None,
    on_bytes: OnBytes | None = None,
) -> Converted:
    """Convert the weights of a model.

    Args:
        source: format and path to read.
        target: format and path of the folder to write.
        dtype: of all tensors written; None keeps each one's own.
        max_shard_bytes: largest file, in bytes of tensors.
        overwrite: replace an earlier output of the target's format.
        on_start: hears of the bytes that will be written.
        on_bytes: hears of bytes as they are written.

    Raises:
        UserError: the source is missing or damaged, the target exists, or the disk is full. Nothing is left
            under the target's name then, and an earlier output there is as it was.
    """
    read, write = _format(source[0]), _format(target[0])
    _check_target(source[1], target[1], write, overwrite)
    weights = read.open(source[1], dtype)
    total = weights.total_bytes()
    if on_start is not None:
        on_start(total)
    with staged_folder(target[1], overwrite=overwrite) as folder:
        write.write(folder, weights, max_shard_bytes, on_bytes)
    return Converted(config=weights.config, parameters=parameter_count(weights.config), bytes=total)


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ConfigError(f"format {name!r} is not available; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def _check_target(source: Path, target: Path, write: Format, overwrite: bool) -> None:
    inner, outer = source.resolve(), target.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise ConfigError(f"{source} and {target} must not lie in one another")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{target} exists; choose another path, or give --overwrite")
    if not (target.is_dir() and write.is_ours(target)):
        # A mistyped path must not cost a training run or a home folder.
        raise CheckpointError(f"{target} is not an earlier conversion to this format; it is not replaced")
