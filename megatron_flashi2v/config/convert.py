"""The configuration of ``flashi2v convert``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megatron_flashi2v.config.errors import ConfigError

FORMATS = ("megatron", "diffusers")

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Weights from one format to another."""

    source: Annotated[tuple[str, Path], tyro.conf.arg(name="from", metavar="FORMAT PATH")]
    """What to read: `megatron` and a folder of `train --save` (or one iter_* in it), or `diffusers` and a
    folder."""
    target: Annotated[tuple[str, Path], tyro.conf.arg(name="to", metavar="FORMAT PATH")]
    """What to write: `megatron` (a folder for `train --load`, any layout) or `diffusers`, and the folder."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Precision of all tensors written; float32 takes a bf16 run's fp32 master weights."""
    max_shard_size: str = "5GB"
    """Largest file written, such as 5GB or 500MB."""
    overwrite: bool = False
    """Replace an earlier conversion to the same folder."""

    def __post_init__(self) -> None:
        for flag, (name, _) in (("from", self.source), ("to", self.target)):
            if name not in FORMATS:
                raise ConfigError(f"--{flag} {name}: no such format; available are {' and '.join(FORMATS)}")
        _ = self.max_shard_bytes

    @property
    def max_shard_bytes(self) -> int:
        """``max_shard_size`` in bytes.

        Raises:
            ConfigError: it is not a size.
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", self.max_shard_size.strip().upper())
        if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
            raise ConfigError(
                f"--max-shard-size is {self.max_shard_size!r}; give a size such as 5GB or 500MB"
            )
        return int(float(match[1]) * _UNITS[match[2]])
