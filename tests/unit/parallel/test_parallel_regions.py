"""Which rows of a sequence lie on which rank: blocks in order, padding at the end, nothing twice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.regions import context_block, own_tokens, rows_per_rank


def place(cp: int, cp_size: int, tp: int = 0, tp_size: int = 1, *, sequence_parallel: bool = False) -> Groups:
    """The groups of one rank, without processes."""
    def group(rank: int, size: int) -> SimpleNamespace:
        return SimpleNamespace(rank=lambda: rank, size=lambda: size)

    collection = SimpleNamespace(cp=group(cp, cp_size), tp=group(tp, tp_size))
    return Groups(collection=collection, sequence_parallel=sequence_parallel)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [1, 2, 5, 12, 13, 20280])
@pytest.mark.parametrize("cp, tp, sequence_parallel", [
    (1, 1, False), (2, 1, False), (3, 1, False), (16, 1, False), (1, 4, True), (3, 2, True), (3, 2, False),
])
def test_every_token_lies_on_one_rank(tokens: int, cp: int, tp: int, sequence_parallel: bool) -> None:
    rows, found = set(), []
    for cp_rank in range(cp):
        groups = [place(cp_rank, cp, rank, tp, sequence_parallel=sequence_parallel) for rank in range(tp)]
        block = context_block(torch.arange(1.0, tokens + 1)[:, None, None], groups[0]).flatten()
        shares = block.chunk(tp) if sequence_parallel else [block] * tp
        for group, share in zip(groups, shares, strict=True):
            rows.add(rows_per_rank(tokens, group))
            assert len(share) == rows_per_rank(tokens, group)
            own = own_tokens(tokens, group)
            expected = [float(index + 1) for index in own]
            assert share.tolist() == expected + [0.0] * (len(share) - len(own))  # zeros after the real rows
        found += [index for group in groups[: tp if sequence_parallel else 1] for index in own_tokens(tokens, group)]
    assert found == list(range(tokens))
    (each,) = rows
    parts = cp * (tp if sequence_parallel else 1)
    assert each * parts - tokens < parts  # no more padding than must be


def test_gradient_of_a_block_is_zero_elsewhere() -> None:
    """Ranks' gradients add up in the reduction over context-parallel ranks: none may know of another's block."""
    rows = torch.zeros(5, 1, 1, requires_grad=True)
    total = torch.zeros(5)
    for rank in range(3):
        block = context_block(rows, place(rank, 3))
        (gradient,) = torch.autograd.grad(block.sum() * (rank + 1), rows)
        total += gradient.flatten()
    assert total.tolist() == [1, 1, 2, 2, 3]
