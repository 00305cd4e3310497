"""A pipeline hop carries conditioning rows bit for bit, forward and backward, whatever its dtype."""

from __future__ import annotations

import pytest
import torch

from megatron_flashi2v.parallel.packing import PackedShape, pack, unpack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_and_gradients_are_exact(dtype: torch.dtype) -> None:
    tokens = torch.randn(5, 2, 4).to(dtype).requires_grad_()
    text = torch.randn(3, 2, 4).to(dtype).requires_grad_()
    rows = torch.randn(7, 2, 4, requires_grad=True)
    shape = PackedShape(tokens=5, context=3, conditioning=7, dtype=dtype)
    packed = pack(tokens, text, rows)
    assert packed.dtype == dtype and packed.shape == (shape.rows, 2, 4)
    assert packed._base is None  # megatron-core frees it when it is sent, which a view would not do

    received = packed.detach().clone().requires_grad_()  # what the next stage holds
    out_tokens, out_text, out_rows = unpack(received, shape)
    assert torch.equal(out_tokens, tokens) and torch.equal(out_text, text) and torch.equal(out_rows, rows)

    weights = torch.randn(7, 2, 4)
    (2 * out_tokens.float().sum() + 3 * out_text.float().sum() + (out_rows * weights).sum()).backward()
    packed.backward(received.grad)
    assert torch.equal(rows.grad, weights)  # fp32 gradients, not rounded to bf16
    assert (tokens.grad == 2).all() and (text.grad == 3).all()


def test_bf16_hop_has_twice_the_conditioning_rows() -> None:
    assert PackedShape(10, 4, 7, torch.bfloat16).rows == 28
    assert PackedShape(10, 4, 7, torch.float32).rows == 21
