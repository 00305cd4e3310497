"""Modulated norm, gated residual and activation: every implementation against the reference in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.kernels import DEVICE, TRITON_INTERPRETED, assert_near, draw, implementations, outputs_and_gradients
from torch.nn import functional as F

from flashi2v_kernels import chunks
from flashi2v_kernels.ada_layer_norm.reference import ada_layer_norm
from flashi2v_kernels.bias_gelu_tanh.reference import bias_gelu_tanh
from flashi2v_kernels.gate_residual.reference import gate_residual

NORMS = implementations("ada_layer_norm")
GATES = implementations("gate_residual")
GELUS = implementations("bias_gelu_tanh")
SUMS = implementations("residual_norm")
EPS = 1e-6
# one token; odd sizes and batch 3; more rows than one program or one piece takes
SHAPES = [(1, 1, 2), (7, 3, 24), (5, 1, 37), (17, 2, 66), (1, 3, 5)]
FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize(
    ("dtype", "other"), [(FP32, FP32), (BF16, BF16), (FP32, BF16), (BF16, FP32)], ids=["fp32", "bf16", "to16", "to32"]
)


@pytest.mark.parametrize("threads", [1, 3])
def test_these_shapes_come_in_pieces_however_many_threads_there_are(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for dtype in (FP32, BF16):
        assert max(len(chunks.row_chunks(torch.zeros(shape, dtype=dtype))) for shape in SHAPES) > 3


def test_a_piece_grows_with_the_threads(monkeypatch):
    monkeypatch.undo()  # pieces as users have them
    x, found = torch.zeros(chunks.BYTES_PER_THREAD // 8, 8), []
    for threads in (1, 2, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        found.append(len(chunks.row_chunks(x)))
    assert found == [4, 2, 1]


def rows(shape, dtype):
    return draw(shape, dtype, mean=0.5)


def test_norm_is_torchs_with_a_factor_and_a_shift():
    x, shift, scale = rows((6, 2, 16), torch.float64), draw((2, 16), seed=1), draw((2, 16), seed=2)
    expected = F.layer_norm(x, (16,), eps=0.1) * (1 + scale) + shift
    torch.testing.assert_close(ada_layer_norm(x, shift, scale, 0.1, dtype=torch.float64), expected)
    torch.testing.assert_close(
        ada_layer_norm(x, shift[:1].expand(2, -1), scale[:1].expand(2, -1) - 1, 0.1, dtype=torch.float64),
        F.layer_norm(x, (16,), scale[0], shift[0], eps=0.1),
    )


def test_gelu_is_torchs():
    x, bias = 3 * draw((9, 16)), draw((16,), seed=1)
    torch.testing.assert_close(bias_gelu_tanh(x, bias), F.gelu(x + bias, approximate="tanh"))
    torch.testing.assert_close(bias_gelu_tanh(x, None), F.gelu(x, approximate="tanh"))


def test_gated_residual_is_its_formula():
    hidden, update, gate = draw((4, 2, 3)), draw((4, 2, 3), seed=1), draw((2, 3), seed=2)
    output = gate_residual(hidden, update, gate)
    for token in range(4):
        for sample in range(2):
            row = hidden[token, sample] + gate[sample] * update[token, sample]
            torch.testing.assert_close(output[token, sample], row)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NORMS)
def test_ada_layer_norm(name, shape, dtype, other):
    inputs = [rows(shape, dtype), draw(shape[1:], FP32, seed=1), draw(shape[1:], FP32, seed=2)]
    actual = outputs_and_gradients(lambda *x: NORMS[name](*x, EPS, dtype=other), inputs, rounded_to=other)
    expected = outputs_and_gradients(
        lambda *x: ada_layer_norm(*x, EPS, dtype=torch.float64), inputs, torch.float64, rounded_to=other
    )
    assert [tensor.dtype for tensor in actual] == [other, dtype, FP32, FP32]
    # the gradient of a normalised row is a difference of numbers of this size
    deviation = inputs[0].double().std(dim=-1, correction=0).min()
    spread = 4 * (1 + inputs[2].double().abs().max()) / deviation
    scales = [None, spread, None, None]
    for ours, wanted, scale in zip(actual, expected, scales, strict=True):
        assert_near(ours, wanted, scale)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", GATES)
def test_gate_residual(name, shape, dtype, other):
    inputs = [draw(shape, dtype), draw(shape, other, seed=1), draw(shape[1:], FP32, seed=2)]
    actual = outputs_and_gradients(GATES[name], inputs, rounded_to=dtype)
    expected = outputs_and_gradients(gate_residual, inputs, torch.float64, rounded_to=dtype)
    assert [tensor.dtype for tensor in actual] == [dtype, dtype, other, FP32]
    for ours, wanted in zip(actual, expected, strict=True):
        assert_near(ours, wanted)


def apart(hidden, update, gate, shift, scale, eps, *, dtype):
    """The sum and then the norm, which reads the rounded sum, by the definitions of the two operators."""
    total = gate_residual(hidden, update, torch.ones_like(shift) if gate is None else gate)
    return total, ada_layer_norm(total, shift, scale, eps, dtype=dtype)


def stacked(function, dtype, gated):
    """Both results of an implementation as one tensor, so that both get a gradient."""

    def run(hidden, update, *rows):
        gate, shift, scale = rows if gated else (None, *rows)
        total, normed = function(hidden, update, gate, shift, scale, EPS, dtype=dtype or hidden.dtype)
        wide = torch.promote_types(total.dtype, normed.dtype)
        return torch.stack([total.to(wide), normed.to(wide)])

    return run


@DTYPES
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SUMS)
def test_residual_norm(name, shape, gated, dtype, other):
    """Against the two operators: in fp64, or where the sum is rounded to bf16 in the same precision."""
    count = 3 if gated else 2
    inputs = [rows(shape, dtype), draw(shape, other, seed=1)]
    inputs += [draw(shape[1:], FP32, seed=seed) for seed in range(2, 2 + count)]
    actual = outputs_and_gradients(stacked(SUMS[name], other, gated), inputs)
    wide = dtype == FP32
    defined = stacked(apart, None if wide else other, gated)
    expected = outputs_and_gradients(defined, inputs, torch.float64 if wide else None)
    assert [tensor.dtype for tensor in actual[1:]] == [tensor.dtype for tensor in inputs]
    total, normed = expected[0]
    # Triton's interpreter cuts bf16 off where a card rounds.
    told = other if dtype == FP32 else BF16 if name.startswith("triton") else actual[0].dtype
    for ours, wanted in zip(actual[0].to(told), (total, normed), strict=True):
        assert_near(ours, wanted)
    # the gradient of a normalised row is a difference of numbers of this size
    spread = 4 * (1 + inputs[-1].double().abs().max()) / total.double().std(dim=-1, correction=0).min()
    scales = [wanted.abs().max() + spread * (i < count) for i, wanted in enumerate(expected[1:])]  # but shift and scale
    for ours, wanted, scale in zip(actual[1:], expected[1:], scales, strict=True):
        assert_near(ours.to(BF16 if BF16 in (dtype, other) else FP32), wanted, scale)


@pytest.mark.parametrize("name", NORMS)
def test_results_into_given_memory(name):
    """What was dropped after its reader is computed again where it was."""
    x, shift, scale = rows((7, 2, 24), BF16), draw((2, 24), FP32, seed=1), draw((2, 24), FP32, seed=2)
    for function, inputs, options in (
        (NORMS[name], (x, shift, scale, EPS), {"dtype": BF16}), (GELUS[name], (x, shift[0]), {})
    ):
        memory = torch.zeros_like(x)
        function(*inputs, **options, out=memory)
        assert torch.equal(memory, function(*inputs, **options)) and memory.any()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("bias_dtype", [FP32, BF16, None])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", GELUS)
def test_bias_gelu_tanh(name, shape, bias_dtype, dtype):
    bias = None if bias_dtype is None else draw(shape[-1:], bias_dtype, seed=1)
    inputs = [3 * draw(shape, dtype), bias]
    actual = outputs_and_gradients(GELUS[name], inputs, rounded_to=dtype)
    expected = outputs_and_gradients(bias_gelu_tanh, inputs, torch.float64, rounded_to=dtype)
    assert [tensor.dtype for tensor in actual] == [dtype, dtype] + [bias_dtype] * (bias is not None)
    for ours, wanted in zip(actual, expected, strict=True):
        assert_near(ours, wanted)


@pytest.mark.parametrize("name", GELUS)
def test_gelu_of_large_numbers(name):
    x = torch.tensor([[-1e4, -90.0, -12.0, 12.0, 90.0, 1e4]], device=DEVICE)
    output, gradient = outputs_and_gradients(GELUS[name], [x, None])
    weights = draw(x.shape, BF16, seed=99).float()
    torch.testing.assert_close(output, x.clamp(min=0), rtol=0, atol=1e-20)
    torch.testing.assert_close(gradient, weights * (x > 0), rtol=0, atol=1e-20)


@pytest.mark.parametrize("name", NORMS)
def test_strided_rows(name):
    """A transposed view [S, B, D] of batch-first rows, in value and gradient."""
    x, shift, scale = rows((2, 9, 24), FP32), draw((2, 24), FP32, seed=1), draw((2, 24), FP32, seed=2)
    inputs = [x, shift, scale]
    actual = outputs_and_gradients(lambda x, *y: NORMS[name](x.transpose(0, 1), *y, EPS, dtype=FP32), inputs)
    expected = outputs_and_gradients(
        lambda x, *y: ada_layer_norm(x.transpose(0, 1), *y, EPS, dtype=torch.float64), inputs, torch.float64
    )
    for ours, wanted in zip(actual, expected, strict=True):
        assert_near(ours, wanted)
    update, gate = draw((2, 9, 24), FP32, seed=3), draw((2, 24), FP32, seed=2)
    for gate_name in set(GATES) & {name}:
        results = [
            outputs_and_gradients(lambda x, u, g, f=f: f(x.transpose(0, 1), u.transpose(0, 1), g), [x, update, gate], d)
            for f, d in ((GATES[gate_name], None), (gate_residual, torch.float64))
        ]
        for ours, wanted in zip(*results, strict=True):
            assert_near(ours, wanted)


@pytest.mark.skipif(TRITON_INTERPRETED, reason="Triton has no fp64 specs")
@pytest.mark.parametrize("name", [name for name in NORMS if name != "triton"])
def test_gradcheck(name):
    x, shift, scale = (draw(shape).requires_grad_() for shape in ((3, 2, 6), (2, 6), (2, 6)))
    assert torch.autograd.gradcheck(lambda *args: NORMS[name](*args, EPS, dtype=torch.float64), (x, shift, scale))
    assert torch.autograd.gradcheck(GATES[name], (x, draw((3, 2, 6), seed=7).requires_grad_(), scale))
    assert torch.autograd.gradcheck(GELUS[name], (x, draw((6,)).requires_grad_()))


@pytest.mark.parametrize("name", NORMS)
def test_frozen_inputs_get_no_gradient(name):
    x, shift, scale = draw((3, 2, 6), FP32), draw((2, 6), FP32), draw((2, 6), FP32, seed=1).requires_grad_()
    NORMS[name](x, shift, scale, EPS, dtype=FP32).sum().backward()
    normed = F.layer_norm(x, (6,), eps=EPS)
    assert x.grad is None and shift.grad is None
    torch.testing.assert_close(scale.grad, normed.sum(dim=0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NORMS)
def test_same_bits_twice(name):
    """Gradients of rows that all tokens share are added in one order."""
    x, shift, scale = rows((13, 2, 40), FP32), draw((2, 40), FP32), draw((2, 40), FP32, seed=1)
    runs = [outputs_and_gradients(lambda *y: NORMS[name](*y, EPS, dtype=FP32), [x, shift, scale]) for _ in range(2)]
    assert all(map(torch.equal, *runs))
    runs = [outputs_and_gradients(GATES[name], [x, x, scale]) for _ in range(2)]
    assert all(map(torch.equal, *runs))


@pytest.mark.skipif(TRITON_INTERPRETED or DEVICE != "cpu", reason="of the CPU's implementations")
def test_kept_for_backward():
    """Rows in their own dtype and two numbers each; neither an fp32 copy nor rows expanded over the tokens."""
    shape = (64, 2, 128)
    hidden = rows(shape, BF16).requires_grad_()
    row = draw(shape[1:], FP32).requires_grad_()
    kept: list[int] = []

    def pack(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    size = math.prod(shape)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = NORMS["torch"](hidden, row, row, EPS, dtype=BF16)
        assert sum(kept) <= 2 * size + 4 * row.numel() + 2 * 4 * 128
        kept.clear()
        GATES["torch"](hidden, output, row)
        assert sum(kept) <= 2 * size + 4 * row.numel()
        kept.clear()
        GELUS["torch"](hidden, row[0])
        assert sum(kept) <= 2 * size + 4 * shape[-1]


@pytest.mark.parametrize("name", NORMS)
def test_wrong_shapes_are_refused(name):
    hidden, row = draw((3, 2, 6), FP32), draw((2, 6), FP32)
    with pytest.raises(ValueError, match="do not fit hidden"):
        NORMS[name](hidden, row, row[:1], EPS, dtype=FP32)
    with pytest.raises(ValueError, match="gate"):
        GATES[name](hidden, hidden, row[0])
    with pytest.raises(ValueError, match="update"):
        GATES[name](hidden, hidden[:1], row)
    with pytest.raises(ValueError, match="bias"):
        GELUS[name](hidden, row)
