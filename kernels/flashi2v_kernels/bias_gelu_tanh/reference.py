"""The definition of the activation, left to autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bias_gelu_tanh(x: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    """``v/2 * (1 + tanh(sqrt(2/pi) * (v + 0.044715 v^3)))`` of ``v = x + bias`` (arXiv 1606.08415, section 2).

    Args:
        x: [..., width], any float dtype.
        bias: [width], or None for none.
        out: memory for the result, where no gradient is wanted; what held the result before, for example.

    Returns:
        the shape and dtype of ``x``; computed in fp32 (fp64 for fp64) and rounded once.

    Raises:
        ValueError: the bias does not fit.
    """
    require_bias(x, bias)
    value = x.to(torch.promote_types(x.dtype, torch.float32))
    if bias is not None:
        value = value + bias.to(value.dtype)
    inner = math.sqrt(2.0 / math.pi) * (value + 0.044715 * value**3)
    output = (0.5 * value * (1.0 + torch.tanh(inner))).to(x.dtype)
    return output if out is None else out.copy_(output)


def require_bias(x: Tensor, bias: Tensor | None) -> None:
    """Refuse shapes that would broadcast silently.

    Raises:
        ValueError: the bias is not one row of the last dimension's size.
    """
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"bias {tuple(bias.shape)} does not fit x {tuple(x.shape)}; it must be {tuple(x.shape[-1:])}")
