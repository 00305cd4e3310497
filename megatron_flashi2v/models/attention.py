"""Self-attention with 3-D rotary positions, and cross-attention to text and image rows.

Heads are sharded over tensor-parallel ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from megatron_flashi2v.models.context_memory import Known
from megatron_flashi2v.models.fused_gradient import unbind
from megatron_flashi2v.models.norms import FullWidthRMSNorm, norm_heads
from megatron_flashi2v.models.spec import ModelSpec
from megatron_flashi2v.parallel.context import ContextAttention
from megatron_flashi2v.parallel.linear import column_parallel, row_parallel

# S: visual tokens of this context-parallel rank (of this rank alone under sequence parallelism, before a
# column-parallel linear has gathered them), T: text rows, R: image rows, B: batch, h: heads of this rank, D: head size.


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
        tables = (rotary.cos_SR, rotary.sin_SR)
        query, key = norm_heads((self.norm_q, query), (self.norm_k, key), rotary=tables, places=places[:2])
        return query, key, value

    def project(self, attended_SBhD: Tensor) -> Tensor:
        """Update of the residual stream from the heads' outputs, [S, B, d] on this rank's tokens."""
        return self.linear_proj(attended_SBhD.flatten(-2))[0]


class CrossAttention(nn.Module):
    """Attention from visual tokens to all text rows, padding rows included. Fused rows are (head, {k, v}, D).

    Where the paradigm has an image encoder's rows, the same queries attend to these by keys and values of their own,
    and both outputs are added (Wan2.1's image-to-video models).
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width = spec.config.hidden_size
        self.head_dim = spec.config.head_dim
        self.attention = spec.kernels.attention
        self.image_rows, self.context_rows = spec.image_rows, spec.context_rows
        self.linear_q = column_parallel(spec.column_linear, width, width, spec.megatron, spec.groups)
        self.linear_kv = column_parallel(spec.column_linear, width, 2 * width, spec.megatron, spec.groups)
        self.norm_q = FullWidthRMSNorm(spec)
        self.norm_k = FullWidthRMSNorm(spec)
        if self.image_rows:
            self.linear_kv_image = column_parallel(spec.column_linear, width, 2 * width, spec.megatron, spec.groups)
            self.norm_k_image = FullWidthRMSNorm(spec)
        self.linear_proj = row_parallel(spec.row_linear, width, width, spec.megatron, spec.groups)

    def forward(self, hidden_SBD: Tensor, context_TBD: Tensor, known: Known | None = None) -> Tensor:
        """Update of the residual stream, [S, B, d] on this rank's tokens.

        Args:
            hidden_SBD: normalised residual stream.
            context_TBD: this rank's text rows, then its rows of the image.
            known: of the context, where it is kept.
        """
        query = self.linear_q(hidden_SBD)[0].unflatten(-1, (-1, self.head_dim))
        if known is None or self not in known:
            query, *memories = self._query_and_memories(query, context_TBD)
            if known is not None:
                known[self] = [(key, value.contiguous()) for key, value in memories]  # a view would keep fused rows
        else:
            (query,), memories = norm_heads((self.norm_q, query)), known[self]
        attended = [self._attend(query, key, value) for key, value in memories]
        out_BShD = attended[0] if len(attended) == 1 else attended[0] + attended[1]
        return self.linear_proj(out_BShD.transpose(0, 1).flatten(-2))[0]

    def _query_and_memories(self, query: Tensor, context_TBD: Tensor) -> tuple[Any, ...]:
        """The normalised query, and (key, value) of the text, then of the image if there are rows of it."""
        if not self.image_rows:
            key, value = self._keys_values(self.linear_kv, context_TBD)
            query, key = norm_heads((self.norm_q, query), (self.norm_k, key))
            return query, (key, value)
        text_TBD, image_RBD = context_TBD.split(self.context_rows)
        key, value = self._keys_values(self.linear_kv, text_TBD)
        # Padding of the image's rows is at their end; it is cut off once all ranks' rows are together.
        key_image, value_image = (
            rows[: self.image_rows] for rows in self._keys_values(self.linear_kv_image, image_RBD)
        )
        query, key, key_image = norm_heads(
            (self.norm_q, query), (self.norm_k, key), (self.norm_k_image, key_image)
        )
        return query, (key, value), (key_image, value_image)

    def _keys_values(self, linear: nn.Module, rows_TBD: Tensor) -> tuple[Tensor, ...]:
        """Keys before their norm, and values, each [T, B, h, D] of all ranks' rows."""
        return linear(rows_TBD)[0].unflatten(-1, (-1, 2, self.head_dim)).unbind(dim=-2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The heads' outputs [B, S, h, D]: kernels are batch first, megatron-core's layers token first."""
        return self.attention(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1))
