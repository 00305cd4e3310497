"""Gradients of a fused projection's parts: torch's own numbers, without stacking them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_flashi2v.models.attention import Rotary
from megatron_flashi2v.models.fused_gradient import GradientMemory, unbind
from megatron_flashi2v.models.presets import PRESETS
from megatron_flashi2v.models.recompute import Recompute, build_block
from megatron_flashi2v.models.spec import make_spec
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device

TOKENS = 64


class Doubled(torch.autograd.Function):
    """Twice a part, whose gradient goes to its place."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, place: GradientMemory) -> Tensor:
        ctx.place = place
        return 2 * part

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return torch.mul(gradient, 2, out=ctx.place()), None


def results(fused: Tensor, parts: tuple[Tensor, ...], places: Any) -> dict[str, Tensor]:
    """Functions of some of the parts, of which the first is written to its place where it has one."""
    first = [2 * parts[0] if place is None else Doubled.apply(parts[0], place) for place in places[:1]][0]
    return {
        "all": first.sum() + (parts[1] ** 2).sum() + (parts[2] ** 3).sum(),
        "one is unused": (first * parts[2]).sum(),
        "one is used twice": (first * parts[0]).sum() + parts[1].sum() + parts[2].sum(),
        "none is written": (parts[0] * parts[1] * parts[2]).sum(),
    }


@pytest.mark.parametrize("name", results(torch.ones(()), (torch.ones(()),) * 3, [None]))
def test_gradients_are_those_of_torchs_unbind(name: str) -> None:
    fused = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(results(fused, fused.unbind(1), [None])[name], fused)
    result = results(fused, *unbind(fused, 1))[name]
    for keep in (True, False):  # the second backward pass has memory of its own
        (found,) = torch.autograd.grad(result, fused, retain_graph=keep)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        found.zero_()


def test_without_gradients_parts_are_plain_views() -> None:
    fused = torch.randn(2, 3, requires_grad=True)
    for tensor in (fused.detach(), fused):
        with torch.set_grad_enabled(tensor is not fused):
            parts, places = unbind(tensor, 1)
        assert places == [None] * 3 and all(part._base is tensor and part.grad_fn is None for part in parts)


class Written(TorchDispatchMode):
    """Sizes of large results of operators that only move numbers, by operator."""

    def __init__(self, smallest: int) -> None:
        super().__init__()
        self.smallest, self.found = smallest, Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in MOVES and isinstance(result, Tensor) and result.numel() >= self.smallest:
            self.found[name] += 1
        return result


MOVES = {"cat", "stack", "slice_backward", "select_backward", "zeros", "zeros_like", "new_zeros", "fill_", "zero_"}


@pytest.mark.parametrize("inside", [None, "selective", "skip_attention"])
def test_a_block_puts_no_gradients_together(inside: Any) -> None:
    """No stack of queries', keys' and values' gradients, and no gradient of a slice, which is zeros and a copy.

    The text's rows are few; so are the modulation's.
    """
    with single_process(resolve_device("cpu")) as groups:
        spec = make_spec(PRESETS["tiny"], groups, torch.device("cpu"))
        block, config = build_block(spec, Recompute(inside=inside)), spec.config
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        hidden, text = (torch.randn(rows, 1, config.hidden_size, requires_grad=True) for rows in (TOKENS, 4))
        modulation = torch.randn(6, 1, config.hidden_size, requires_grad=True)
        angles = torch.randn(TOKENS, config.head_dim // 2)
        with Written(TOKENS * config.hidden_size) as written:
            output = block(hidden, text, modulation, Rotary(angles.cos(), angles.sin(), TOKENS))
            output.backward(torch.randn_like(output))
    assert not written.found
