"""Classifier-free guidance on the text; the image conditions stay in both passes.

Shape suffixes: B samples, C latent channels, T latent frames, H and W latent rows and columns, L text rows,
D text width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_flashi2v.conditioning.interface import Extras

VelocityFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Extras], torch.Tensor]
"""``(latents_BCTHW, timestep_B, text_BLD, image_latents_BC1HW, extras) -> velocity_BCTHW``.

A model as sampling calls it, such as ``models.predict.predict_velocity`` with the model bound. Timesteps are on the
host, where the model makes their features; all else is on the model's device.
"""

Guidance = Callable[[VelocityFunction], VelocityFunction]
"""Makes the guided velocity of a model's plain one, such as :func:`with_guidance` with all but the model bound."""


def combine_guided(
    conditional_BCTHW: torch.Tensor, unconditional_BCTHW: torch.Tensor, guidance_scale: float
) -> torch.Tensor:
    """``v_u + g (v_c - v_u)``: g = 1 is the conditional velocity, g = 0 the unconditional one."""
    return unconditional_BCTHW + guidance_scale * (conditional_BCTHW - unconditional_BCTHW)


def is_guided(guidance_scale: float) -> bool:
    """Whether a guidance scale asks for a second pass: only above 1, as in FlashI2V's reference."""
    return guidance_scale > 1.0


def with_guidance(
    velocity: VelocityFunction,
    negative_text_BLD: torch.Tensor,
    guidance_scale: float,
    *,
    batched: bool = False,
) -> VelocityFunction:
    """A velocity of the same signature that steers away from the negative text.

    Both passes get the same state, image latents and extras; only the text differs.

    Args:
        velocity: the plain velocity.
        negative_text_BLD: text rows of the unconditional pass, of the same shape as the conditional ones.
        guidance_scale: g; at 1 or below, return the plain velocity.
        batched: compute both passes in one call at twice the batch: faster where the accelerator is not full, at twice
            the activations.
    """
    if not is_guided(guidance_scale):
        return velocity

    def guided_sequential(
        latents_BCTHW: torch.Tensor,
        timestep_B: torch.Tensor,
        text_BLD: torch.Tensor,
        image_latents_BC1HW: torch.Tensor,
        extras: Extras,
    ) -> torch.Tensor:
        conditional = velocity(latents_BCTHW, timestep_B, text_BLD, image_latents_BC1HW, extras)
        unconditional = velocity(
            latents_BCTHW, timestep_B, negative_text_BLD, image_latents_BC1HW, extras
        )
        return combine_guided(conditional, unconditional, guidance_scale)

    def guided_batched(
        latents_BCTHW: torch.Tensor,
        timestep_B: torch.Tensor,
        text_BLD: torch.Tensor,
        image_latents_BC1HW: torch.Tensor,
        extras: Extras,
    ) -> torch.Tensor:
        both = velocity(
            torch.cat([latents_BCTHW, latents_BCTHW]),
            torch.cat([timestep_B, timestep_B]),
            torch.cat([text_BLD, negative_text_BLD]),
            torch.cat([image_latents_BC1HW, image_latents_BC1HW]),
            {name: torch.cat([value, value]) for name, value in extras.items()},
        )
        conditional, unconditional = both.chunk(2)
        return combine_guided(conditional, unconditional, guidance_scale)

    return guided_batched if batched else guided_sequential
