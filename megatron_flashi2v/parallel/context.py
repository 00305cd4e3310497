"""Self-attention over tokens that lie on several context-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed
from torch import Tensor

from megatron_flashi2v.parallel.padding import zero_pad
from megatron_flashi2v.parallel.ulysses import heads_for_tokens, tokens_for_heads

# S: tokens of this context-parallel rank with its padding, B: batch, h: heads of this rank, D: head size.


class ContextAttention:
    """softmax(q k^T / sqrt(D)) v over the real tokens of all ranks.

    Each rank holds one block of the sequence, all blocks of the same length; full attention costs every block the
    same, so blocks in order are balanced. The padding is at the sequence's end. It is cut off rather than masked:
    flash kernels take no mask.

    Args:
        attention: the kernel, batch first.
        ulysses: ranks of neighbouring blocks that trade tokens for heads, or None.
    """

    def __init__(
        self, attention: Callable[..., Any], *, ulysses: torch.distributed.ProcessGroup | None = None
    ) -> None:
        self.attention, self.ulysses = attention, ulysses

    def __call__(self, query_SBhD: Tensor, key_SBhD: Tensor, value_SBhD: Tensor, tokens: int) -> Tensor:
        """What this rank's tokens attend to, [S, B, h, D]; zeros for padding.

        Args:
            query_SBhD: queries of this rank's tokens.
            key_SBhD: their keys.
            value_SBhD: their values.
            tokens: real tokens on all ranks.
        """
        if self.ulysses is None:
            return self._attend(query_SBhD, key_SBhD, value_SBhD, tokens)
        own_heads = tokens_for_heads(query_SBhD, key_SBhD, value_SBhD, self.ulysses)
        return heads_for_tokens(self._attend(*own_heads, tokens), self.ulysses)

    def _attend(self, query_SBhD: Tensor, key_SBhD: Tensor, value_SBhD: Tensor, tokens: int) -> Tensor:
        rows = len(query_SBhD)
        real = (part_SBhD[:tokens].transpose(0, 1) for part_SBhD in (query_SBhD, key_SBhD, value_SBhD))
        return zero_pad(self.attention(*real).transpose(0, 1), rows)
