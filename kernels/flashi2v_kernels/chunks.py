"""Elementwise chains in pieces that stay in a CPU's cache, instead of one pass over memory for each operation."""

from __future__ import annotations

import torch
from torch import Tensor

NUMBERS_PER_CHUNK = 1 << 19
"""2 MiB in fp32. Smaller pieces spend their time in starting threads; larger ones leave the cache."""


def row_chunks(x: Tensor, numbers: int = NUMBERS_PER_CHUNK) -> tuple[slice, ...]:
    """Slices of the first dimension that cover it in order; the whole at once elsewhere than on a CPU.

    Args:
        x: [rows, ...].
        numbers: about how many elements one slice holds.
    """
    rows = x.shape[0]
    if x.device.type != "cpu" or rows == 0:
        return (slice(0, rows),)
    step = max(1, numbers * rows // max(1, x.numel()))
    return tuple(slice(start, min(start + step, rows)) for start in range(0, rows, step))


def wide_dtype(x: Tensor) -> torch.dtype:
    """What is computed in: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)
