"""Recomputation: activations that backward computes again instead of keeping them. Every choice gives the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_flashi2v.models.attention import Rotary
from megatron_flashi2v.models.block import TransformerBlock
from megatron_flashi2v.models.spec import ModelSpec


@dataclass(frozen=True)
class Recompute:
    """Activations that a stage's blocks compute again in backward.

    Attributes:
        layers: whole blocks that keep only their input, counted from the stage's first.
        group: such blocks that share one kept input.
        inside: every block's mode: ``skip_attention`` keeps the block's input and self-attention's inputs and output;
            ``selective`` drops the outputs of norms, modulation and GELU.
    """

    layers: int = 0
    group: int = 1
    inside: Literal["skip_attention", "selective"] | None = None


def build_block(spec: ModelSpec, recompute: Recompute) -> TransformerBlock:
    """A block that recomputes by the mode ``recompute.inside``."""
    if recompute.inside == "skip_attention":
        return AttentionKeepingBlock(spec)
    block = TransformerBlock(spec)
    if recompute.inside == "selective":
        drop_cheap_outputs(block)
    return block


def run_blocks(blocks: Sequence[nn.Module], recompute: Recompute, hidden_SBD: Tensor, *rest: Any) -> Tensor:
    """The residual stream after a stage's blocks in order.

    Args:
        blocks: from :func:`build_block`.
        recompute: how many of the first ones keep only the input of their group; none without gradients.
        hidden_SBD: the residual stream before them.
        rest: a block's other arguments, the same for all of them.
    """
    again = recompute.layers if torch.is_grad_enabled() else 0
    for start in range(0, again, recompute.group):
        group = blocks[start : min(start + recompute.group, again)]
        hidden_SBD = recomputed(_in_order, group, hidden_SBD, *rest)
    return _in_order(blocks[again:], hidden_SBD, *rest)


def _in_order(blocks: Sequence[nn.Module], hidden_SBD: Tensor, *rest: Any) -> Tensor:
    for block in blocks:
        hidden_SBD = block(hidden_SBD, *rest)
    return hidden_SBD


def recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(*inputs)``, keeping only its inputs; there is no randomness to restore."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class AttentionKeepingBlock(TransformerBlock):
    """The block in three parts, of which backward computes the first and the last again, but not self-attention."""

    def forward(self, hidden_SBD: Tensor, text_TBD: Tensor, modulation_6BD: Tensor, rotary: Rotary) -> Tensor:
        """As :meth:`TransformerBlock.forward`."""
        if not torch.is_grad_enabled():
            return super().forward(hidden_SBD, text_TBD, modulation_6BD, rotary)
        modulation_6BD = self.modulation.unsqueeze(1) + modulation_6BD
        query, key, value = recomputed(self._before_attention, hidden_SBD, modulation_6BD, rotary)
        attended_SBhD = self.self_attention.attend(query, key, value, rotary.tokens)
        return recomputed(self._after_attention, hidden_SBD, attended_SBhD, text_TBD, modulation_6BD)

    def _before_attention(
        self, hidden_SBD: Tensor, modulation_6BD: Tensor, rotary: Rotary
    ) -> tuple[Tensor, Tensor, Tensor]:
        shift_1, scale_1, *_ = modulation_6BD.unbind()
        return self.self_attention.queries_keys_values(self.norm_self(hidden_SBD, shift_1, scale_1), rotary)

    def _after_attention(
        self, hidden_SBD: Tensor, attended_SBhD: Tensor, text_TBD: Tensor, modulation_6BD: Tensor
    ) -> Tensor:
        _, _, gate_1, shift_2, scale_2, gate_2 = modulation_6BD.unbind()
        hidden_SBD = self.add_gated(hidden_SBD, self.self_attention.project(attended_SBhD), gate_1)
        hidden_SBD = hidden_SBD + self.cross_attention(self.norm_cross(hidden_SBD), text_TBD)
        fed_SBD = self.mlp(self.norm_mlp(hidden_SBD, shift_2, scale_2))
        return self.add_gated(hidden_SBD, fed_SBD, gate_2)


def drop_cheap_outputs(block: TransformerBlock) -> None:
    """Empty the outputs of norms, modulation and GELU once the linear behind each has read them."""
    block.norm_self = DroppedOutput(block.norm_self, block.self_attention.linear_qkv)
    block.norm_cross.kernel = DroppedOutput(block.norm_cross.kernel, block.cross_attention.linear_q)
    block.norm_mlp = DroppedOutput(block.norm_mlp, block.mlp.linear_fc1)
    block.mlp.activation = DroppedOutput(block.mlp.activation, block.mlp.linear_fc2)


class DroppedOutput:
    """A cheap function whose output is emptied when its only reader is done, and computed again for its backward.

    Args:
        function: of tensors alone.
        reader: the linear that takes the output and saves it for its own backward, directly after each call.
    """

    def __init__(self, function: Callable[..., Tensor], reader: nn.Module) -> None:
        self.function = function
        self.unread: CheckpointWithoutOutput | None = None
        reader.register_forward_hook(self._read)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """``function(*inputs)``."""
        if not torch.is_grad_enabled():
            return self.function(*inputs)
        self.unread = CheckpointWithoutOutput(fp8=None)  # megatron-core takes any other value, False too, for fp8
        return self.unread.checkpoint(self.function, *inputs)

    def _read(self, reader: nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> None:
        if self.unread is not None:
            self.unread.discard_output_and_register_recompute(output[0])
            self.unread = None
