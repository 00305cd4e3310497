"""Sinusoidal features of the timestep."""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_PERIOD = 10000.0


def timestep_sinusoid(timesteps_B: Tensor, dim: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[cos(t * w_i) | sin(t * w_i)]`` with ``w_i = 10000^(-i / (dim/2))``, computed in fp64 on the host.

    Timesteps reach 1000, where fp32 angles would lose three digits. Not every accelerator has fp64, hence the
    host; there are only a few numbers. Keep the timesteps on the host: reading a device's would wait for it.

    Args:
        timesteps_B: timesteps (1000 * sigma), [B].
        dim: number of features, even.
        dtype: dtype of the result.

    Returns:
        [B, dim] on the host; not differentiable.

    Raises:
        ValueError: ``dim`` is odd or below 2.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim is {dim}; it must be even and positive (cosines and sines)")
    half = dim // 2
    frequencies_F = torch.pow(_MAX_PERIOD, -torch.arange(half, dtype=torch.float64) / half)
    angles_BF = torch.outer(timesteps_B.detach().to("cpu", torch.float64), frequencies_F)
    return torch.cat([angles_BF.cos(), angles_BF.sin()], dim=1).to(dtype)
