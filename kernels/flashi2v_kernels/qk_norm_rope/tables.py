"""Cosines and sines of the token grid, computed in fp64 on the host."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_POSITIONS = 1024
"""Positions per axis that Wan's table has; beyond it no released weights were trained."""


def axis_sizes(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that turn with time, height and width: unequal, 128 -> 44, 42, 42.

    Raises:
        ValueError: ``head_dim`` is odd or below 2 (channels turn in pairs).
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; it must be even and positive (channels turn in pairs)")
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def axis_angles(positions: int, size: int, theta: float = 10000.0) -> Tensor:
    """``p * theta^(-2j/size)`` for positions p and pairs j of one axis, fp64 [positions, size / 2].

    Raises:
        ValueError: more positions than :data:`MAX_POSITIONS`.
    """
    if positions > MAX_POSITIONS:
        raise ValueError(f"an axis has {positions} positions; the rotary table ends at {MAX_POSITIONS}")
    # heads below 6 channels turn with time only: the other axes have size 0
    exponents_R = torch.arange(0, size, 2, dtype=torch.float64) / max(size, 1)
    return torch.outer(torch.arange(positions, dtype=torch.float64), 1.0 / torch.pow(theta, exponents_R))


def rope_tables(
    grid_thw: tuple[int, int, int],
    head_dim: int,
    theta: float = 10000.0,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The rotation of every token of a grid, tokens in (t, h, w) row-major order.

    Args:
        grid_thw: tokens along time, height and width.
        head_dim: size of an attention head ``D``, even; split by :func:`axis_sizes`, each axis restarting its
            frequencies.
        theta: base of the frequencies.
        dtype: dtype of the result; the tables are computed in fp64 whatever it is.

    Returns:
        cosines and sines, each [t*h*w, D/2], on the host; pairs of time first, then height, then width.

    Raises:
        ValueError: an odd head size, an empty axis or one longer than :data:`MAX_POSITIONS`.
    """
    if min(grid_thw) < 1:
        raise ValueError(f"the token grid is {tuple(grid_thw)}; every axis needs at least one position")
    angles = []
    for axis, (positions, size) in enumerate(zip(grid_thw, axis_sizes(head_dim), strict=True)):
        shape = [1, 1, 1, size // 2]
        shape[axis] = positions
        angles.append(axis_angles(positions, size, theta).view(shape).expand(*grid_thw, size // 2))
    angles_SR = torch.cat(angles, dim=-1).flatten(0, 2)
    return angles_SR.cos().to(dtype), angles_SR.sin().to(dtype)


def require_tables(x_SBhD: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> None:
    """Refuse tables that would broadcast where they must not.

    Raises:
        ValueError: the tables are not [tokens, head size / 2] of ``x_SBhD``.
    """
    expected = (x_SBhD.shape[0], x_SBhD.shape[-1] // 2)
    if tuple(cos_SR.shape) != expected or tuple(sin_SR.shape) != expected:
        raise ValueError(
            f"tables {tuple(cos_SR.shape)} and {tuple(sin_SR.shape)} do not fit x {tuple(x_SBhD.shape)}; "
            f"they must be {expected}"
        )
