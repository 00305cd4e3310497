"""Parts of a fused projection whose gradients are written where they belong, instead of being stacked afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

GradientMemory = Callable[[], Tensor]
"""Gives a part's place in the whole gradient; asked for in backward, by the function that computes the part's."""


def unbind(fused: Tensor, dim: int) -> tuple[tuple[Tensor, ...], Sequence[GradientMemory | None]]:
    """``fused.unbind(dim)``, and the place of each part's gradient in one tensor of the shape of ``fused``.

    A part's gradient that was not written to its place is copied there. Whoever asks for the gradient of a part by
    itself has it until the next backward pass through the same graph. Without gradients there are no places.

    Args:
        fused: any strides.
        dim: its axis of parts.
    """
    if not (torch.is_grad_enabled() and fused.requires_grad):
        parts = fused.unbind(dim)
        return parts, [None] * len(parts)
    whole = _WholeGradient(fused, dim)
    parts = _Unbind.apply(fused, dim, whole)
    return parts, [partial(whole.part, index) for index in range(len(parts))]


class _WholeGradient:
    """The tensor of one backward pass, made when its first part is asked for. It keeps nothing of forward."""

    def __init__(self, fused: Tensor, dim: int) -> None:
        self.shape, self.dtype, self.device, self.dim = fused.shape, fused.dtype, fused.device, dim
        self.made: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def part(self, index: int) -> Tensor:
        return self._make()[1][index]

    def take(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The whole and its parts; the next pass has others."""
        made, self.made = self._make(), None
        return made

    def _make(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.made is None:
            whole = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self.made = whole, whole.unbind(self.dim)
        return self.made


class _Unbind(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Tensor, dim: int, whole: _WholeGradient) -> tuple[Tensor, ...]:
        ctx.whole = whole
        ctx.set_materialize_grads(False)
        return fused.unbind(dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        whole, parts = ctx.whole.take()
        for part, gradient in zip(parts, gradients, strict=True):
            if gradient is None:
                part.zero_()
            elif gradient is not part:
                part.copy_(gradient)
        return whole, None, None
