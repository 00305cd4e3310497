"""Ring attention: queries stay, keys and values travel around, and each block's result is merged into the whole.

With (o, l) the output and log-sum-exp over some keys and (o', l') over others, those over all are
L = log(e^l + e^l') and O = e^(l - L) o + e^(l' - L) o' (the online softmax). The backward of a block needs the output
and log-sum-exp over all keys; the gradients of keys and values travel behind their block, and one step further than it,
home.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import P2POp, ProcessGroup

# S: rows of one rank's block with its padding, Q: real rows of this rank's queries, B: batch, h: heads, D: head size.


@dataclass(frozen=True)
class Ring:
    """A ring's kernel, ranks and length.

    Attributes:
        attention: the kernel, batch first, which returns the log-sum-exp if asked.
        attention_backward: its backward for one block of the keys.
        group: ranks of consecutive blocks of one length.
        tokens: real tokens on all ranks; the rest is padding.
    """

    attention: Callable[..., Any]
    attention_backward: Callable[..., Any]
    group: ProcessGroup
    tokens: int

    def real_rows(self, owner: int, rows: int) -> int:
        """Rows of rank ``owner``'s block, ``rows`` long, that are not padding."""
        return max(0, min(self.tokens - owner * rows, rows))


def ring_attention(query_SBhD: Tensor, key_SBhD: Tensor, value_SBhD: Tensor, ring: Ring) -> Tensor:
    """This rank's queries over the keys of all ranks, [S, B, h, D]; zeros for padding."""
    return _RingAttention.apply(query_SBhD, key_SBhD, value_SBhD, ring)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_SBhD: Tensor, key_SBhD: Tensor, value_SBhD: Tensor, ring: Ring) -> Tensor:
        rows = len(query_SBhD)
        own_rows = ring.real_rows(ring.group.rank(), rows)
        # Kept for backward: a view would keep alive the whole buffer in which Ulysses' exchange delivered them.
        query_SBhD, own_2SBhD = query_SBhD.contiguous(), torch.stack([key_SBhD, value_SBhD])
        query_BQhD = query_SBhD[:own_rows].transpose(0, 1)
        merged = None
        for owner, block_2SBhD in _travelling(own_2SBhD, ring.group):
            keys = ring.real_rows(owner, rows)
            if own_rows and keys:
                key_BKhD, value_BKhD = block_2SBhD[:, :keys].transpose(1, 2)
                part = ring.attention(query_BQhD, key_BKhD, value_BKhD, return_log_sum_exp=True)
                merged = _merge(merged, *part)
        output_SBhD, log_sum_exp_BhQ = torch.zeros_like(query_SBhD), query_SBhD.new_empty(0)
        if merged is not None:
            output_SBhD[:own_rows] = merged[0].transpose(0, 1)
            log_sum_exp_BhQ = merged[1]
        ctx.save_for_backward(query_SBhD, own_2SBhD, output_SBhD, log_sum_exp_BhQ)
        ctx.ring = ring
        return output_SBhD

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        query_SBhD, own_2SBhD, output_SBhD, log_sum_exp_BhQ = ctx.saved_tensors
        ring, rows = ctx.ring, len(query_SBhD)
        own_rows = ring.real_rows(ring.group.rank(), rows)
        grad_output_BQhD, query_BQhD, output_BQhD = (
            rows_SBhD[:own_rows].transpose(0, 1) for rows_SBhD in (gradients[0], query_SBhD, output_SBhD)
        )
        dtype = torch.promote_types(query_SBhD.dtype, torch.float32)  # of sums over blocks, whatever the kernel returns
        grad_query_SBhD = torch.zeros_like(query_SBhD, dtype=dtype)
        arriving = None
        for owner, block_2SBhD in _travelling(own_2SBhD, ring.group):
            keys = ring.real_rows(owner, rows)
            parts = None
            if own_rows and keys:
                key_BKhD, value_BKhD = block_2SBhD[:, :keys].transpose(1, 2)
                parts = ring.attention_backward(
                    grad_output_BQhD, query_BQhD, key_BKhD, value_BKhD, output_BQhD, log_sum_exp_BhQ
                )
            # The previous ranks' gradients of this block arrived while this rank computed its own part.
            grad_2SBhD = torch.zeros_like(own_2SBhD, dtype=dtype) if arriving is None else arriving.wait()
            if parts is not None:
                grad_query_SBhD[:own_rows] += parts[0].transpose(0, 1)
                grad_2SBhD[0, :keys] += parts[1].transpose(0, 1)
                grad_2SBhD[1, :keys] += parts[2].transpose(0, 1)
            arriving = _Transfer(grad_2SBhD, ring.group)
        assert arriving is not None
        grad_key_SBhD, grad_value_SBhD = arriving.wait().to(query_SBhD.dtype)
        return grad_query_SBhD.to(query_SBhD.dtype), grad_key_SBhD, grad_value_SBhD, None


def _merge(merged: tuple[Tensor, Tensor] | None, output_BQhD: Tensor, log_sum_exp_BhQ: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the keys so far and a block's, in the log-sum-exp's dtype."""
    if merged is None:
        return output_BQhD.to(log_sum_exp_BhQ.dtype), log_sum_exp_BhQ
    total_BhQ = torch.logaddexp(merged[1], log_sum_exp_BhQ)
    share, share_of_block = (
        torch.exp(part_BhQ - total_BhQ).transpose(1, 2).unsqueeze(-1) for part_BhQ in (merged[1], log_sum_exp_BhQ)
    )
    return merged[0].mul_(share).add_(output_BQhD * share_of_block), total_BhQ


def _travelling(block: Tensor, group: ProcessGroup) -> Iterator[tuple[int, Tensor]]:
    """(owner, block) of every rank, this rank's first; the next block is on its way while the caller computes."""
    size, rank = group.size(), group.rank()
    for step in range(size):
        arriving = _Transfer(block, group) if step + 1 < size else None
        yield (rank - step) % size, block
        if arriving is not None:
            block = arriving.wait()


class _Transfer:
    """An exchange under way: a tensor to the next rank of a ring, and one from the previous rank."""

    def __init__(self, sent: Tensor, group: ProcessGroup) -> None:
        size, rank = group.size(), group.rank()
        self.sent = sent  # must outlive the transfer
        self.received = torch.empty_like(sent)
        self.works = torch.distributed.batch_isend_irecv([
            P2POp(torch.distributed.isend, self.sent, group=group, group_peer=(rank + 1) % size),
            P2POp(torch.distributed.irecv, self.received, group=group, group_peer=(rank - 1) % size),
        ])

    def wait(self) -> Tensor:
        """Wait for the previous rank's tensor."""
        for work in self.works:
            work.wait()
        return self.received
