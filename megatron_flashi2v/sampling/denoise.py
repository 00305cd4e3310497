"""The denoising loop: from noise to clean latents, with any model, solver and guidance.

Shape suffixes: B samples, C latent channels, T latent frames, H and W latent rows and columns, L text rows,
D text width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_flashi2v.conditioning.interface import Extras
from megatron_flashi2v.sampling.guidance import Guidance, VelocityFunction
from megatron_flashi2v.sampling.solvers import Solver

StepCallback = Callable[[int, int, torch.Tensor], torch.Tensor | None]
"""``(steps done, steps, state_BCTHW)`` after every step; a returned tensor replaces the state."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The model's inputs that are the same at every step.

    Attributes:
        text_BLD: text rows, zero-padded to the model's text length.
        image_latents_BC1HW: normalised latents of the condition images, fp32.
        extras: the paradigm's own settings and draws, one row per sample.
    """

    text_BLD: torch.Tensor
    image_latents_BC1HW: torch.Tensor
    extras: Extras


def denoise(
    velocity: VelocityFunction,
    noise_BCTHW: torch.Tensor,
    conditions: Conditions,
    solver: Solver,
    *,
    guidance: Guidance | None = None,
    callback: StepCallback | None = None,
    stop: Callable[[], bool] | None = None,
) -> torch.Tensor:
    """Integrate ``d state / d sigma = velocity`` from noise to clean latents.

    The state stays in unshifted coordinates: FlashI2V's latent shift is subtracted inside the model at every call, so
    the result needs no un-shifting.

    Args:
        velocity: the model.
        noise_BCTHW: the state at the solver's first noise level, of any float dtype; the loop keeps it in fp32.
        conditions: the model's other inputs, on the device of the noise.
        solver: the noise levels, and the step from one to the next; solves once.
        guidance: makes the guided velocity of the plain one; None for the plain one.
        callback: called after every step.
        stop: asked after every step whether to return the state as it is. Every rank of a divided model must get the
            same answer.

    Returns:
        The last state, fp32 on the device of the noise.
    """
    guided = velocity if guidance is None else guidance(velocity)
    state_BCTHW = noise_BCTHW.float()
    for index, timestep in enumerate(solver.timesteps_N):
        velocity_BCTHW = guided(
            state_BCTHW,
            timestep.expand(len(state_BCTHW)),
            conditions.text_BLD,
            conditions.image_latents_BC1HW,
            conditions.extras,
        )
        state_BCTHW = solver.step(index, velocity_BCTHW.float(), state_BCTHW)
        if callback is not None:
            replaced_BCTHW = callback(index + 1, len(solver.timesteps_N), state_BCTHW)
            state_BCTHW = state_BCTHW if replaced_BCTHW is None else replaced_BCTHW
        if stop is not None and stop():
            break
    return state_BCTHW
