"""Compare a small forward pass on both sides of a conversion: equal weights must also compute the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from megatron_flashi2v.checkpoint.key_table import mappings, parameter_count
from megatron_flashi2v.conditioning.build import paradigm_of
from megatron_flashi2v.conditioning.interface import Extras, stack_extras
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.sample import ImageSettings
from megatron_flashi2v.conversion.formats.diffusers import CONDITIONING, TRANSFORMER
from megatron_flashi2v.conversion.weights import Weights
from megatron_flashi2v.models.build import build_model
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.runtime.files import read_json_object
from megatron_flashi2v.sampling.load import velocity_of

TOLERANCE, TEXT_ROWS = 1e-4, 512
MAX_BYTES = 2_000_000_000
"""Of fp32 weights; a larger model runs only as many of its first blocks as fit."""


@dataclasses.dataclass(frozen=True)
class _Inputs:
    latents_BCTHW: torch.Tensor
    timestep_B: torch.Tensor
    text_BLD: torch.Tensor
    image_latents_BC1HW: torch.Tensor
    extras: Extras


def compare_forward(source: Weights, written: Weights, folder: Path, target_format: str) -> str:
    """Run the source's weights in our model, and the written ones in diffusers' (format diffusers) or in ours.

    Args:
        source: the weights that were converted.
        written: the result, opened anew.
        folder: of the result.
        target_format: its format.

    Returns:
        A line for the report: the blocks that ran, and the difference of the outputs.

    Raises:
        CheckpointError: they are further apart than 1e-4 of the output's size, or not finite.
    """
    if source.non_finite:
        return "no forward pass: its outputs would be no numbers, as some of the weights that were kept"
    config = _small(source.config)
    if config is None:
        return "no forward pass: one block of this model is too large to run here"
    inputs = _inputs(config)
    first = _ours(source, config, inputs)
    if target_format == "diffusers":
        second, where = _theirs(written, config, inputs, folder), "diffusers' WanTransformer3DModel"
    else:
        second, where = _ours(written, config, inputs), "ours"
    error = float((first - second).abs().max() / first.abs().max().clamp(min=1e-6))
    if not error <= TOLERANCE:
        raise CheckpointError(
            f"{folder}: a forward pass of the written weights ({where}) is {error:.1e} of its size away from one of "
            f"{source.source}; at most {TOLERANCE:.0e} is allowed"
        )
    blocks = f"{config.num_layers} of {source.config.num_layers} blocks"
    return f"forward pass ({blocks}, fp32; the source in our model, the target in {where}): {error:.1e} apart"


def _small(config: ModelConfig) -> ModelConfig | None:
    """The model with as many of its first blocks as fit in the limit."""
    if paradigm_of(config).image_rows(config):
        # Beside an image's rows diffusers takes so many text rows for granted; weights do not depend on them.
        config = dataclasses.replace(config, text_length=TEXT_ROWS)
    one, two = (parameter_count(dataclasses.replace(config, num_layers=count)) * 4 for count in (1, 2))
    if one > 2 * MAX_BYTES:
        return None
    return dataclasses.replace(config, num_layers=max(1, min(config.num_layers, 1 + (MAX_BYTES - one) // (two - one))))


def _inputs(config: ModelConfig) -> _Inputs:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    frames, height, width = (2 * side for side in config.patch_size)
    image_shape, paradigm = (config.latent_channels, 1, height, width), paradigm_of(config)
    stored = paradigm.stored_inputs(config, (config.latent_channels, frames, height, width))
    return _Inputs(
        latents_BCTHW=noise(1, config.latent_channels, frames, height, width),
        timestep_B=torch.tensor([640.0]),
        text_BLD=noise(1, config.text_length, config.text_dim),
        image_latents_BC1HW=noise(1, *image_shape),
        extras={
            **stack_extras([paradigm.sampling_extras(ImageSettings(), image_shape, lambda purpose: generator)]),
            **{name: noise(1, *shape) for name, shape in stored.items()},
        },
    )


@torch.no_grad()
def _ours(weights: Weights, config: ModelConfig, inputs: _Inputs) -> torch.Tensor:
    device = resolve_device("cpu")
    with single_process(device) as groups:
        model = build_model(config, groups, device)
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.read(name))  # as it is written, which may be rounded
        return velocity_of(model)(*(getattr(inputs, field.name) for field in dataclasses.fields(inputs)))


def _settings(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """The configuration that was written, with as many blocks as run."""
    stored = read_json_object(folder / TRANSFORMER / "config.json", error=CheckpointError)
    settings = {key: value for key, value in stored.items() if not key.startswith("_")}
    return {**settings, "num_layers": config.num_layers}


@torch.no_grad()
def _theirs(weights: Weights, config: ModelConfig, inputs: _Inputs, folder: Path) -> torch.Tensor:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from safetensors import safe_open

    from megatron_flashi2v.release.image_conditioning import FlashI2VImageConditioning

    model = WanTransformer3DModel(**_settings(folder, config)).eval()
    names = {name for entry in mappings(config, "diffusers") for name in entry.external}
    missing = set(names)
    for path in sorted((folder / TRANSFORMER).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            held = {name: file.get_tensor(name).float() for name in file.keys() if name in names}  # noqa: SIM118
        missing -= set(model.load_state_dict(held, strict=False).unexpected_keys) | set(held)
    if missing:
        raise CheckpointError(f"{folder / TRANSFORMER} lacks {', '.join(sorted(missing)[:3])}")
    conditioning = FlashI2VImageConditioning.from_pretrained(folder / CONDITIONING).float()
    conditioned = conditioning(inputs.latents_BCTHW, inputs.image_latents_BC1HW, inputs.extras)
    with conditioning.guiding(model, conditioned.guidance_BCTHW):
        return model(
            conditioned.latents_BCTHW, inputs.timestep_B, inputs.text_BLD, conditioned.image_rows_BRX, return_dict=False
        )[0]
