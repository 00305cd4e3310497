"""The straight path between data and noise, its velocity, and one Euler step along it.

Source: FlashI2V (arXiv 2509.25187), ``flashi2v/schedulers/flashi2v_flow_matching.py`` on its main branch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def interpolate(latents: Tensor, noise: Tensor, sigma_B: Tensor) -> Tensor:
    """``sigma * n + (1 - sigma) * z`` per sample, in fp32.

    Args:
        latents: clean latents ``z``, [B, ...].
        noise: Gaussian noise ``n``, same shape.
        sigma_B: noise level of each sample, [B].

    Returns:
        fp32, same shape as ``latents``. FlashI2V's latent shift is not subtracted here; the model does that.

    Raises:
        ValueError: the shapes do not fit together.
    """
    _require_same_shape(latents, noise, "latents", "noise")
    if sigma_B.shape != latents.shape[:1]:
        raise ValueError(f"sigma has shape {tuple(sigma_B.shape)}; the batch needs ({latents.shape[0]},)")
    sigma = sigma_B.float().view(-1, *[1] * (latents.ndim - 1))
    return sigma * noise.float() + (1.0 - sigma) * latents.float()


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """The regression target ``n - z``, fp32: the path's derivative by sigma, without FlashI2V's latent shift.

    Args:
        latents: clean latents ``z``, any shape.
        noise: the noise ``n`` of :func:`interpolate`.
    """
    _require_same_shape(latents, noise, "latents", "noise")
    return noise.float() - latents.float()


def euler_step(state: Tensor, velocity: Tensor, sigma: Tensor | float, next_sigma: Tensor | float) -> Tensor:
    """``y + v * (next_sigma - sigma)``, computed in fp32.

    Args:
        state: the sampler's state ``y``, any shape.
        velocity: the network's (guided) velocity, same shape.
        sigma: the present noise level, a number or an fp32 scalar tensor (on the host or beside the state).
        next_sigma: the next noise level.

    Returns:
        the next state in ``state``'s dtype. Keep the state in fp32: bf16 rounds it at every step.
    """
    _require_same_shape(state, velocity, "state", "velocity")
    # fp32 minus fp32, as if both came from the fp32 table of sigmas
    delta = torch.as_tensor(next_sigma, dtype=torch.float32) - torch.as_tensor(sigma, dtype=torch.float32)
    return (state.float() + velocity.float() * delta).to(state.dtype)


def _require_same_shape(first: Tensor, second: Tensor, first_name: str, second_name: str) -> None:
    if first.shape != second.shape:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"{first_name} and {second_name} differ in shape: {shapes}")
