"""Self-attention over tokens that lie on several context-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_flashi2v.parallel.padding import without_padding, zero_pad
from megatron_flashi2v.parallel.ring import Ring, ring_attention
from megatron_flashi2v.parallel.ulysses import heads_for_tokens, tokens_for_heads

# S: tokens of this context-parallel rank with its padding, B: batch, h: heads of this rank, D: head size.


class ContextAttention:
    """softmax(q k^T / sqrt(D)) v over the real tokens of all ranks.

    Each rank holds one block of the sequence, all blocks of the same length; full attention costs every block the
    same, so blocks in order are balanced. The padding is at the sequence's end. It is cut off rather than masked:
    flash kernels take no mask.

    Args:
        attention: the kernel, batch first.
        attention_backward: its backward for one block of the keys; a ring needs it.
        ulysses: ranks of neighbouring blocks that trade tokens for heads, or None.
        ring: ranks that pass keys and values around, the n-th of each Ulysses group, or None.
    """

    def __init__(
        self,
        attention: Callable[..., Any],
        attention_backward: Callable[..., Any] | None = None,
        *,
        ulysses: ProcessGroup | None = None,
        ring: ProcessGroup | None = None,
    ) -> None:
        self.attention, self.attention_backward = attention, attention_backward
        self.ulysses, self.ring = ulysses, ring

    def __call__(self, query_SBhD: Tensor, key_SBhD: Tensor, value_SBhD: Tensor, tokens: int) -> Tensor:
        """Attention output of this rank's tokens, [S, B, h, D]; zeros for padding.

        Args:
            query_SBhD: queries of this rank's tokens.
            key_SBhD: their keys.
            value_SBhD: their values.
            tokens: real tokens on all ranks.
        """
        if self.ulysses is None:
            return self._over_ring(query_SBhD, key_SBhD, value_SBhD, tokens)
        own_heads = tokens_for_heads(query_SBhD, key_SBhD, value_SBhD, self.ulysses)
        return heads_for_tokens(self._over_ring(*own_heads, tokens), self.ulysses)

    def _over_ring(self, query_SBhD: Tensor, key_SBhD: Tensor, value_SBhD: Tensor, tokens: int) -> Tensor:
        if self.ring is not None:
            assert self.attention_backward is not None, "ring attention needs the kernel's own backward"
            ring = Ring(self.attention, self.attention_backward, self.ring, tokens)
            return ring_attention(query_SBhD, key_SBhD, value_SBhD, ring)
        parts = (query_SBhD, key_SBhD, value_SBhD)
        real = (without_padding(part_SBhD, tokens).transpose(0, 1) for part_SBhD in parts)
        return zero_pad(self.attention(*real).transpose(0, 1), len(query_SBhD))
