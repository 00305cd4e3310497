"""Self-attention with 3-D rotary positions, and cross-attention to text, heads sharded over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from megatron_flashi2v.models.norms import FullWidthRMSNorm, norm_queries_and_keys
from megatron_flashi2v.models.spec import ModelSpec
from megatron_flashi2v.parallel.linear import column_parallel, row_parallel

# S: visual tokens (of all ranks once a column-parallel linear has gathered them), T: text rows, B: batch,
# h: heads of this rank, D: head size.


class SelfAttention(nn.Module):
    """Full attention over visual tokens. Fused rows are ordered (head, {q, k, v}, D): any TP slice is whole heads."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width = spec.config.hidden_size
        self.head_dim = spec.config.head_dim
        self.kernels = spec.kernels
        self.linear_qkv = column_parallel(spec.column_linear, width, 3 * width, spec.megatron, spec.groups)
        self.norm_q = FullWidthRMSNorm(spec)
        self.norm_k = FullWidthRMSNorm(spec)
        self.linear_proj = row_parallel(spec.row_linear, width, width, spec.megatron, spec.groups)

    def forward(self, hidden_SBD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Update of the residual stream, [S, B, d] on this rank's tokens; ``rotary`` holds cos and sin [S, D/2]."""
        qkv, _ = self.linear_qkv(hidden_SBD)
        query, key, value = qkv.unflatten(-1, (-1, 3, self.head_dim)).unbind(dim=-2)
        query, key = norm_queries_and_keys(self.norm_q, self.norm_k, query, key, rotary)
        return self.linear_proj(_attend(self.kernels.attention, query, key, value))[0]


class CrossAttention(nn.Module):
    """Attention from visual tokens to all text rows, padding rows included. Fused rows are (head, {k, v}, D)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width = spec.config.hidden_size
        self.head_dim = spec.config.head_dim
        self.kernels = spec.kernels
        self.linear_q = column_parallel(spec.column_linear, width, width, spec.megatron, spec.groups)
        self.linear_kv = column_parallel(spec.column_linear, width, 2 * width, spec.megatron, spec.groups)
        self.norm_q = FullWidthRMSNorm(spec)
        self.norm_k = FullWidthRMSNorm(spec)
        self.linear_proj = row_parallel(spec.row_linear, width, width, spec.megatron, spec.groups)

    def forward(self, hidden_SBD: Tensor, text_TBD: Tensor) -> Tensor:
        """Update of the residual stream, [S, B, d] on this rank's tokens."""
        query = self.linear_q(hidden_SBD)[0].unflatten(-1, (-1, self.head_dim))
        key, value = self.linear_kv(text_TBD)[0].unflatten(-1, (-1, 2, self.head_dim)).unbind(dim=-2)
        query, key = norm_queries_and_keys(self.norm_q, self.norm_k, query, key)
        return self.linear_proj(_attend(self.kernels.attention, query, key, value))[0]


def _attend(
    attention: Callable[..., Tensor], query_SBhD: Tensor, key_SBhD: Tensor, value_SBhD: Tensor
) -> Tensor:
    """Attention with megatron-core's token-first layout outside and the kernels' batch-first layout inside."""
    out_BShD = attention(query_SBhD.transpose(0, 1), key_SBhD.transpose(0, 1), value_SBhD.transpose(0, 1))
    return out_BShD.transpose(0, 1).flatten(-2)
