"""The configuration of ``flashi2v convert``; field names are the flags' names and the recipe's keys."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from megatron_flashi2v.config.bounds import AtLeast, EndsWith, Matches, OneOf
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.fields import HoldsPath, Named
from megatron_flashi2v.config.recipe import FlagNames

FORMAT_NAMES = ("megatron", "diffusers", "wan", "flashi2v-npu", "flashi2v-gpu", "comfyui", "torch-dist")
ENCODERS = "encoders"
"""In place of a target's format: Wan's own VAE and T5 as the folders that other commands take."""
_ONE_FILE = ("flashi2v-npu", "flashi2v-gpu", "comfyui")

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

SOURCE_NAMES = (*FORMAT_NAMES, "auto")
"""Formats of weights to read; ``auto`` is whichever is recognised."""


def parse_source(flag: str, text: str) -> tuple[str, Path]:
    """Format and path of weights that a flag names as FORMAT:PATH.

    Raises:
        ConfigError: the text is not of that form.
    """
    name, colon, path = text.partition(":")
    if not colon or not path or name not in SOURCE_NAMES:
        raise ConfigError(
            f"{flag} is {text!r}; give FORMAT:PATH with one of {', '.join(SOURCE_NAMES)}, such as "
            f"megatron:{path or text}"
        )
    return name, Path(path)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(FlagNames):
    """Weights from one format to another."""

    command: ClassVar[str] = "flashi2v convert"
    everyday: ClassVar[tuple[str, ...]] = ("from", "to", "dtype", "weights", "verify", "overwrite", "report")

    source: Annotated[tuple[Annotated[str, OneOf(*SOURCE_NAMES)], Path], Named("from", "FORMAT PATH")]
    """Weights to read: `auto` (whichever of the following is recognised), `megatron` (a folder of `train --save`, or
    one iter_* in it), `torch-dist` (a folder of megatron-core's dist_checkpointing), `diffusers` (a folder), or `wan`,
    `flashi2v-npu`, `flashi2v-gpu`, `comfyui` (a .safetensors, .pt, .pth or .bin file; a folder with one, with shards,
    of another trainer, or of torch's distributed checkpoint)."""
    target: Annotated[tuple[Annotated[str, OneOf(*FORMAT_NAMES, ENCODERS)], Path], Named("to", "FORMAT PATH")]
    """Weights to write: a format, and a folder that does not exist yet. `encoders` writes the VAE, text encoder and
    tokenizer that lie in a folder as Wan released it (`--from wan FOLDER`), for --vae, --text-encoder, --tokenizer."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Precision of all tensors written; float32 takes a bf16 run's fp32 master weights."""
    weights: Literal["model", "ema"] = "model"
    """Set to take from the source: the trained weights, or their moving average."""
    num_attention_heads: Annotated[int | None, AtLeast(1)] = None
    """Heads, if no file beside the weights names them and they are not 128 wide."""
    phi_order: Literal["conv_then_broadcast", "repeat_then_conv"] | None = None
    """Order of FlashI2V's latent shift, if no file beside the weights names it; by default that of the format's own
    code."""
    keep_non_finite: bool = False
    """Convert values that are NaN or infinite as they are; without it, the first tensor that holds one is refused."""
    max_shard_size: str | None = None
    """Largest file written, such as 500MB; by default 5GB. `flashi2v-npu`, `flashi2v-gpu` and `comfyui` are read, and
    written, as one file."""
    verify: bool = False
    """Before publishing, read both sides again, compare every tensor, and run a small forward pass."""
    report: Annotated[Path | None, EndsWith(".json")] = None
    """JSON file to write, with the fate of every tensor."""
    overwrite: bool = False
    """Replace an earlier conversion to the same folder."""
    vae: Annotated[str | None, HoldsPath()] = None
    """For `diffusers`: VAE of the release, as a folder, or a Hub repository OWNER/NAME:SUBFOLDER."""
    text_encoder: Annotated[str | None, HoldsPath()] = None
    """For `diffusers`: text encoder of the release, likewise."""
    tokenizer: Annotated[str | None, HoldsPath()] = None
    """For `diffusers`: tokenizer of the release, likewise."""
    components: Literal["copy", "reference"] = "copy"
    """Copy those folders into the release, or name them in it; repositories are always named."""
    license: Annotated[str | None, Matches(r"[a-z0-9][a-z0-9.+-]*", "an identifier such as apache-2.0")] = None
    """For `diffusers`: licence of the weights, for the model card, by the Hub's identifier, such as apache-2.0."""
    base_model: Annotated[str | None, Matches(r"[\w.-]+/[\w.-]+", "OWNER/NAME")] = None
    """For `diffusers`: Hub repository OWNER/NAME that the training started from, for the model card."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, value in (self.parts | {"license": self.license, "base_model": self.base_model}).items():
            if value is not None and self.target[0] != "diffusers":
                raise ConfigError(f"--{flag.replace('_', '-')} {value}: only `--to diffusers` makes a release folder")
        if self.target[0] == ENCODERS and (self.source[0] not in ("wan", "auto") or self.dtype != "keep"):
            raise ConfigError(
                f"--to {ENCODERS} takes `--from wan FOLDER`, as Wan released it, and keeps its dtypes; not --from "
                f"{self.source[0]} with --dtype {self.dtype}"
            )
        if self.max_shard_size is not None and self.target[0] in _ONE_FILE:
            raise ConfigError(
                f"--max-shard-size {self.max_shard_size}: {self.target[0]} is read as one file; leave out the flag"
            )
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
        text = "5GB" if self.max_shard_size is None else self.max_shard_size
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
        if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
            raise ConfigError(
                f"--max-shard-size is {self.max_shard_size!r}; give a size such as 5GB or 500MB"
            )
        return int(float(match[1]) * _UNITS[match[2]])
