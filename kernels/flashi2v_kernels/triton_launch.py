"""Launch grids of the Triton kernels: one program for a row, or for a run of rows that are summed.

Sums over tokens have two levels: every program adds its rows in order and writes its own partial sum, and torch adds
the partial sums. No atomics: the same inputs give the same bits.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

PARTIAL_SUMS = 512
"""Programs that share a sum over tokens: a few for every multiprocessor of the largest cards."""


def block_of(width: int) -> int:
    """Columns of a program that holds a whole row: the next power of two, which Triton's ranges must be."""
    return triton.next_power_of_2(width)


def warps_of(block: int, most: int = 16) -> int:
    """Warps that hold several rows of ``block`` columns: 8 numbers of each a thread, up to ``most`` warps."""
    return min(max(block // 256, 1), most)


def few_warps_of(block: int) -> int:
    """Warps of a kernel that reads a row, reduces it and writes it: 32 numbers a thread, up to 4 warps.

    Measured on an H200: 2 at a width of 1,536 and 4 at 5,120, where more spend their time on the reduction.
    """
    return min(max(block // 1024, 1), 4)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run ``kernel`` on ``grid``: every launch of ours passes here, so that they can be counted."""
    kernel[grid](*arguments, **constants)


def runs_of(rows: int) -> tuple[int, int]:
    """Rows that one program sums, and how many programs that makes."""
    length = triton.cdiv(rows, PARTIAL_SUMS)
    return length, triton.cdiv(rows, length)


def with_unit_stride(x: Tensor) -> Tensor:
    """``x``, copied if its last dimension is not contiguous: the kernels take strides of the other ones only."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
