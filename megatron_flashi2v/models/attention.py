"""Self-attention with 3-D rotary positions, and cross-attention to text, heads sharded over tensor-parallel ranks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from megatron_flashi2v.models.fused_gradient import unbind
from megatron_flashi2v.models.norms import FullWidthRMSNorm, norm_heads, norm_queries_and_keys
from megatron_flashi2v.models.spec import ModelSpec
from megatron_flashi2v.models.text_memory import Known
from megatron_flashi2v.parallel.context import ContextAttention
from megatron_flashi2v.parallel.linear import column_parallel, row_parallel

# S: visual tokens of this context-parallel rank (of this rank alone under sequence parallelism, before a
# column-parallel linear has gathered them), T: text rows, B: batch, h: heads of this rank, D: head size.


class Rotary(NamedTuple):
    """Rotary positions of a context-parallel rank's visual tokens.

    Attributes:
        cos_SR: cosines of the rotation of this rank's tokens, [S, D/2] fp32.
        sin_SR: sines.
        tokens: real tokens of the whole sample, over all ranks; the rest of S is padding.
    """

    cos_SR: Tensor
    sin_SR: Tensor
    tokens: int


class SelfAttention(nn.Module):
    """Full attention over visual tokens. Fused rows are ordered (head, {q, k, v}, D): any TP slice is whole heads."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width = spec.config.hidden_size
        self.head_dim = spec.config.head_dim
        self.attend = ContextAttention(
            spec.kernels.attention, spec.kernels.attention_backward, ulysses=spec.groups.ulysses, ring=spec.groups.ring
        )
        self.linear_qkv = column_parallel(spec.column_linear, width, 3 * width, spec.megatron, spec.groups)
        self.norm_q = FullWidthRMSNorm(spec)
        self.norm_k = FullWidthRMSNorm(spec)
        self.linear_proj = row_parallel(spec.row_linear, width, width, spec.megatron, spec.groups)

    def forward(self, hidden_SBD: Tensor, rotary: Rotary) -> Tensor:
        """Update of the residual stream, [S, B, d] on this rank's tokens."""
        query, key, value = self.queries_keys_values(hidden_SBD, rotary)
        return self.project(self.attend(query, key, value, rotary.tokens))

    def queries_keys_values(self, hidden_SBD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised and rotated queries and keys, and values, each [S, B, h, D]."""
        qkv, _ = self.linear_qkv(hidden_SBD)
        (query, key, value), places = unbind(qkv.unflatten(-1, (-1, 3, self.head_dim)), dim=-2)
        tables = rotary.cos_SR, rotary.sin_SR
        query, key = norm_queries_and_keys(self.norm_q, self.norm_k, query, key, tables, places)
        return query, key, value

    def project(self, attended_SBhD: Tensor) -> Tensor:
        """Update of the residual stream from the heads' outputs, [S, B, d] on this rank's tokens."""
        return self.linear_proj(attended_SBhD.flatten(-2))[0]


class CrossAttention(nn.Module):
    """Attention from visual tokens to all text rows, padding rows included. Fused rows are (head, {k, v}, D)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width = spec.config.hidden_size
        self.head_dim = spec.config.head_dim
        self.attention = spec.kernels.attention
        self.linear_q = column_parallel(spec.column_linear, width, width, spec.megatron, spec.groups)
        self.linear_kv = column_parallel(spec.column_linear, width, 2 * width, spec.megatron, spec.groups)
        self.norm_q = FullWidthRMSNorm(spec)
        self.norm_k = FullWidthRMSNorm(spec)
        self.linear_proj = row_parallel(spec.row_linear, width, width, spec.megatron, spec.groups)

    def forward(self, hidden_SBD: Tensor, text_TBD: Tensor, known: Known | None = None) -> Tensor:
        """Update of the residual stream, [S, B, d] on this rank's tokens; ``known`` of the text where it is kept."""
        query = self.linear_q(hidden_SBD)[0].unflatten(-1, (-1, self.head_dim))
        if known is None or self not in known:
            key, value = self.linear_kv(text_TBD)[0].unflatten(-1, (-1, 2, self.head_dim)).unbind(dim=-2)
            query, key = norm_queries_and_keys(self.norm_q, self.norm_k, query, key)
            if known is not None:
                known[self] = key, value.contiguous()  # a view would keep the fused rows
        else:
            (key, value), query = known[self], norm_heads(self.norm_q, query)
        # Kernels are batch first, megatron-core's layers token first.
        out_BShD = self.attention(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1))
        return self.linear_proj(out_BShD.transpose(0, 1).flatten(-2))[0]
