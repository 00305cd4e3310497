"""A pair of experts as one model: one for high noise and one for low, divided at a noise level, as Wan2.2's are.

The rule is diffusers': the first takes timesteps of at least ``boundary_ratio * 1000``, the second those below.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_flashi2v.conditioning.interface import Extras
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.flow.sigmas import NUM_TRAIN_TIMESTEPS
from megatron_flashi2v.sampling.guidance import VelocityFunction


@dataclass(frozen=True, kw_only=True)
class LowNoise:
    """The second expert of a pair.

    Attributes:
        velocity: the model.
        boundary_ratio: sigma below which it is called.
    """

    velocity: VelocityFunction
    boundary_ratio: float


def is_low_noise(timestep: torch.Tensor, boundary_ratio: float) -> bool:
    """Whether a timestep, 1000 * sigma, is the second expert's; one on the boundary is the first's."""
    return bool(timestep < boundary_ratio * NUM_TRAIN_TIMESTEPS)


def divided_by_noise(high: VelocityFunction, low: VelocityFunction, boundary_ratio: float) -> VelocityFunction:
    """The velocity of the expert that each noise level belongs to; all samples of a call share theirs."""

    def velocity(
        latents_BCTHW: torch.Tensor,
        timestep_B: torch.Tensor,
        text_BLD: torch.Tensor,
        image_latents_BC1HW: torch.Tensor,
        extras: Extras,
    ) -> torch.Tensor:
        expert = low if is_low_noise(timestep_B[0], boundary_ratio) else high
        return expert(latents_BCTHW, timestep_B, text_BLD, image_latents_BC1HW, extras)

    return velocity


def require_pair(guidance_scale_2: float | None, low_noise: object | None) -> None:
    """Refuse the second expert's setting where there is no second expert.

    Raises:
        ConfigError: names the setting.
    """
    if guidance_scale_2 is not None and low_noise is None:
        raise ConfigError(
            f"guidance_scale_2 is {guidance_scale_2:g}, which is for the second of a pair of experts, but there is one "
            "model; leave it out"
        )
