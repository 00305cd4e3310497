"""Gradient rules where tensors that every tensor-parallel rank holds meet sharded ones.

The rules, in one place:

* :func:`shard_tokens` shards tokens. Over tensor-parallel ranks backward gathers, so the layers before it (the latent
  shift phi) get the whole gradient on each rank. Over context-parallel ranks it is a plain slice: each rank has the
  gradient of its own block for everything, weights, text and conditioning rows included. The reduction over data x
  context parallel ranks adds them up; the schedule multiplies the loss by CP to match its mean.
* Parameters that act on local tokens only (patch embedding, modulation tables, the affine norm, biases of row-parallel
  linears, the head) are declared so in ``models/placement.py``, and marked ``sequence_parallel = True`` there:
  megatron-core sums their gradients over the group.
* Rows that every rank holds and that act on local tokens (time embedding and modulation) go through
  :func:`sum_in_backward` once, on the first stage.
* The mean square of a full-width norm over sharded heads is summed in both directions by
  :func:`sum_both_ways`.

megatron-core has similar operators, but theirs all-reduce in place. Autograd may pass the same gradient tensor to two
branches, so ours never write into their inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.padding import zero_pad


class _SumInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


class _SumBothWays(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


def sum_both_ways(tensor: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Sum over the group, in forward and in backward: each rank's partial sum reaches every rank's output."""
    return tensor if group.size() == 1 else _SumBothWays.apply(tensor, group)


def sum_in_backward(tensor: Tensor, groups: Groups) -> Tensor:
    """Identity forward; under sequence parallelism the gradient is summed over the tensor-parallel group.

    Without sequence parallelism every rank sees all tokens, and the gradient is whole already.
    """
    return _SumInBackward.apply(tensor, groups.tp) if groups.sequence_parallel else tensor


def rows_per_rank(tokens: int, groups: Groups) -> int:
    """Rows that each rank holds of a sample's visual tokens: the sequence is padded to a multiple of the ranks."""
    return -(-tokens // groups.token_parts)


def own_tokens(tokens: int, groups: Groups) -> range:
    """Indices of the real tokens among this rank's rows; fewer than its rows, or none, where the padding lies."""
    rows = rows_per_rank(tokens, groups)
    index = groups.cp.rank() * groups.token_shards + (groups.tp.rank() if groups.sequence_parallel else 0)
    return range(min(index * rows, tokens), min((index + 1) * rows, tokens))


def context_block(rows_SX: Tensor, groups: Groups) -> Tensor:
    """Rows [S', ...] of the tokens of this context-parallel rank, zero rows for padding; before any split over TP."""
    length = rows_per_rank(len(rows_SX), groups) * groups.token_shards
    start = groups.cp.rank() * length
    block_SX = rows_SX if groups.cp.size() == 1 else rows_SX[start : start + length]  # a slice's gradient is a copy
    return zero_pad(block_SX, length)


def shard_tokens(rows_SBX: Tensor, groups: Groups) -> Tensor:
    """This rank's rows of all visual tokens, zero rows for padding: [:func:`rows_per_rank`, B, X]."""
    return shard_rows(context_block(rows_SBX, groups), groups)


def pad_rows(rows_RBX: Tensor, groups: Groups) -> Tensor:
    """Rows that every rank holds with zero rows after them, so that they divide for :func:`shard_rows`."""
    return zero_pad(rows_RBX, -(-len(rows_RBX) // groups.token_shards) * groups.token_shards)


def shard_rows(rows_RBX: Tensor, groups: Groups) -> Tensor:
    """This rank's rows [R/TP, B, X] under sequence parallelism (backward gathers); all rows otherwise."""
    return scatter_to_sequence_parallel_region(rows_RBX, group=groups.tp) if groups.sequence_parallel else rows_RBX


def gather_tokens(rows_SBX: Tensor, tokens: int, groups: Groups) -> Tensor:
    """The rows of all ``tokens`` visual tokens from every rank's; the reverse of :func:`shard_tokens`, for inference.

    The backward splits the gradient: right for a consumer that every rank runs alike.
    """
    for group in (groups.tp, groups.cp) if groups.sequence_parallel else (groups.cp,):
        rows_SBX = gather_from_sequence_parallel_region(rows_SBX, tensor_parallel_output_grad=False, group=group)
    return rows_SBX[:tokens]
