"""Zero rows at the end of a sequence that does not divide over its ranks, and the sequence without them."""

from __future__ import annotations

import torch
from torch import Tensor


def zero_pad(rows: Tensor, count: int) -> Tensor:
    """``rows`` with zero rows after them along the first dimension, ``count`` in all."""
    missing = count - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def without_padding(rows: Tensor, count: int) -> Tensor:
    """The first ``count`` rows; ``rows`` itself where it has no more: a slice's gradient is a copy among zeros."""
    return rows if len(rows) == count else rows[:count]
