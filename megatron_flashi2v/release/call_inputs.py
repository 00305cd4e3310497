"""What a call of ``FlashI2VPipeline`` is given, for each of its videos.

Shape suffixes: B samples, L text rows, D text width.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.sampling.experts import require_pair

Seeds = list[tuple[int, int]]
"""The seed and the index that key each video's noise."""


def seeds_of(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> Seeds:
    """A single generator keys by its seed and the video's place, a list by each one's seed."""
    if isinstance(generator, Sequence):
        if len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} videos; give one for each, or one for all")
        return [(single.initial_seed(), 0) for single in generator]
    seed = secrets.randbits(63) if generator is None else generator.initial_seed()
    return [(seed, index) for index in range(count)]


def check_inputs(
    pipeline: Any,
    prompt: object,
    negative_prompt: object,
    prompt_embeds: Tensor | None,
    negative_prompt_embeds: Tensor | None,
    tensor_inputs: Sequence[str],
) -> None:
    """Refuse what excludes each other, and rows of another width than the model's; see the pipeline's call."""
    known = pipeline._callback_tensor_inputs
    unknown = set(tensor_inputs) - set(known)
    if unknown:
        raise ConfigError(f"callback_on_step_end_tensor_inputs has {sorted(unknown)}; known are {known}")
    width = pipeline._model_config.text_dim
    for name, text, rows in (
        ("prompt", prompt, prompt_embeds), ("negative_prompt", negative_prompt, negative_prompt_embeds),
    ):  # fmt: skip
        if text is not None and rows is not None:
            raise ConfigError(f"both {name} and {name}_embeds are given; give one of them")
        if rows is not None and (rows.ndim != 3 or rows.shape[2] != width):
            raise ConfigError(f"{name}_embeds have the shape {list(rows.shape)}; it must be [B, L, {width}]")
    encoder = pipeline.text_encoder
    if encoder is not None and encoder.config.d_model != width:
        raise ConfigError(
            f"the text encoder's rows have width {encoder.config.d_model}, the model's text_dim is "
            f"{width}; give the text encoder that prepared the training data"
        )


def second_scale(pipeline: Any, guidance_scale: float, guidance_scale_2: float | None) -> float:
    """Guidance scale of a pair's second expert; 1, which is none, for one model.

    Raises:
        ConfigError: the pipeline has half of a pair, or two experts that do not take the same inputs.
    """
    second, ratio = pipeline.transformer_2, pipeline.config.boundary_ratio
    require_pair(guidance_scale_2, second)
    if (second is None) != (ratio is None):
        raise ConfigError(
            f"boundary_ratio is {ratio}, and transformer_2 is {'not there' if second is None else 'given'}; a pair of "
            "experts has both, one model neither"
        )
    if second is None:
        return 1.0
    ours, theirs = pipeline.transformer.config, second.config
    for name in ("in_channels", "out_channels", "text_dim", "patch_size", "image_dim"):
        if ours[name] != theirs[name]:
            raise ConfigError(
                f"transformer_2's {name} is {theirs[name]}, but that of transformer is {ours[name]}; the experts of a "
                "pair take the same inputs"
            )
    return guidance_scale if guidance_scale_2 is None else guidance_scale_2


def separate_images(image: Any) -> Any:
    """Arrays and tensors of several images as a list of them."""
    return list(image) if getattr(image, "ndim", 0) == 4 else image


def spread_rows(rows_BLD: Tensor, places: int, repeats: int) -> Tensor:
    """Text rows for each video: one prompt's serve all places, and each place has so many videos."""
    if len(rows_BLD) not in (1, places):
        raise ConfigError(f"there are text rows of {len(rows_BLD)} prompts for {places} images and prompts")
    return rows_BLD.expand(places, -1, -1).repeat_interleave(repeats, dim=0)
