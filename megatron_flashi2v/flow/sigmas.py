"""Noise levels of rectified flow: draws for training and steps for sampling.

Sigma in [0, 1] is the share of noise, 1 = pure noise; the network sees ``timestep = 1000 * sigma``.
Random draws are arguments: every function here is a pure function of its tensors. All results are fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000
"""Timestep per unit of sigma."""

_BASE_TOKENS, _BASE_SHIFT = 256, 0.5
_MAX_TOKENS, _MAX_SHIFT = 4096, 1.15
_TOKEN_AREA = 4  # latent pixels of one token: the 2x2 spatial patch


def logit_normal_sigmas(normal_draws_B: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """``sigmoid(mean + std * u)`` for standard normal draws ``u``.

    Args:
        normal_draws_B: standard normal draws, [B], any float dtype.
        mean: location of the logits.
        std: scale of the logits.

    Returns:
        sigmas in (0, 1), fp32 [B].
    """
    return torch.sigmoid(mean + std * normal_draws_B.float())


def uniform_sigmas(uniform_draws_B: Tensor) -> Tensor:
    """Draws from [0, 1) taken as sigmas: fp32 [B]."""
    return uniform_draws_B.float()


def sigmas_between(
    uniform_draws_B: Tensor, low: float, high: float, *, logit: tuple[float, float] | None, shift: float
) -> Tensor:
    """Shifted sigmas of the part of their distribution that lies in [low, high], by its quantiles.

    So an expert of a pair trains on its own noise levels, each as often as a model of all levels meets it there.

    Args:
        uniform_draws_B: draws from [0, 1), [B].
        low: lowest sigma, after the shift.
        high: highest sigma, above ``low``.
        logit: mean and standard deviation of :func:`logit_normal_sigmas`; None for :func:`uniform_sigmas`.
        shift: as in :func:`shift_sigmas`.

    Returns:
        fp32 [B], in [low, high].
    """
    # fp64: far from the middle, fp32 has no quantiles left. The shift by 1 / a undoes the shift by a.
    ends = torch.tensor([low, high], dtype=torch.float64)
    ends = ends / (shift + (1.0 - shift) * ends)
    if logit is None:
        below, above = ends
        sigmas_B = below + uniform_draws_B.double() * (above - below)
    else:
        mean, std = logit
        normal = (torch.logit(ends) - mean) / std
        # Above the middle the mirrored distribution, and torch's logarithm of its function, keep fp64's digits.
        sign = -1.0 if normal[0] > 0 else 1.0
        below, above = torch.special.log_ndtr(sign * normal).exp()
        quantiles_B = sign * torch.special.ndtri(below + uniform_draws_B.double() * (above - below))
        sigmas_B = torch.sigmoid(mean + std * quantiles_B)
    return shift_sigmas(sigmas_B, shift).clamp(low, high)


def dynamic_shift(latent_height: int, latent_width: int) -> float:
    """The resolution's shift ``exp(mu)``, where ``mu`` is linear in the tokens of one latent frame.

    The line goes through 0.5 at 256 tokens and 1.15 at 4096 tokens and is not clamped outside; a token covers
    2x2 latent pixels and the number of frames does not count (as on both branches of FlashI2V).

    Args:
        latent_height: rows of one latent frame (pixels over the VAE's spatial stride).
        latent_width: columns of one latent frame.

    Returns:
        the factor for :func:`shift_sigmas`, e.g. 2.0559 for 60x104 (480x832 pixels).
    """
    tokens = latent_height * latent_width // _TOKEN_AREA
    slope = (_MAX_SHIFT - _BASE_SHIFT) / (_MAX_TOKENS - _BASE_TOKENS)
    return math.exp(tokens * slope + (_BASE_SHIFT - slope * _BASE_TOKENS))


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move noise levels toward noise: ``a*sigma / (1 + (a - 1)*sigma)`` with shift ``a``.

    Args:
        sigmas: any shape, values in [0, 1].
        shift: ``a`` > 0; 1 changes nothing.

    Returns:
        fp32, same shape; 0 stays 0 and 1 stays 1.

    Raises:
        ValueError: shift is not a positive finite number.
    """
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift is {shift}; it must be a positive finite number")
    sigmas = sigmas.float()
    return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)


def inference_sigmas(num_steps: int, shift: float) -> Tensor:
    """The sampler's noise levels: ``num_steps`` equal steps from 1 to 0, shifted.

    Args:
        num_steps: network evaluations (per guidance branch), at least 1.
        shift: as in :func:`shift_sigmas`.

    Returns:
        fp32 [num_steps + 1] on the host; the first is exactly 1, the last exactly 0.

    Raises:
        ValueError: num_steps is below 1, or the shift is not positive.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; sampling needs at least 1 step")
    return shift_sigmas(torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float32), shift)


def timesteps_of(sigmas: Tensor) -> Tensor:
    """The network's timesteps: ``1000 * sigma``, fp32, not rounded to whole numbers."""
    return sigmas.float() * NUM_TRAIN_TIMESTEPS
