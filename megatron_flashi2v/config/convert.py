"""The configuration of ``flashi2v convert``; field names are the flags' names and the recipe's keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from megatron_flashi2v.config.bounds import Above, AtLeast, Below, EndsWith, Matches, OneOf
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.fields import HoldsPath, Named
from megatron_flashi2v.config.recipe import FlagNames

FORMAT_NAMES = ("megatron", "diffusers", "wan", "flashi2v-npu", "flashi2v-gpu", "comfyui", "torch-dist")
ENCODERS = "encoders"
"""In place of a target's format: Wan's own VAE, T5 and CLIP as the folders that other commands take."""
_ONE_FILE = ("flashi2v-npu", "flashi2v-gpu", "comfyui")

# Flags that belong to the weights of a model, with the value that means nothing.
_OF_MODELS: Mapping[str, object] = {
    "num_attention_heads": None, "phi_order": None, "text_cleaning": None, "keep_non_finite": False,
}  # fmt: skip
_OF_WEIGHTS: Mapping[str, object] = {"merge": False, "weights": "model", "report": None}  # encoders have none of these

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

ADAPTER_TARGETS = ("diffusers-lora", "comfyui-lora")
ADAPTER_SOURCES = (*ADAPTER_TARGETS, "kohya-lora")
"""Forms of an adapter by itself."""

SOURCE_NAMES = (*FORMAT_NAMES, "auto")
"""Formats of weights to read; ``auto`` is whichever is recognised."""
TARGET_NAMES = (*FORMAT_NAMES, *ADAPTER_TARGETS, ENCODERS)


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

    source: Annotated[tuple[Annotated[str, OneOf(*SOURCE_NAMES, *ADAPTER_SOURCES)], Path], Named("from", "FORMAT PATH")]
    """Weights to read: `auto` (whichever of the following is recognised), `megatron` (a folder of `train --save`, or
    one iter_* in it), `torch-dist` (a folder of megatron-core's dist_checkpointing), `diffusers` (a folder), or `wan`,
    `flashi2v-npu`, `flashi2v-gpu`, `comfyui` (a .safetensors, .pt, .pth or .bin file; a folder with one, with shards,
    of another trainer, or of torch's distributed checkpoint). Of adapters: `diffusers-lora`, `comfyui-lora`,
    `kohya-lora` (a file, or a folder with one), or `megatron` (a checkpoint of an adapter)."""
    target: Annotated[tuple[Annotated[str, OneOf(*TARGET_NAMES)], Path], Named("to", "FORMAT PATH")]
    """Weights to write: a format, and a folder that does not exist yet. `encoders` writes the VAE, text encoder,
    tokenizer and image encoder that lie in a folder as Wan released it (`--from wan FOLDER`), for --vae and the like.
    `diffusers-lora` and `comfyui-lora` write an adapter."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Precision of all tensors written; float32 takes a bf16 run's fp32 master weights."""
    weights: Literal["model", "ema"] = "model"
    """Set to take from the source: the trained weights, or their moving average. With --adapter CHECKPOINT: that of
    the adapter; its base is read as training read it."""
    adapter: Path | None = None
    """With --merge: an adapter (LoRA) for the weights of --from, in any form that --from takes."""
    merge: bool = False
    """Add --adapter to the weights, W + scale (alpha / rank) B A in fp32, and write the sum as a full model."""
    adapter_scale: float = 1.0
    """With --merge: factor of the adapter."""
    low_noise: Path | None = None
    """Second of two experts, for low noise, in the format of --from, which is that for high noise. `--to diffusers`
    makes one release of both; other formats get a folder for each, high_noise_model and low_noise_model."""
    boundary_ratio: Annotated[float | None, Above(0), Below(1)] = None
    """With --low-noise: share of the 1000 timesteps at which the experts meet; by default as stated beside --from,
    or as their training was divided."""
    num_attention_heads: Annotated[int | None, AtLeast(1)] = None
    """Heads, if no file beside the weights names them and they are not 128 wide."""
    phi_order: Literal["conv_then_broadcast", "repeat_then_conv"] | None = None
    """Order of FlashI2V's latent shift, if no file beside the weights names it; by default that of the format's own
    code."""
    text_cleaning: Literal["full", "light"] | None = None
    """How sampling is to clean prompts; by default as the captions in training were, where that is recorded, or else
    light, as Wan's pipelines and both branches of FlashI2V do."""
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
    image_encoder: Annotated[str | None, HoldsPath()] = None
    """For `diffusers`: image encoder of a release of wan_i2v, likewise; its processor lies in it or beside it."""
    negative_prompt: str | None = None
    """For `diffusers`: prompt that sampling from the release steers away from by default, or @FILE with it, such as the
    one of the code that the weights come from."""
    components: Literal["copy", "reference"] = "copy"
    """Copy those folders into the release, or name them in it; repositories are always named."""
    license: Annotated[str | None, Matches(r"[a-z0-9][a-z0-9.+-]*", "an identifier such as apache-2.0")] = None
    """For `diffusers`: licence of the weights, for the model card, by the Hub's identifier, such as apache-2.0."""
    base_model: Annotated[str | None, Matches(r"[\w.-]+/[\w.-]+", "OWNER/NAME")] = None
    """For `diffusers`: Hub repository OWNER/NAME that the training started from, for the model card."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, value in (
            self.parts
            | {"license": self.license, "base_model": self.base_model, "negative_prompt": self.negative_prompt}
        ).items():
            if value is not None and self.target[0] != "diffusers":
                raise ConfigError(f"--{flag.replace('_', '-')} {value}: only `--to diffusers` makes a release folder")
        if self.target[0] == ENCODERS and (self.source[0] not in ("wan", "auto") or self.dtype != "keep"):
            raise ConfigError(
                f"--to {ENCODERS} takes `--from wan FOLDER`, as Wan released it, and keeps its dtypes; not --from "
                f"{self.source[0]} with --dtype {self.dtype}"
            )
        self._check_models()
        self._check_unread()
        if self.max_shard_size is not None and self.target[0] in _ONE_FILE:
            raise ConfigError(
                f"--max-shard-size {self.max_shard_size}: {self.target[0]} is read as one file; leave out the flag"
            )
        _ = self.max_shard_bytes

    def _check_unread(self) -> None:
        """Refuse flags of a model's weights where the target is none."""
        unread = {**_OF_MODELS, **_OF_WEIGHTS} if self.target[0] == ENCODERS else _OF_MODELS
        if self.target[0] in (ENCODERS, *ADAPTER_TARGETS):
            for name, unset in unread.items():
                if getattr(self, name) != unset:
                    flag = f"--{name.replace('_', '-')}"
                    raise ConfigError(f"{flag} is for a model's weights; leave it out with --to {self.target[0]}")
        if self.target[0] in ADAPTER_TARGETS and self.max_shard_size is not None:
            raise ConfigError(f"--max-shard-size is for models; --to {self.target[0]} writes one file; leave it out")

    def _check_models(self) -> None:
        (source, _), (target, _) = self.source, self.target
        if (self.adapter is not None) != self.merge:
            raise ConfigError("--adapter FILE and --merge: give both, or neither; --merge adds the adapter to --from")
        if source in ADAPTER_SOURCES and target not in ADAPTER_TARGETS:
            raise ConfigError(
                f"--from {source} is an adapter, and --to {target} a model; give the base by --from and the adapter by "
                "--adapter FILE --merge"
            )
        if target in ADAPTER_TARGETS and (source not in (*ADAPTER_SOURCES, "megatron", "auto") or self.merge):
            given = "--merge" if self.merge else f"--from {source}"
            raise ConfigError(
                f"--to {target} writes an adapter, and {given} gives a model; give an adapter by --from, in one of "
                f"{', '.join(ADAPTER_SOURCES)}, megatron, auto"
            )
        if self.low_noise is not None and target not in FORMAT_NAMES:
            raise ConfigError(f"--low-noise {self.low_noise} is the second of two models, and --to {target} takes none")
        if self.boundary_ratio is not None and self.low_noise is None:
            raise ConfigError(f"--boundary-ratio {self.boundary_ratio:g} belongs to two experts; give --low-noise too")
        if self.adapter_scale != 1 and not self.merge:
            raise ConfigError(f"--adapter-scale {self.adapter_scale:g} belongs to --merge; give both, or neither")

    @property
    def parts(self) -> dict[str, str]:
        """The frozen parts of a release that were given, by component."""
        names = ("vae", "text_encoder", "tokenizer", "image_encoder")
        given: dict[str, str | None] = {name: getattr(self, name) for name in names}
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
