"""Ulysses: exchange some tokens of all heads for all tokens of some heads, and back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

# s: tokens of one rank, U: ranks, S = U * s, B: batch, h: heads of one rank outside the exchange, g = h / U: inside it.


class _Exchange(torch.autograd.Function):
    """Send part u of the first dimension to rank u, and receive rank u's as part u. It is its own backward."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchange(parts, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return _exchange(gradients[0], ctx.group), None


def _exchange(parts: Tensor, group: ProcessGroup) -> Tensor:
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    torch.distributed.all_to_all_single(received, parts, group=group)
    return received


def tokens_for_heads(
    query_sBhD: Tensor, key_sBhD: Tensor, value_sBhD: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's share of the heads, for the tokens of all ranks in order: three times [S, B, g, D], in one exchange.

    Args:
        query_sBhD: this rank's tokens, all heads.
        key_sBhD: the same for keys.
        value_sBhD: the same for values.
        group: ranks of consecutive blocks of tokens; their number divides the heads.
    """
    by_rank = [
        rows_sBhD.unflatten(2, (group.size(), -1)).movedim(2, 0) for rows_sBhD in (query_sBhD, key_sBhD, value_sBhD)
    ]
    # Tokens lead what each rank sends, so that the blocks that arrive are one sequence without another copy.
    received_Us3BgD = _Exchange.apply(torch.stack(by_rank, dim=2), group)
    query_SBgD, key_SBgD, value_SBgD = received_Us3BgD.flatten(0, 1).unbind(1)
    return query_SBgD, key_SBgD, value_SBgD


def heads_for_tokens(output_SBgD: Tensor, group: ProcessGroup) -> Tensor:
    """The way back: this rank's tokens with all heads, [s, B, h, D]."""
    received_UsBgD = _Exchange.apply(output_SBgD.unflatten(0, (group.size(), -1)), group)
    return received_UsBgD.movedim(0, 2).flatten(2, 3)
