"""The product of a tensor-parallel linear: bias added in it, weight gradients summed into fp32 by it.

N: rows of all tokens and samples, I: inputs, O: outputs of this rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from flashi2v_kernels.autograd import call

AddWeightGradient = Callable[[Tensor, Tensor, Tensor], None]
"""Adds dY^T X to a buffer in place: (buffer [O, I], dY [N, O], X [N, I])."""
Arriving = Callable[[], Tensor]
"""Waits for a tensor that other ranks contribute to, and returns it."""


@dataclass(frozen=True)
class Exchange:
    """What a product's ranks exchange. Both exchanges run beside the products that do not need them.

    Attributes:
        group: tensor-parallel ranks; None where nothing is exchanged.
        sequence_parallel: each rank holds some of the tokens, the product needs all, and each rank gets the gradient of
            its own; otherwise every rank holds all, and gets their whole gradient.
    """

    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False

    def gather(self, rows: Tensor) -> Arriving:
        """All tokens from this rank's, along the first axis."""
        if self.group is None or not self.sequence_parallel:
            return lambda: rows
        whole = rows.new_empty((len(rows) * self.group.size(), *rows.shape[1:]))
        return _when_done(dist.all_gather_into_tensor(whole, rows.contiguous(), self.group, async_op=True), whole)

    def reduce(self, grad: Tensor) -> Arriving:
        """The sum over ranks of the gradient of all tokens; under sequence parallelism this rank's part of it."""
        if self.group is None:
            return lambda: grad
        if not self.sequence_parallel:
            return _when_done(dist.all_reduce(grad, group=self.group, async_op=True), grad)
        own = grad.new_empty((len(grad) // self.group.size(), *grad.shape[1:]))
        return _when_done(dist.reduce_scatter_tensor(own, grad, group=self.group, async_op=True), own)


def _when_done(work: dist.Work, tensor: Tensor) -> Arriving:
    def wait() -> Tensor:
        work.wait()
        return tensor

    return wait


def linear(
    rows: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    exchange: Exchange,
    add_weight_gradient: AddWeightGradient,
) -> Tensor:
    """Y = X A^T + b, [..., O].

    Where megatron-core's data parallelism keeps a gradient buffer beside the weight (``main_grad``), backward adds the
    weight's gradient to it, and marks the weight (``grad_added_to_main_grad``), as megatron-core's fused accumulation
    does. Another function of the same weight must do so too, or set its ``zero_out_wgrad``.

    Args:
        rows: X [..., I]; the tokens, under sequence parallelism this rank's, lie along the first axis.
        weight_OI: A; frozen, it costs no activation.
        bias_O: b.
        exchange: with the other ranks.
        add_weight_gradient: adds to the gradient buffer.
    """
    return call(_Linear, rows, weight_OI, bias_O, exchange, add_weight_gradient)


class _Linear(torch.autograd.Function):
    """dX = dY A, dA = dY^T X, db = sum of dY's rows."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        exchange: Exchange,
        add_weight_gradient: AddWeightGradient,
    ) -> Tensor:
        # Recomputation saves other tensors for the same memory, without the parameter's attributes.
        ctx.parameter = weight_OI
        ctx.exchange, ctx.add_weight_gradient = exchange, add_weight_gradient
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight_OI)
        whole = exchange.gather(rows)()
        # On two axes the bias is added by the product itself.
        return F.linear(whole.reshape(-1, whole.shape[-1]), weight_OI, bias_O).view(*whole.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight_OI = ctx.saved_tensors
        wants_rows, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        grad_NO = grad.flatten(0, -2)
        gathered = ctx.exchange.gather(rows) if wants_weight else None
        reduced = ctx.exchange.reduce((grad_NO @ weight_OI).unflatten(0, grad.shape[:-1])) if wants_rows else None
        grad_weight = grad_bias = None
        if gathered is not None:
            grad_weight = _weight_gradient(ctx.parameter, grad_NO, gathered().flatten(0, -2), ctx.add_weight_gradient)
        if wants_bias:
            grad_bias = grad_NO.sum(0)
        return None if reduced is None else reduced(), grad_weight, grad_bias, None, None


def _weight_gradient(
    parameter: Tensor, grad_NO: Tensor, rows_NI: Tensor, add_weight_gradient: AddWeightGradient
) -> Tensor:
    """What autograd is given: the gradient, or, where it was added to the buffer, a tensor of its shape.

    Without one the hook that starts the reduction over replicas might run in another thread, or not at all.
    """
    if not hasattr(parameter, "grad_added_to_main_grad"):
        return grad_NO.t() @ rows_NI
    add_weight_gradient(_gradient_buffer(parameter), grad_NO, rows_NI)
    parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    is_read = getattr(parameter, "zero_out_wgrad", False)
    return torch.zeros_like(parameter) if is_read else torch.empty_like(parameter)


def _gradient_buffer(parameter: Tensor) -> Tensor:
    """What megatron-core's data parallelism sums up; Megatron-FSDP's holds anything at first, and this pass's then."""
    if hasattr(parameter, "get_main_grad"):
        return parameter.get_main_grad().zero_()  # type: ignore[no-any-return]
    return parameter.main_grad  # type: ignore[attr-defined, no-any-return]


def add_weight_gradient(
    buffer_OI: Tensor, grad_NO: Tensor, rows_NI: Tensor, product: Callable[..., Tensor] = torch.addmm
) -> None:
    """Add dY^T X in one product where the device has one that sums into the buffer's dtype; rounded and added, else.

    Args:
        buffer_OI: fp32 gradients.
        grad_NO: dY.
        rows_NI: X.
        product: torch.addmm, or what stands in for it.
    """
    if grad_NO.dtype == buffer_OI.dtype:
        torch.addmm(buffer_OI, grad_NO.t(), rows_NI, out=buffer_OI)
    elif sums_into_fp32(product, grad_NO.device, grad_NO.dtype):
        product(buffer_OI, grad_NO.t(), rows_NI, out_dtype=buffer_OI.dtype, out=buffer_OI)
    else:
        buffer_OI.add_(grad_NO.t() @ rows_NI)


@functools.cache
def sums_into_fp32(product: Callable[..., Tensor], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of matrices of a lower precision adds to an fp32 matrix without rounding; tried out once."""
    try:
        factor = torch.ones(16, 16, device=device, dtype=dtype)
        total = torch.full((16, 16), 1 / 3, device=device)
        product(total, factor.t(), factor, out_dtype=torch.float32, out=total)
        return bool((total == torch.full_like(total, 1 / 3) + 16).all())
    except Exception:  # a missing overload, kernel or shape: torch, its version and its backends each have their own
        return False
