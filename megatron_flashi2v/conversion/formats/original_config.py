"""The configuration of a model under original names: from a file beside the weights, shapes, and flags."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_flashi2v.checkpoint.key_table import external_name
from megatron_flashi2v.conditioning.build import (
    input_channels,
    paradigm_named,
    paradigm_of,
    read_model_config,
    recognise,
    recognition_rules,
)
from megatron_flashi2v.conditioning.interface import ForeignModel
from megatron_flashi2v.config.errors import CheckpointError, ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.conversion.recognition import channels_named
from megatron_flashi2v.conversion.sources import SourceTensor
from megatron_flashi2v.conversion.weights import FOREIGN_TEXT_CLEANING, ReadOptions
from megatron_flashi2v.runtime.files import read_json_object

MODEL_CONFIG_NAME = "model_config.json"
"""Our configuration, beside the weights."""
HEAD_DIM = 128
"""Channels of a head in all releases of Wan and FlashI2V."""


def wan_config(config: ModelConfig) -> dict[str, Any]:
    """Content of ``config.json`` for Wan's code."""
    return {
        "_class_name": "WanModel",
        "model_type": paradigm_of(config).wan_model_type,
        "patch_size": list(config.patch_size),
        "text_len": config.text_length,
        "in_dim": input_channels(config),
        "dim": config.hidden_size,
        "ffn_dim": config.ffn_hidden_size,
        "freq_dim": config.freq_dim,
        "text_dim": config.text_dim,
        "out_dim": config.latent_channels,
        "num_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
        "eps": config.norm_eps,
    }


def read_config(
    path: Path, tensors: Mapping[str, SourceTensor], column: str, phi_order: str | None, options: ReadOptions
) -> tuple[ModelConfig, tuple[str, ...]]:
    """Determine the model, and list the assumptions made.

    Args:
        path: folder or file of the weights.
        tensors: by their names in ``column``.
        column: of the key table.
        phi_order: of the format's own code, if it has one.
        options: the flags.

    Raises:
        ConfigError: a flag is needed, or contradicts the file beside the weights.
        CheckpointError: that file is malformed, or a tensor that gives a dimension is missing or has a wrong shape.
    """
    folder = path if path.is_dir() else path.parent
    exact = folder / MODEL_CONFIG_NAME
    if exact.is_file():
        config = read_model_config(read_json_object(exact, error=CheckpointError), source=str(exact))
        options.require_agreement(config, exact)
        return config, ()
    notes: list[str] = []
    stated = _stated(folder / "config.json")
    fields = _from_shapes(path, tensors, column)
    width = fields["hidden_size"]
    heads = options.num_attention_heads or stated.get("num_heads")
    if heads is None and options.assume is not None:
        heads = options.assume.num_attention_heads
    if heads is None:
        if width % HEAD_DIM:
            raise ConfigError(
                f"{path} does not say how many heads it has, and its width {width} is no multiple of {HEAD_DIM}; give "
                "--num-attention-heads, or a config.json with num_heads beside the weights"
            )
        heads = width // HEAD_DIM
        notes.append(f"{heads} heads, of {HEAD_DIM} channels as in all of Wan's models")
    if stated.get("num_heads") not in (None, heads):
        raise ConfigError(
            f"--num-attention-heads is {heads}, but {folder / 'config.json'} says {stated['num_heads']}; leave out the "
            "flag"
        )
    if "phi_order" in paradigm_named(fields["conditioning"]).config_fields:
        order = options.phi_order or phi_order or (options.assume.phi_order if options.assume else None)
        if order is None and fields.get("phi_kernel_size", (1,))[0] > 1:
            raise ConfigError(f"{path} does not say in which order its 3x3x3 phi is computed; give --phi-order")
        if order is not None:
            fields["phi_order"] = order
            if options.phi_order is None:
                notes.append(f"phi's order {order}, as in the format's own code")
    fields["text_cleaning"] = FOREIGN_TEXT_CLEANING
    for ours, theirs in (("text_length", "text_len"), ("norm_eps", "eps")):
        if theirs in stated:
            fields[ours] = stated[theirs]
    try:
        return ModelConfig(num_attention_heads=heads, **fields), tuple(notes)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _stated(path: Path) -> Mapping[str, Any]:
    """Content of Wan's ``config.json``; empty if there is none."""
    if not path.is_file():
        return {}
    stated = read_json_object(path, error=CheckpointError)
    return stated if "num_heads" in stated or "dim" in stated else {}


def _from_shapes(path: Path, tensors: Mapping[str, SourceTensor], column: str) -> dict[str, Any]:
    def shape_of(name: str, dimensions: int) -> tuple[int, ...] | None:
        if name not in tensors:
            return None
        if len(tensors[name].shape) != dimensions:
            raise CheckpointError(
                f"{tensors[name].path}: tensor {name} has shape {tensors[name].shape}, not {dimensions} sides"
            )
        return tensors[name].shape

    def shape(ours: str, dimensions: int) -> tuple[int, ...]:
        name = external_name(ours, column)
        found = shape_of(name, dimensions)
        if found is None:
            raise CheckpointError(f"{path} holds no tensor {name}; it is of another format or model")
        return found

    width, channels, *patch = shape("patch_embedding.weight", 5)
    blocks = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    values = shape("head.linear.weight", 2)[0]
    volume = patch[0] * patch[1] * patch[2]
    latents = values // volume
    fields: dict[str, Any] = {
        "num_layers": max(blocks, default=-1) + 1,
        "hidden_size": width,
        "ffn_hidden_size": shape("blocks.0.mlp.linear_fc1.weight", 2)[0],
        "latent_channels": latents,
        "patch_size": tuple(patch),
        "freq_dim": shape("time_embedding.linear_1.weight", 2)[1],
        "text_dim": shape("text_embedding.linear_1.weight", 2)[1],
    }
    rows = shape_of(external_name("image_embedding.linear_1.weight", column), 2)
    paradigm = recognise(
        ForeignModel(
            latent_channels=latents, input_channels=channels, column=column, image_dim=rows[1] if rows else 0,
            shape_of=shape_of,
        )
    )
    if paradigm is None:
        known = channels_named(latents, channels) or (
            f"{recognition_rules()}; another paradigm needs the model_config.json of its export"
        )
        raise ConfigError(f"{path}: the patch embedding takes {channels} channels, the latents have {latents}: {known}")
    return fields | paradigm
