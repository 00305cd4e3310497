"""Norms and the elementwise steps around them, computed in fp32 and cast once."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashi2v_kernels.rms_norm.statistics import local_sum_of_squares
from megatron_flashi2v.models.spec import ModelSpec
from megatron_flashi2v.parallel.regions import mark_sequence_parallel, sum_both_ways


def modulated_layer_norm(hidden_SBD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> Tensor:
    """LN(x) * (1 + scale) + shift, in fp32."""
    normed = F.layer_norm(hidden_SBD.float(), hidden_SBD.shape[-1:], eps=eps)
    return normed * (1.0 + scale_BD) + shift_BD


def gated_residual(hidden_SBD: Tensor, update_SBD: Tensor, gate_BD: Tensor) -> Tensor:
    """x + gate * update, in fp32, cast back to the residual stream's dtype."""
    # The fp32 gate promotes the product; the 16-bit update itself is what backward keeps.
    return (hidden_SBD + update_SBD * gate_BD).to(hidden_SBD.dtype)


class AffineLayerNorm(nn.Module):
    """LayerNorm with weight and bias in fp32, on this rank's tokens."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.eps = spec.config.norm_eps
        self.weight = nn.Parameter(torch.empty(spec.config.hidden_size))
        self.bias = nn.Parameter(torch.empty(spec.config.hidden_size))
        mark_sequence_parallel(self)

    def forward(self, hidden_SBD: Tensor) -> Tensor:
        """fp32 rows of the same shape."""
        return F.layer_norm(hidden_SBD.float(), self.weight.shape, self.weight, self.bias, self.eps)


class FullWidthRMSNorm(nn.Module):
    """RMSNorm of queries or keys over the whole hidden width, although each rank holds only its heads.

    The mean square is summed over the tensor-parallel group and divided by the full width; the weight is this rank's
    slice of it.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.group = spec.groups.tp
        self.full_width = spec.config.hidden_size
        self.eps = spec.config.norm_eps
        self.kernel = spec.kernels.rms_norm
        self.weight = nn.Parameter(torch.empty(self.full_width // self.group.size()))
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim = 0  # type: ignore[attr-defined]
        self.weight.partition_stride = 1  # type: ignore[attr-defined]

    def forward(self, heads_SBhD: Tensor, squares_SB: Tensor | None = None) -> Tensor:
        """Normalised heads, same shape and dtype.

        Args:
            heads_SBhD: this rank's heads.
            squares_SB: sums of squares over the heads of all ranks, fp32; None where this rank holds all heads.
        """
        if squares_SB is None:
            return self.kernel(heads_SBhD, self.weight, self.eps)
        return self.kernel(heads_SBhD, self.weight, self.eps, sum_of_squares=squares_SB, full_width=self.full_width)


def norm_queries_and_keys(
    norm_q: FullWidthRMSNorm, norm_k: FullWidthRMSNorm, query_SBhD: Tensor, key_TBhD: Tensor
) -> tuple[Tensor, Tensor]:
    """Normalise both with one sum over the tensor-parallel group, in forward and in backward."""
    if norm_q.group.size() == 1:
        return norm_q(query_SBhD), norm_k(key_TBhD)
    local = [local_sum_of_squares(query_SBhD, 2), local_sum_of_squares(key_TBhD, 2)]
    squares_q, squares_k = sum_both_ways(torch.cat(local), norm_q.group).split([len(part) for part in local])
    return norm_q(query_SBhD, squares_q), norm_k(key_TBhD, squares_k)
