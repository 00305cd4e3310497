"""Ascend's fused norm, ``torch_npu.npu_rms_norm``, where one rank holds the whole width."""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor

from flashi2v_kernels.rms_norm.statistics import weight_like_tail


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, sum_of_squares: Tensor | None = None, full_width: int | None = None
) -> Tensor:
    """See :func:`flashi2v_kernels.rms_norm.reference.rms_norm`.

    Raises:
        ValueError: the weight does not fit, or sums over ranks are given: the operator computes its own.
    """
    if sum_of_squares is not None or full_width is not None:
        raise ValueError("npu_rms_norm takes no sum_of_squares; resolve rms_norm with the feature partial_sums")
    gamma = weight_like_tail(x, weight)
    if gamma.dtype != x.dtype:  # the operator takes the input's dtype or fp32
        gamma = gamma.to(torch.float32)
    return torch_npu.npu_rms_norm(x, gamma, eps)[0]
