"""The configuration of ``flashi2v convert``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.recipe import FlagNames

FORMAT_NAMES = ("megatron", "diffusers", "wan", "flashi2v-npu", "flashi2v-gpu")

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(FlagNames):
    """Weights from one format to another."""

    command: ClassVar[str] = "flashi2v convert"

    source: Annotated[tuple[str, Path], tyro.conf.arg(name="from", metavar="FORMAT PATH")]
    """What to read: `megatron` (a folder of `train --save`, or one iter_* in it), `diffusers` (a folder), or `wan`,
    `flashi2v-npu`, `flashi2v-gpu` (a .safetensors, .pt or .pth file, or a folder with one, with shards and their index,
    or of torch's distributed checkpoint)."""
    target: Annotated[tuple[str, Path], tyro.conf.arg(name="to", metavar="FORMAT PATH")]
    """What to write: a format, and a folder that does not exist yet."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Precision of all tensors written; float32 takes a bf16 run's fp32 master weights."""
    weights: Literal["model", "ema"] = "model"
    """Which of the sets that the source holds."""
    num_attention_heads: int | None = None
    """Heads, where no file beside the weights tells and they are not 128 wide."""
    phi_order: Literal["conv_then_broadcast", "repeat_then_conv"] | None = None
    """Order of FlashI2V's latent shift, where no file beside the weights tells; by default as the format's own code."""
    max_shard_size: str = "5GB"
    """Largest file written, such as 5GB or 500MB."""
    verify: bool = False
    """Before anything is published, read both sides again, compare every tensor, and run a small forward pass."""
    report: Path | None = None
    """JSON file to write: what became of every tensor."""
    overwrite: bool = False
    """Replace an earlier conversion to the same folder."""
    vae: str | None = None
    """For `diffusers`: the VAE of the release, a folder, or a Hub repository as OWNER/NAME:SUBFOLDER."""
    text_encoder: str | None = None
    """For `diffusers`: the text encoder of the release, likewise."""
    tokenizer: str | None = None
    """For `diffusers`: the tokenizer of the release, likewise."""
    components: Literal["copy", "reference"] = "copy"
    """Whether those folders are copied into the release, or named in it; repositories are always named."""

    def __post_init__(self) -> None:
        for flag, (name, _) in (("from", self.source), ("to", self.target)):
            if name not in FORMAT_NAMES:
                raise ConfigError(f"--{flag} {name}: no such format; available are {', '.join(FORMAT_NAMES)}")
        if self.num_attention_heads is not None and self.num_attention_heads < 1:
            raise ConfigError(f"--num-attention-heads is {self.num_attention_heads}; it must be at least 1")
        for flag, value in self.parts.items():
            if self.target[0] != "diffusers":
                raise ConfigError(f"--{flag.replace('_', '-')} {value}: only `--to diffusers` makes a release folder")
        _ = self.max_shard_bytes

    @property
    def parts(self) -> dict[str, str]:
        """The frozen parts of a release that were given, by component."""
        given = {"vae": self.vae, "text_encoder": self.text_encoder, "tokenizer": self.tokenizer}
        return {name: value for name, value in given.items() if value is not None}

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
