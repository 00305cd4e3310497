"""Launch grids of the Triton kernels: one program for a row, or for a run of rows that are summed.

Sums over tokens have two levels: every program adds its rows in order and writes its own partial sum, and torch adds
the partial sums. No atomics: the same inputs give the same bits.
"""

from __future__ import annotations

import triton
from torch import Tensor

PARTIAL_SUMS = 512
"""Programs that share a sum over tokens: a few for every multiprocessor of the largest cards."""


def block_of(width: int) -> int:
    """Columns of a program that holds a whole row: the next power of two, which Triton's ranges must be."""
    return triton.next_power_of_2(width)


def warps_of(block: int) -> int:
    """Warps for a row of ``block`` columns: 8 numbers a thread, up to 16 warps."""
    return min(max(block // 256, 1), 16)


def runs_of(rows: int) -> tuple[int, int]:
    """Rows that one program sums, and how many programs that makes."""
    length = triton.cdiv(rows, PARTIAL_SUMS)
    return length, triton.cdiv(rows, length)


def with_unit_stride(x: Tensor) -> Tensor:
    """``x``, copied if its last dimension is not contiguous: the kernels take strides of the other ones only."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
