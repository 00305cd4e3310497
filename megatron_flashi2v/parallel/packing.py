"""One tensor per pipeline hop: tokens, rows for cross-attention and conditioning rows, packed.

The conditioning rows (time embedding and modulation) are fp32 also when the hop is bf16: rounding them at a stage
boundary would make the result depend on the layout. They cross bit-cast, as twice as many bf16 rows; gradients come
back the same way. Nothing between pack and unpack does arithmetic on the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedShape:
    """How many rows of each kind one hop carries on this rank.

    Attributes:
        tokens: visual tokens of this rank.
        context: text rows of this rank, and image rows with their padding.
        conditioning: fp32 conditioning rows.
        dtype: dtype of the hop.
    """

    tokens: int
    context: int
    conditioning: int
    dtype: torch.dtype

    @property
    def conditioning_rows(self) -> int:
        """Rows that the conditioning takes in the hop's dtype."""
        return self.conditioning * (torch.float32.itemsize // self.dtype.itemsize)

    @property
    def rows(self) -> int:
        """Rows of the packed tensor."""
        return self.tokens + self.context + self.conditioning_rows


def _cast_rows(rows_RBD: Tensor, dtype: torch.dtype) -> Tensor:
    """Reinterpret the bits of [R, B, D] in another dtype, keeping B and D and changing R."""
    count, batch, width = rows_RBD.shape
    ratio = rows_RBD.element_size() / dtype.itemsize
    # Rows lead: [B, D, R] has a row's worth of one value's bits contiguous, so a view can regroup them.
    bits_BDR = rows_RBD.permute(1, 2, 0).contiguous().view(dtype)
    return bits_BDR.reshape(batch, width, int(count * ratio)).permute(2, 0, 1)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_SBD: Tensor, context_TBD: Tensor, conditioning_RBD: Tensor) -> Tensor:
        dtype = tokens_SBD.dtype
        ctx.split = [tokens_SBD.shape[0], context_TBD.shape[0]]
        return torch.cat([tokens_SBD, context_TBD, _cast_rows(conditioning_RBD, dtype)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, context = ctx.split
        grad_tokens, grad_context, grad_rows = grad.split([tokens, context, grad.shape[0] - tokens - context])
        return grad_tokens, grad_context, _cast_rows(grad_rows, torch.float32)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, shape: PackedShape) -> tuple[Tensor, Tensor, Tensor]:
        tokens, context, rows = packed.split([shape.tokens, shape.context, shape.conditioning_rows])
        return tokens.contiguous(), context.contiguous(), _cast_rows(rows, torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_tokens: Tensor, grad_context: Tensor, grad_rows: Tensor) -> tuple[Tensor, None]:
        dtype = grad_tokens.dtype
        return torch.cat([grad_tokens, grad_context.to(dtype), _cast_rows(grad_rows.float(), dtype)]), None


def pack(tokens_SBD: Tensor, context_TBD: Tensor, conditioning_RBD: Tensor) -> Tensor:
    """Concatenate along rows: [S + T + R', B, D] in the tokens' dtype.

    Args:
        tokens_SBD: the residual stream, in the hop's dtype.
        context_TBD: text and image rows, in the same dtype.
        conditioning_RBD: fp32 rows; R' is R in fp32 and 2R in a 16-bit dtype.
    """
    return _Pack.apply(tokens_SBD, context_TBD, conditioning_RBD)


def unpack(packed: Tensor, shape: PackedShape) -> tuple[Tensor, Tensor, Tensor]:
    """The reverse of :func:`pack`: tokens_SBD, context_TBD, and conditioning_RBD in fp32, bit for bit."""
    return _Unpack.apply(packed, shape)
