"""The reference, compiled by torch."""

from __future__ import annotations

from torch import Tensor

from flashi2v_kernels.bias_gelu_tanh import reference
from flashi2v_kernels.compiled import compiled


def bias_gelu_tanh(x: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    """See :func:`flashi2v_kernels.bias_gelu_tanh.reference.bias_gelu_tanh`."""
    reference.require_bias(x, bias)  # torch would wrap an error that is raised inside
    return compiled(reference.bias_gelu_tanh)(x, bias, out=out)
