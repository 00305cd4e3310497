"""Ascend's fused rotation, ``torch_npu.npu_rotary_mul``, with a backward that keeps the tables alone."""

from __future__ import annotations

from typing import Any

import torch
import torch_npu
from torch import Tensor

from flashi2v_kernels.rope3d.tables import require_tables


def apply_rope(x_SBhD: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> Tensor:
    """See :func:`flashi2v_kernels.rope3d.reference.apply_rope`.

    The operator wants batch times heads below 1000 and a head size below 896.

    Raises:
        ValueError: the tables do not fit the tokens and the head size.
    """
    require_tables(x_SBhD, cos_SR, sin_SR)
    return _Rotation.apply(x_SBhD, cos_SR, sin_SR)


def turn(x_SBhD: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> Tensor:
    """The rotation, without a gradient that would keep the input.

    In fp32: the operator wants tables of the input's dtype, and angles in bf16 would lose five digits of eight.
    """
    tables = (table.float().repeat_interleave(2, dim=-1)[:, None, None, :] for table in (cos_SR, sin_SR))
    return torch_npu.npu_rotary_mul(x_SBhD.float(), *tables, "interleave").to(x_SBhD.dtype)


class _Rotation(torch.autograd.Function):
    """The operator's own gradient would keep the input, for gradients of the tables that nobody takes."""

    @staticmethod
    def forward(ctx: Any, x_SBhD: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> Tensor:
        ctx.save_for_backward(cos_SR, sin_SR)
        return turn(x_SBhD, cos_SR, sin_SR)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        cos_SR, sin_SR = ctx.saved_tensors
        return turn(gradients[0], cos_SR, -sin_SR), None, None
