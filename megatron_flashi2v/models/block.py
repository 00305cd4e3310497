"""One transformer block: modulated self-attention, cross-attention to text, modulated feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_flashi2v.models.attention import CrossAttention, Rotary, SelfAttention
from megatron_flashi2v.models.norms import AffineLayerNorm
from megatron_flashi2v.models.recompute import Recompute, dropping_output, keeping_output, recomputed
from megatron_flashi2v.models.spec import ModelSpec
from megatron_flashi2v.parallel.linear import column_parallel, row_parallel
from megatron_flashi2v.parallel.regions import mark_sequence_parallel


class FeedForward(nn.Module):
    """Linear, tanh-approximated GELU, Linear."""

    def __init__(self, spec: ModelSpec, recompute: Recompute) -> None:
        super().__init__()
        width, inner = spec.config.hidden_size, spec.config.ffn_hidden_size
        self.activation = spec.kernels.bias_gelu_tanh
        self.linear_fc1 = column_parallel(
            spec.column_linear, width, inner, spec.megatron, spec.groups, skip_bias_add=True
        )
        self.linear_fc2 = row_parallel(spec.row_linear, inner, width, spec.megatron, spec.groups)
        self.feed = dropping_output if recompute.inside == "selective" else keeping_output

    def forward(self, hidden_SBD: Tensor) -> Tensor:
        """[S, B, d] on this rank's tokens."""
        return self.feed(self.activation, lambda inner: self.linear_fc2(inner)[0], *self.linear_fc1(hidden_SBD))


class TransformerBlock(nn.Module):
    """x += g1 * SA(LN(x) * (1 + a1) + b1);  x += CA(LN'(x), text);  x += g2 * FF(LN(x) * (1 + a2) + b2).

    Shifts b, scales a and gates g are the block's table plus the projected time embedding, in fp32. What lies before
    and after the self-attention proper are methods of their own, so that either can be computed again in backward.
    """

    def __init__(self, spec: ModelSpec, recompute: Recompute) -> None:
        super().__init__()
        self.kernels = spec.kernels
        self.norm = partial(spec.kernels.ada_layer_norm, eps=spec.config.norm_eps, dtype=spec.dtype)
        self.recompute = recompute
        self.feed = dropping_output if recompute.inside == "selective" else keeping_output
        self.modulation = nn.Parameter(torch.empty(6, spec.config.hidden_size))
        mark_sequence_parallel(self.modulation)
        self.self_attention = SelfAttention(spec)
        self.norm_cross = AffineLayerNorm(spec)
        self.cross_attention = CrossAttention(spec)
        self.mlp = FeedForward(spec, recompute)

    def forward(self, hidden_SBD: Tensor, text_TBD: Tensor, modulation_6BD: Tensor, rotary: Rotary) -> Tensor:
        """The residual stream after the block, same shape and dtype.

        Args:
            hidden_SBD: residual stream on this rank's tokens.
            text_TBD: embedded text rows (this rank's, under sequence parallelism).
            modulation_6BD: projected time embedding, fp32.
            rotary: where the visual tokens stand.
        """
        run = recomputed if self.recompute.inside == "skip_attention" and torch.is_grad_enabled() else _plainly
        modulation_6BD = self.modulation.unsqueeze(1) + modulation_6BD
        query, key, value = run(self.before_attention, hidden_SBD, modulation_6BD, rotary)
        attended_SBhD = self.self_attention.attend(query, key, value, rotary.tokens)
        return run(self.after_attention, hidden_SBD, attended_SBhD, text_TBD, modulation_6BD)

    def before_attention(
        self, hidden_SBD: Tensor, modulation_6BD: Tensor, rotary: Rotary
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the modulated norm of the residual stream."""
        shift, scale = modulation_6BD[0], modulation_6BD[1]
        return self.feed(
            self.norm, lambda normed: self.self_attention.queries_keys_values(normed, rotary),
            hidden_SBD, shift, scale,
        )

    def after_attention(
        self, hidden_SBD: Tensor, attended_SBhD: Tensor, text_TBD: Tensor, modulation_6BD: Tensor
    ) -> Tensor:
        """Self-attention's gated update, cross-attention and the feed-forward layer."""
        gate_sa, shift, scale, gate_ff = modulation_6BD[2:].unbind(0)
        gated = self.kernels.gate_residual
        hidden_SBD = gated(hidden_SBD, self.self_attention.project(attended_SBhD), gate_sa)
        hidden_SBD = hidden_SBD + self.feed(
            self.norm_cross, lambda normed: self.cross_attention(normed, text_TBD), hidden_SBD
        )
        return gated(hidden_SBD, self.feed(self.norm, self.mlp, hidden_SBD, shift, scale), gate_ff)


def _plainly(function: Callable[..., Any], *inputs: Any) -> Any:
    return function(*inputs)
