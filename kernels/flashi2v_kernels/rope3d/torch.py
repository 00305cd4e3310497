"""Eager torch; the backward is the rotation by the negative angle, so nothing but the tables is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashi2v_kernels.rope3d.reference import apply_rope as _turn
from flashi2v_kernels.rope3d.tables import require_tables


def apply_rope(x_SBhD: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> Tensor:
    """See :func:`flashi2v_kernels.rope3d.reference.apply_rope`.

    Raises:
        ValueError: the tables do not fit the tokens and the head size.
    """
    require_tables(x_SBhD, cos_SR, sin_SR)
    return _Rotation.apply(x_SBhD, cos_SR, sin_SR)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SBhD: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> Tensor:
        ctx.save_for_backward(cos_SR, sin_SR)
        return _turn(x_SBhD, cos_SR, sin_SR)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        cos_SR, sin_SR = ctx.saved_tensors
        return _turn(gradients[0], cos_SR, -sin_SR), None, None
