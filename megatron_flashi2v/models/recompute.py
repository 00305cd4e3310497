"""Recomputation: activations that backward computes again instead of keeping them. Every choice gives the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_flashi2v.models.attention import Rotary
from megatron_flashi2v.models.block import TransformerBlock
from megatron_flashi2v.models.context_memory import Known
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

    def forward(
        self, hidden_SBD: Tensor, context_TBD: Tensor, modulation_6BD: Tensor, rotary: Rotary,
        known: Known | None = None,
    ) -> Tensor:
        """As :meth:`TransformerBlock.forward`."""
        if not torch.is_grad_enabled():
            return super().forward(hidden_SBD, context_TBD, modulation_6BD, rotary, known)
        shift_1, scale_1, *rest = (self.modulation.unsqueeze(1) + modulation_6BD).unbind()
        query, key, value = recomputed(self._before_attention, hidden_SBD, shift_1, scale_1, rotary)
        attended_SBhD = self.self_attention.attend(query, key, value, rotary.tokens)
        return recomputed(self._project_and_go_on, hidden_SBD, attended_SBhD, context_TBD, *rest)

    def _before_attention(
        self, hidden_SBD: Tensor, shift_BD: Tensor, scale_BD: Tensor, rotary: Rotary
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.self_attention.queries_keys_values(
            self.norm_self(hidden_SBD, shift_BD, scale_BD), rotary
        )
        # Attention keeps its inputs. The values are a view of the fused rows, and would keep all three thirds of them.
        return query, key, value.contiguous()

    def _project_and_go_on(self, hidden_SBD: Tensor, attended_SBhD: Tensor, *rest: Tensor) -> Tensor:
        return self.after_attention(hidden_SBD, self.self_attention.project(attended_SBhD), *rest)


def drop_cheap_outputs(block: TransformerBlock) -> None:
    """Empty the outputs of norms, modulation and GELU once the linear behind each has read them."""
    block.norm_self = DroppedOutput(block.norm_self, block.self_attention.linear_qkv)
    block.norm_cross.add_and_norm = DroppedNorm(block.norm_cross.add_and_norm, block.cross_attention.linear_q)
    block.norm_mlp = DroppedNorm(block.norm_mlp, block.mlp.linear_fc1)
    block.mlp.activation = DroppedOutput(block.mlp.activation, block.mlp.linear_fc2)


class DroppedOutput:
    """A cheap function whose output is emptied when its only reader is done, and filled again before its backward.

    The function's own backward must not need its output. The memory comes back in its place, so that it is the same for
    the reader whether it kept the output or a view of it.

    Args:
        function: of tensors, which takes the memory for its output as ``out``.
        reader: the linear that takes the output and saves it for its own backward, directly after each call.
    """

    def __init__(self, function: Any, reader: nn.Module) -> None:
        self.function = function
        self.unread: tuple[Tensor, Callable[..., Any]] | None = None
        reader.register_forward_hook(self._read)

    def __call__(self, *inputs: Tensor) -> Any:
        """``function(*inputs)``."""
        output = self.function(*inputs)
        self.drop(output, self.function, *inputs)
        return output

    def drop(self, output: Tensor, again: Callable[..., Any], *inputs: Tensor | None) -> None:
        """Empty ``output`` once it is read; before backward ``again(*inputs, out=output)`` fills it."""
        if torch.is_grad_enabled():
            kept = [None if tensor is None else tensor.detach() for tensor in inputs]
            # .data, because filling it with the same numbers is no change that autograd should see
            self.unread = output.data, partial(again, *kept)

    def _read(self, reader: nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> None:
        if self.unread is None:
            return
        (dropped, again), self.unread = self.unread, None
        if not output[0].requires_grad or not any(weight.requires_grad for weight in reader.parameters()):
            return  # nothing will ask for it, and a frozen linear kept none of it
        storage = dropped.untyped_storage()
        size = storage.size()
        storage.resize_(0)

        def fill(_: Tensor) -> None:
            if storage.size() == 0:
                storage.resize_(size)
                with torch.no_grad():
                    again(out=dropped)

        output[0].register_hook(fill)


class DroppedNorm(DroppedOutput):
    """The same for a :class:`ResidualNorm`, whose sum is kept and normalised again.

    Args:
        function: the sum and norm.
        reader: the linear that takes the norm.
    """

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """``function(*inputs)``."""
        total_SBD, normed_SBD = self.function(*inputs)
        self.drop(normed_SBD, self.function.norm, total_SBD, *inputs[-2:])
        return total_SBD, normed_SBD
