"""One transformer block: modulated self-attention, cross-attention to text, modulated feed-forward."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from megatron_flashi2v.models.attention import CrossAttention, SelfAttention
from megatron_flashi2v.models.norms import AffineLayerNorm
from megatron_flashi2v.models.spec import ModelSpec
from megatron_flashi2v.parallel.linear import column_parallel, row_parallel
from megatron_flashi2v.parallel.regions import mark_sequence_parallel


class FeedForward(nn.Module):
    """Linear, tanh-approximated GELU, Linear."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width, inner = spec.config.hidden_size, spec.config.ffn_hidden_size
        self.activation = spec.kernels.bias_gelu_tanh
        self.linear_fc1 = column_parallel(
            spec.column_linear, width, inner, spec.megatron, spec.groups, skip_bias_add=True
        )
        self.linear_fc2 = row_parallel(spec.row_linear, inner, width, spec.megatron, spec.groups)

    def forward(self, hidden_SBD: Tensor) -> Tensor:
        """[S, B, d] on this rank's tokens."""
        return self.linear_fc2(self.activation(*self.linear_fc1(hidden_SBD)))[0]


class TransformerBlock(nn.Module):
    """x += g1 * SA(LN(x) * (1 + a1) + b1);  x += CA(LN'(x), text);  x += g2 * FF(LN(x) * (1 + a2) + b2).

    Shifts b, scales a and gates g are the block's table plus the projected time embedding, in fp32.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.kernels = spec.kernels
        self.norm = partial(spec.kernels.ada_layer_norm, eps=spec.config.norm_eps, dtype=spec.dtype)
        self.modulation = nn.Parameter(torch.empty(6, spec.config.hidden_size))
        mark_sequence_parallel(self.modulation)
        self.self_attention = SelfAttention(spec)
        self.norm_cross = AffineLayerNorm(spec)
        self.cross_attention = CrossAttention(spec)
        self.mlp = FeedForward(spec)

    def forward(
        self, hidden_SBD: Tensor, text_TBD: Tensor, modulation_6BD: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """The residual stream after the block, same shape and dtype.

        Args:
            hidden_SBD: residual stream on this rank's tokens.
            text_TBD: embedded text rows (this rank's, under sequence parallelism).
            modulation_6BD: projected time embedding, fp32.
            rotary: cos and sin [S, D/2] for all tokens, fp32.
        """
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = (
            self.modulation.unsqueeze(1) + modulation_6BD
        ).unbind(0)
        gated = self.kernels.gate_residual
        hidden_SBD = gated(hidden_SBD, self.self_attention(self.norm(hidden_SBD, shift_sa, scale_sa), rotary), gate_sa)
        hidden_SBD = hidden_SBD + self.cross_attention(self.norm_cross(hidden_SBD), text_TBD)
        return gated(hidden_SBD, self.mlp(self.norm(hidden_SBD, shift_ff, scale_ff)), gate_ff)
