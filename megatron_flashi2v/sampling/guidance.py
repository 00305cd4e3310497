"""Classifier-free guidance on the text; the image conditions stay in both passes.

Shape suffixes: B samples, C latent channels, T latent frames, H and W latent rows and columns, L text rows,
D text width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed

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
    group: torch.distributed.ProcessGroup | None = None,
) -> VelocityFunction:
    """A velocity of the same signature that steers away from the negative text.

    Both passes get the same state, image latents and extras; only the text differs.

    Args:
        velocity: the plain velocity.
        negative_text_BLD: text rows of the unconditional pass, of the same shape as the conditional ones.
        guidance_scale: g; at 1 or below, return the plain velocity.
        batched: compute both passes in one call at twice the batch: faster where the accelerator is not full, at twice
            the activations.
        group: two ranks that each compute one pass, the first the conditional one, and exchange them.
    """
    if not is_guided(guidance_scale):
        return velocity
    passes = partial(_divided, group) if group is not None else _Batched() if batched else _sequential

    def guided(
        latents_BCTHW: torch.Tensor,
        timestep_B: torch.Tensor,
        text_BLD: torch.Tensor,
        image_latents_BC1HW: torch.Tensor,
        extras: Extras,
    ) -> torch.Tensor:
        same = (latents_BCTHW, timestep_B, image_latents_BC1HW, extras)
        return combine_guided(*passes(velocity, text_BLD, negative_text_BLD, *same), guidance_scale)

    return guided


def _sequential(
    velocity: VelocityFunction, text: torch.Tensor, negative_text: torch.Tensor, latents: torch.Tensor,
    timestep: torch.Tensor, image_latents: torch.Tensor, extras: Extras,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The conditional and the unconditional velocity, one after the other."""
    return (
        velocity(latents, timestep, text, image_latents, extras),
        velocity(latents, timestep, negative_text, image_latents, extras),
    )


class _Batched:
    """Both velocities in one call, with one object for all steps of what does not change: a model knows it again."""

    def __init__(self) -> None:
        self._given: tuple[torch.Tensor, Extras] | None = None
        self._doubled: tuple[torch.Tensor, Extras]

    def __call__(
        self, velocity: VelocityFunction, text: torch.Tensor, negative_text: torch.Tensor, latents: torch.Tensor,
        timestep: torch.Tensor, image_latents: torch.Tensor, extras: Extras,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        if self._given is None or self._given[0] is not text or self._given[1] is not extras:
            self._given = text, extras
            self._doubled = (
                torch.cat([text, negative_text]), {name: torch.cat([value, value]) for name, value in extras.items()}
            )
        texts, both_extras = self._doubled
        both = velocity(
            torch.cat([latents, latents]),
            torch.cat([timestep, timestep]),
            texts,
            torch.cat([image_latents, image_latents]),
            both_extras,
        )
        conditional, unconditional = both.chunk(2)
        return conditional, unconditional


def _divided(
    group: torch.distributed.ProcessGroup,
    velocity: VelocityFunction, text: torch.Tensor, negative_text: torch.Tensor, latents: torch.Tensor,
    timestep: torch.Tensor, image_latents: torch.Tensor, extras: Extras,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Both velocities, one computed here, the other by the group's other rank."""
    own = velocity(latents, timestep, negative_text if group.rank() else text, image_latents, extras).contiguous()
    conditional, unconditional = torch.empty_like(own), torch.empty_like(own)
    torch.distributed.all_gather([conditional, unconditional], own, group=group)
    return conditional, unconditional
