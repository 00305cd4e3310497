"""One transformer block: modulated self-attention, cross-attention to text (and image rows), modulated feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from megatron_flashi2v.models.attention import CrossAttention, Rotary, SelfAttention
from megatron_flashi2v.models.context_memory import Known
from megatron_flashi2v.models.norms import AffineLayerNorm, ResidualNorm
from megatron_flashi2v.models.spec import ModelSpec
from megatron_flashi2v.parallel.linear import column_parallel, row_parallel


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
    """x += g1 * SA(LN(x) * (1 + a1) + b1);  x += CA(LN'(x), context);  x += g2 * FF(LN(x) * (1 + a2) + b2).

    Shifts b, scales a and gates g are the block's table plus the projected time embedding, in fp32.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(6, spec.config.hidden_size))
        self.norm_self: Callable[..., Tensor] = partial(
            spec.kernels.ada_layer_norm, eps=spec.config.norm_eps, dtype=spec.dtype
        )
        self.self_attention = SelfAttention(spec)
        self.norm_cross, self.cross_attention = AffineLayerNorm(spec), CrossAttention(spec)
        self.norm_mlp: Callable[..., tuple[Tensor, Tensor]] = ResidualNorm(spec)
        self.mlp = FeedForward(spec)
        self.add_gated = spec.kernels.gate_residual

    def forward(
        self, hidden_SBD: Tensor, context_TBD: Tensor, modulation_6BD: Tensor, rotary: Rotary,
        known: Known | None = None,
    ) -> Tensor:
        """The residual stream after the block, same shape and dtype.

        Args:
            hidden_SBD: residual stream on this rank's tokens.
            context_TBD: embedded text rows, then image rows if any (this rank's, under sequence parallelism).
            modulation_6BD: projected time embedding, fp32.
            rotary: positions of the visual tokens.
            known: of the context, where it is kept.
        """
        shift_1, scale_1, *rest = (self.modulation.unsqueeze(1) + modulation_6BD).unbind()
        attended_SBD = self.self_attention(self.norm_self(hidden_SBD, shift_1, scale_1), rotary)
        return self.after_attention(hidden_SBD, attended_SBD, context_TBD, *rest, known=known)

    def after_attention(
        self, hidden_SBD: Tensor, attended_SBD: Tensor, context_TBD: Tensor, *modulation_4BD: Tensor,
        known: Known | None = None,
    ) -> Tensor:
        """The rest of the block. Each layer's update is added in the norm before the next one, the last on its own."""
        gate_1, shift_2, scale_2, gate_2 = modulation_4BD
        hidden_SBD, normed_SBD = self.norm_cross(hidden_SBD, attended_SBD, gate_1)
        crossed_SBD = self.cross_attention(normed_SBD, context_TBD, known)
        hidden_SBD, normed_SBD = self.norm_mlp(hidden_SBD, crossed_SBD, None, shift_2, scale_2)
        return self.add_gated(hidden_SBD, self.mlp(normed_SBD), gate_2)
