"""Context-parallel attention in gloo processes against one process in fp64; started by the tests of ``parallel``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashi2v_kernels.attention import reference
from flashi2v_kernels.registry import load_backward, load_entry_point, resolve, specs_of
from helpers.attention_libraries import cudnn_on_cpus
from helpers.ranks import run_ranks
from megatron_flashi2v.parallel.context import ContextAttention
from megatron_flashi2v.runtime.distributed import shutdown

BATCH, HEADS, SIZE = 2, 4, 8


@dataclass(frozen=True)
class Case:
    """``ulysses`` x ``ring`` ranks of ``rows`` rows each, of which the first ``tokens`` of all are real."""

    ulysses: int
    ring: int
    rows: int
    tokens: int
    kernel: str = "torch_sdpa"
    dtype: str = "float64"


CASES = {
    "ulysses-2": Case(2, 1, 5, 10),
    "ulysses-2-padded": Case(2, 1, 5, 9),
    "ulysses-4-empty-ranks": Case(4, 1, 2, 3),
    "ulysses-2-bf16": Case(2, 1, 5, 9, dtype="bfloat16"),
    "ring-2": Case(1, 2, 5, 10),
    "ring-2-reference": Case(1, 2, 5, 10, kernel="reference"),
    "ring-3-uneven": Case(1, 3, 5, 13),
    "ring-4-empty-block": Case(1, 4, 2, 5),
    "ring-3-fp32": Case(1, 3, 5, 13, dtype="float32"),
    "ring-3-bf16": Case(1, 3, 5, 13, dtype="bfloat16"),
    "ring-3-cudnn": Case(1, 3, 5, 13, dtype="bfloat16", kernel="torch_cudnn"),
    "usp-2x2": Case(2, 2, 3, 12),
    "usp-2x2-uneven": Case(2, 2, 3, 10),
    "usp-2x2-empty-ring-block": Case(2, 2, 3, 5),
}
WORLD = 4


def spawn(function: Callable[..., Any], folder: Path) -> list[Any]:
    """What ``function()`` returns on each of the processes, JSON-ready."""
    run_ranks(_run, WORLD, folder, function, str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


def _run(rank: int, function: Callable[..., Any], folder: str) -> None:
    dist.init_process_group("gloo")
    (Path(folder) / f"{rank}.json").write_text(json.dumps(function()))
    shutdown()


def draw(tokens: int) -> list[Tensor]:
    """Queries, keys, values and weights of the output, [tokens, B, h, D] in fp64; scores differ enough to matter."""
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(tokens, BATCH, HEADS, SIZE, generator=generator, dtype=torch.float64) * scale
        for scale in (2.0, 2.0, 1.0, 1.0)
    ]


def all_errors() -> dict[str, dict[str, float]]:
    """This rank's largest error of the output and of each gradient, relative to the largest value, by case."""
    with cudnn_on_cpus():
        return {name: errors(case) for name, case in CASES.items()}


def attention_of(case: Case, **wrapped: Callable[..., Any]) -> ContextAttention | None:
    """The case's attention on this rank; None on ranks that it does not take. All ranks must call."""
    rank, degree = dist.get_rank(), case.ulysses
    levels = [range(start, start + degree) for start in range(0, degree * case.ring, degree)]
    rings = [range(start, degree * case.ring, degree) for start in range(degree)]
    # Every rank creates every group.
    ulysses = {ranks: dist.new_group(list(ranks)) for ranks in levels} if degree > 1 else {}
    ring = {ranks: dist.new_group(list(ranks)) for ranks in rings} if case.ring > 1 else {}
    if rank >= degree * case.ring:
        return None
    spec = next(spec for spec in specs_of("attention") if spec.name == case.kernel)
    return ContextAttention(
        wrapped.get("forward", load_entry_point(spec)), wrapped.get("backward", load_backward(spec)),
        ulysses=next((group for ranks, group in ulysses.items() if rank in ranks), None),
        ring=next((group for ranks, group in ring.items() if rank in ranks), None),
    )


def errors(case: Case) -> dict[str, float]:
    """This rank's part of the case against the reference over all real tokens in one process."""
    attend = attention_of(case)
    if attend is None:
        return {}
    dtype = getattr(torch, case.dtype)
    *inputs, weights = [rows.to(dtype) for rows in draw(case.tokens)]
    wide = [rows.double().requires_grad_() for rows in inputs]
    expected = reference.attention(*(rows.transpose(0, 1) for rows in wide)).transpose(0, 1)
    expected_gradients = torch.autograd.grad((expected * weights.double()).sum(), wide)

    own = slice(dist.get_rank() * case.rows, (dist.get_rank() + 1) * case.rows)

    def block(rows: Tensor) -> Tensor:
        # Padding that would spoil everything if it counted.
        garbage = rows.new_full((case.rows - len(rows[own]), *rows.shape[1:]), 30.0)
        return torch.cat([rows[own], garbage])

    local = [block(rows).requires_grad_() for rows in inputs]
    output = attend(*local, case.tokens)
    gradients = torch.autograd.grad((output * block(weights)).sum(), local)
    found = {"output": (output, expected), **{
        name: pair for name, pair in zip("qkv", zip(gradients, expected_gradients, strict=True), strict=True)
    }}
    real = len(inputs[0][own])
    return {
        name: float(
            torch.cat([value.detach().double()[:real] - want.detach()[own], value.detach().double()[real:]]).abs().max()
            / want.detach().abs().max()
        )
        for name, (value, want) in found.items()
    }


def arrivals() -> dict[str, list[bool]]:
    """Whether the block that is under way arrives while the kernel is still busy, for each call of the kernel.

    Kernels go on until all transfers that were started before have arrived, at most ten seconds: a transfer that
    starts only after the computation never makes it.
    """
    case = Case(1, 4, 3, 12)
    kernel = resolve("attention", "cpu", torch.float64)
    started: list[Tensor] = []
    start_transfers = dist.batch_isend_irecv

    def watch(operations: list[dist.P2POp]) -> list[dist.Work]:
        for operation in operations:
            if operation.op is dist.irecv:
                started.append(operation.tensor.fill_(torch.nan))
        return start_transfers(operations)

    seen: dict[str, list[bool]] = {"forward": [], "backward": []}

    def busy(name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        pending, deadline = list(started), time.monotonic() + 10
        while any(bool(tensor.isnan().any()) for tensor in pending) and time.monotonic() < deadline:
            time.sleep(0.01)
        seen[name].append(bool(pending) and not any(bool(tensor.isnan().any()) for tensor in pending))
        started.clear()
        return function(*arguments, **options)

    assert kernel.backward is not None
    attend = attention_of(case, forward=partial(busy, "forward", kernel.function),
                          backward=partial(busy, "backward", kernel.backward))
    assert attend is not None
    dist.batch_isend_irecv = watch
    try:
        own = slice(dist.get_rank() * case.rows, (dist.get_rank() + 1) * case.rows)
        local = [rows[own].clone().requires_grad_() for rows in draw(case.tokens)[:3]]
        output = attend(*local, case.tokens)
        started.clear()
        output.sum().backward()
    finally:
        dist.batch_isend_irecv = start_transfers
    return seen


def errors_and_arrivals() -> dict[str, Any]:
    """Both, so that the processes start once."""
    return {"errors": all_errors(), "arrivals": arrivals()}
