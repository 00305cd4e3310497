"""npu_rms_norm, npu_rotary_mul and npu_gelu, as documented."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_npu.refusals import require, require_floats


def rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The norm over gamma's dimensions, and the reciprocal root, fp32 with those dimensions of size 1."""
    require_floats("npu_rms_norm", input, gamma)
    require("npu_rms_norm", gamma.dtype in (input.dtype, torch.float32), "gamma has not the input's dtype, nor float32")
    tail = input.shape[input.ndim - gamma.ndim :]
    require("npu_rms_norm", tuple(gamma.shape) == tuple(tail), f"gamma {tuple(gamma.shape)} is not the input's tail")
    dims = tuple(range(-gamma.ndim, 0))
    rstd = torch.rsqrt(input.float().square().mean(dim=dims, keepdim=True) + epsilon)
    return (input.float() * rstd * gamma.float()).to(input.dtype), rstd


def rms_norm_backward(dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of gamma (fp32)."""
    require_floats("npu_rms_norm_backward", dy, input, gamma)
    dims = tuple(range(-gamma.ndim, 0))
    normalised, weighted = input.float() * rstd, dy.float() * gamma.float()
    projection = (weighted * normalised).mean(dim=dims, keepdim=True)
    grad_gamma = (dy.float() * normalised).reshape(-1, *gamma.shape).sum(dim=0)
    return (rstd * (weighted - normalised * projection)).to(input.dtype), grad_gamma


def remember_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what the gradient takes."""
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])


def differentiate_rms_norm(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, None]:
    """Gradients of input and gamma, none of epsilon."""
    input, gamma, rstd = ctx.saved_tensors
    grad_input, grad_gamma = torch.ops.npu.npu_rms_norm_backward(grad, input, gamma, rstd)
    return grad_input, grad_gamma.to(gamma.dtype), None


def _rotated(x: Tensor, mode: str) -> Tensor:
    if mode == "interleave":
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _check_rotary(name: str, x: Tensor, r1: Tensor, r2: Tensor, mode: str) -> None:
    require(name, mode in ("half", "interleave"), f"rotary_mode {mode!r} is neither half nor interleave")
    require_floats(name, x, r1, r2)
    require(name, x.dtype == r1.dtype == r2.dtype, "the tables have not the input's dtype")
    require(name, x.ndim == r1.ndim == r2.ndim == 4 and r1.shape == r2.shape, "the tensors are not four-dimensional")
    require(name, x.shape[-1] == r1.shape[-1] < 896 and x.shape[-1] % 2 == 0, "the head size is odd, or not below 896")
    # SBND with S11D, BSND with 1S1D, BNSD with 11SD; the other forms that the half mode takes are not needed
    places = [i for i in range(3) if r1.shape[i] != 1]
    require(name, len(places) <= 1 and all(r1.shape[i] == x.shape[i] for i in places), "the tables do not broadcast")
    if mode == "interleave" and places:
        others = [x.shape[i] for i in range(3) if i != places[0]]
        require(name, others[0] * others[1] < 1000, "interleave needs B * N < 1000")


def rotary_mul(x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None) -> Tensor:
    """``r1 * x + r2 * rotated(x)``."""
    _check_rotary("npu_rotary_mul", x, r1, r2, rotary_mode)
    require("npu_rotary_mul", rotate is None, "rotate is not emulated")
    return (r1.float() * x.float() + r2.float() * _rotated(x.float(), rotary_mode)).to(x.dtype)


def rotary_mul_backward(
    grad: Tensor, x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input and the tables."""
    _check_rotary("npu_rotary_mul_backward", x, r1, r2, rotary_mode)
    with torch.enable_grad():
        wide = [tensor.detach().float().requires_grad_() for tensor in (x, r1, r2)]
        output = wide[1] * wide[0] + wide[2] * _rotated(wide[0], rotary_mode)
    grads = torch.autograd.grad(output, wide, grad.float())
    return grads[0].to(x.dtype), grads[1].to(x.dtype), grads[2].to(x.dtype)


def remember_rotary(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what the gradient takes: the input as well, as the operator does."""
    ctx.save_for_backward(*inputs[:3])
    ctx.mode = inputs[3]


def differentiate_rotary(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gradients of input and tables, none of mode and rotate."""
    return *torch.ops.npu.npu_rotary_mul_backward(grad, *ctx.saved_tensors, ctx.mode), None, None


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """GELU."""
    require_floats("npu_gelu", input)
    require("npu_gelu", approximate in ("none", "tanh"), "approximate argument must be either none or tanh")
    return F.gelu(input, approximate=approximate)


def remember_gelu(
    ctx: Any, inputs: tuple[Any, ...], output: Tensor, keyword_only_inputs: dict[str, Any] | None = None
) -> None:
    """Keep what the gradient takes."""
    ctx.save_for_backward(inputs[0])
    ctx.approximate = (keyword_only_inputs or {}).get("approximate", "none")


def differentiate_gelu(ctx: Any, grad: Tensor) -> Tensor:
    """Gradient of the input."""
    return torch.ops.aten.gelu_backward(grad, ctx.saved_tensors[0], approximate=ctx.approximate)
