"""torch's GELU on pieces of the sum, so that backward keeps the linear's output alone, without its biased copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flashi2v_kernels.autograd import call
from flashi2v_kernels.bias_gelu_tanh.reference import require_bias
from flashi2v_kernels.chunks import row_chunks, wide_dtype


def bias_gelu_tanh(x: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    """See :func:`flashi2v_kernels.bias_gelu_tanh.reference.bias_gelu_tanh`."""
    require_bias(x, bias)
    return call(_BiasGelu, x, bias, out)


def _value(rows: Tensor, bias: Tensor | None) -> Tensor:
    # a row in fp32 promotes the sum
    return rows.to(wide_dtype(rows)) if bias is None else rows + bias.to(wide_dtype(rows))


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, bias)
        output = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        flat, flat_output = x.reshape(-1, x.shape[-1]), output.view(-1, x.shape[-1])
        for rows in row_chunks(flat):
            value = _value(flat[rows], bias)
            if value.dtype == x.dtype:
                torch.ops.aten.gelu.out(value, approximate="tanh", out=flat_output[rows])
            else:
                flat_output[rows] = F.gelu(value, approximate="tanh")
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        wide, width = wide_dtype(x), x.shape[-1]
        needs_x, needs_bias = ctx.needs_input_grad[0], bias is not None and ctx.needs_input_grad[1]
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        flat_x, flat_gradient, flat_grad_x = (t.reshape(-1, width) for t in (x, gradients[0], grad_x))
        grad_bias = torch.zeros(width, dtype=wide, device=x.device) if needs_bias else None
        for rows in row_chunks(flat_x):
            operands = (flat_gradient[rows].to(wide), _value(flat_x[rows], bias))
            if wide == x.dtype:
                part = flat_grad_x[rows]
                torch.ops.aten.gelu_backward.grad_input(*operands, approximate="tanh", grad_input=part)
            else:
                part = torch.ops.aten.gelu_backward(*operands, approximate="tanh")
                flat_grad_x[rows] = part
            if grad_bias is not None:
                grad_bias += part.sum(dim=0)
        return grad_x if needs_x else None, None if grad_bias is None else grad_bias.to(bias.dtype), None
