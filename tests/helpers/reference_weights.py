"""Models filled with another code base's weights, and their gradients under its names, by the one key table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.plain_flashi2v import PlainFlashI2V
from megatron_flashi2v.checkpoint.key_table import mappings
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.models.build import build_model
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.runtime.device import resolve_device

GOLDEN_CASES = ("tiny_1x3x3", "tiny_3x3x3")
"""The reference's two tiny configurations: equal and unequal rotary splits, both of phi's kernels."""


def golden_facts(goldens: Path, case: str) -> dict[str, Any]:
    """What dit_and_loss.json says of a configuration: its sizes, counts, losses and gradient norms."""
    return json.loads((goldens / "dit_and_loss.json").read_text())[case]


def golden_config(goldens: Path, case: str, *, phi_order: str = "conv_then_broadcast") -> ModelConfig:
    """Our configuration of a golden model; all sizes are read from the folder.

    Args:
        phi_order: the default is the reference's main branch's; its npu branch has ``repeat_then_conv``.
    """
    sizes = golden_facts(goldens, case)["config"]
    phi = golden_weights(goldens, case)["learnable_proj.proj.0.weight"]
    return ModelConfig(
        num_layers=sizes["num_layers"],
        hidden_size=sizes["dim"],
        ffn_hidden_size=sizes["ffn_dim"],
        num_attention_heads=sizes["num_heads"],
        latent_channels=sizes["in_dim"],
        freq_dim=sizes["freq_dim"],
        text_dim=sizes["text_dim"],
        text_length=sizes["text_len"],
        phi_kernel_size=(phi.shape[2], phi.shape[3], phi.shape[4]),
        phi_hidden_channels=phi.shape[0],
        phi_order=phi_order,
    )


def golden_weights(goldens: Path, case: str) -> dict[str, Tensor]:
    """The reference's weights under its main branch's names."""
    return load_file(goldens / f"dit_{case}.weights.safetensors")


def build_golden_model(
    goldens: Path, case: str, groups: Groups, *, phi_order: str = "conv_then_broadcast"
) -> DiffusionTransformer:
    """Our model with the reference's weights, on the CPU; ``groups`` are those of a single process."""
    config = golden_config(goldens, case, phi_order=phi_order)
    model = build_model(config, groups, resolve_device("cpu"))
    fill(model, golden_weights(goldens, case), "wan")
    return model


def random_weights(config: ModelConfig, external_format: str, generator: torch.Generator) -> dict[str, Tensor]:
    """fp32 tensors under another format's names, none of them zero or one, that keep activations near unit variance."""
    weights = {}
    for row in mappings(config, external_format):
        for name in row.external:
            noise = torch.randn(row.external_shape, generator=generator)
            matrix = noise.ndim > 1 and "modulation" not in name
            scale = noise[0].numel() ** -0.5 if matrix else 0.2
            weights[name] = scale * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return weights


def plain_model(config: ModelConfig, weights: Mapping[str, Tensor]) -> PlainFlashI2V:
    """The plain reference in fp64, with leaves that take gradients."""
    leaves = {name: tensor.double().requires_grad_() for name, tensor in weights.items()}
    return PlainFlashI2V(leaves, config.num_attention_heads, repeat_first=config.phi_order == "repeat_then_conv")


def fill(model: DiffusionTransformer, weights: Mapping[str, Tensor], external_format: str) -> None:
    """Set every parameter of an undivided model from ``weights``, all of which must be used.

    Args:
        weights: tensors under the names of ``external_format``.
        external_format: one of the key table's formats.
    """
    rows = list(mappings(model.spec.config, external_format))
    assert {name for row in rows for name in row.external} == set(weights)
    ours = {row.ours: row.to_ours([weights[name] for name in row.external]) for row in rows}
    parameters = dict(model.named_parameters())
    assert ours.keys() == parameters.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(ours[name])


def external_gradients(model: DiffusionTransformer, external_format: str) -> dict[str, Tensor | None]:
    """Gradients of an undivided model under another format's names; None where a parameter has none."""
    parameters = dict(model.named_parameters())
    gradients: dict[str, Tensor | None] = {}
    for row in mappings(model.spec.config, external_format):
        gradient = parameters[row.ours].grad
        parts = [None] * len(row.external) if gradient is None else row.to_external(gradient)
        gradients.update(zip(row.external, parts, strict=True))
    return gradients


def assert_same_gradient(
    ours: Tensor | None, expected: Tensor, name: str, relative: float, floor: float = 3e-5
) -> None:
    """Equal to ``relative`` in L2 norm and in each element; elements are forgiven ``floor`` of the largest."""
    assert ours is not None, f"{name} has no gradient"
    assert ours.shape == expected.shape and ours.dtype == expected.dtype, name
    error = ours - expected
    assert error.norm() <= relative * expected.norm(), f"{name}: {error.norm() / expected.norm():.1e} off"
    allowed = relative * expected.abs() + floor * expected.abs().max()
    assert (error.abs() <= allowed).all(), f"{name}: an element is {error.abs().max():.1e} off"
