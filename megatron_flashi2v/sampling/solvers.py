"""The Euler solver of the rectified flow's ordinary differential equation, from noise to clean latents.

Shape suffixes: B samples, C latent channels, T latent frames, H and W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_flashi2v.flow.interpolation import euler_step
from megatron_flashi2v.flow.sigmas import timesteps_of

StateVelocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``(state_BCTHW, timestep_B) -> velocity_BCTHW`` with its conditions bound already; timesteps are on the host."""

StepCallback = Callable[[int, int, torch.Tensor], None]
"""``(steps_done, num_steps, state_BCTHW)``, called after every step."""


def solve_euler(
    velocity: StateVelocity,
    noise_BCTHW: torch.Tensor,
    sigmas: torch.Tensor,
    *,
    callback: StepCallback | None = None,
) -> torch.Tensor:
    """Integrate ``d state / d sigma = velocity`` along a falling schedule with Euler steps.

    One step is ``y <- y + v(y, 1000 sigma[i]) * (sigma[i+1] - sigma[i])`` in fp32.
    The state stays in unshifted coordinates: FlashI2V's latent shift is subtracted inside the network at every
    call, so the result needs no un-shifting.

    Args:
        velocity: estimate of ``noise - clean`` at a state and a timestep in [0, 1000].
        noise_BCTHW: the state at ``sigmas[0]``; computed with in fp32 whatever its dtype.
        sigmas: fp32 ``[N + 1]`` on the host, the schedule from 1 (noise) to 0 (clean).
        callback: told about every finished step.

    Returns:
        The state at ``sigmas[-1]``, fp32, on the device of ``noise_BCTHW``.
    """
    state_BCTHW = noise_BCTHW.float()
    num_steps = len(sigmas) - 1
    timesteps = timesteps_of(sigmas)
    for index in range(num_steps):
        timestep_B = timesteps[index].expand(state_BCTHW.shape[0])
        velocity_BCTHW = velocity(state_BCTHW, timestep_B).float()
        state_BCTHW = euler_step(state_BCTHW, velocity_BCTHW, sigmas[index], sigmas[index + 1])
        if callback is not None:
            callback(index + 1, num_steps, state_BCTHW)
    return state_BCTHW
