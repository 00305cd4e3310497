"""The format ``comfyui``: one safetensors file that ComfyUI loads as a diffusion model.

ComfyUI tells a model by its tensors' names and shapes alone, and takes for granted what they cannot tell: heads of 128
channels, patches of (1, 2, 2), a sinusoid of 256 values, an epsilon of 1e-6. Names are the original ones behind a
prefix. ``model_config.json`` lies beside, for us.
"""

from __future__ import annotations

from pathlib import Path

from megatron_flashi2v.checkpoint.key_table import mappings
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.conversion.formats.original import WAN
from megatron_flashi2v.conversion.formats.original_config import HEAD_DIM, MODEL_CONFIG_NAME
from megatron_flashi2v.conversion.weights import OnBytes, Weights, external_groups, write_shard
from megatron_flashi2v.runtime.files import atomic_write_json

PREFIX = "model.diffusion_model."
FILE_NAME = "model.safetensors"

# What ComfyUI takes for granted, by our field.
_FIXED = {"patch_size": (1, 2, 2), "freq_dim": 256, "norm_eps": 1e-6, "head_dim": HEAD_DIM}
_PARADIGMS = ("text_to_video", "wan_i2v", "inpainting")

open_weights = WAN.open
"""Reads original names behind any prefix."""


def require_runnable(config: ModelConfig) -> None:
    """Refuse a model that ComfyUI would load and compute wrongly, without a word.

    Raises:
        CheckpointError: names what ComfyUI takes for granted.
    """
    if config.conditioning not in _PARADIGMS:
        raise CheckpointError(
            f"ComfyUI has no code for the paradigm {config.conditioning} and would run the model without its image; "
            f"it runs {' and '.join(_PARADIGMS)}: use --to diffusers"
        )
    for field, value in _FIXED.items():
        if getattr(config, field) != value:
            raise CheckpointError(
                f"ComfyUI takes {field} {value} for granted and would compute this model, of {getattr(config, field)}, "
                "wrongly; use --to diffusers"
            )


def caveats(config: ModelConfig) -> tuple[str, ...]:
    """What ComfyUI computes otherwise than we do."""
    if config.conditioning != "inpainting":
        return ()
    return (
        "ComfyUI gives the model the encoded clip of the image and grey frames after it, not the zero latents that it "
        "was trained on",
    )


def write_weights(folder: Path, weights: Weights, max_bytes: int, on_bytes: OnBytes | None) -> None:
    """Write the one file, whatever its size, and our configuration."""
    require_runnable(weights.config)
    groups = external_groups(weights, list(mappings(weights.config, "wan")), PREFIX)
    write_shard(folder / FILE_NAME, groups, on_bytes, hashed=False)
    atomic_write_json(folder / MODEL_CONFIG_NAME, weights.config.to_json())


def is_ours(folder: Path) -> bool:
    """Whether a folder holds what :func:`write_weights` writes and nothing else."""
    return {path.name for path in folder.iterdir()} == {FILE_NAME, MODEL_CONFIG_NAME}


def names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """External names of each of our tensors."""
    return {entry.ours: tuple(PREFIX + name for name in entry.external) for entry in mappings(config, "wan")}
