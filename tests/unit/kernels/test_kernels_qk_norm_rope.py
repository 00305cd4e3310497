"""The fused norm and rotation, and the norm alone in Triton, against the references in fp64."""

from __future__ import annotations

import pytest
import torch
from helpers.kernels import TRITON_INTERPRETED, assert_near, draw, implementations, outputs_and_gradients

from flashi2v_kernels.qk_norm_rope.reference import apply_rope, qk_norm_rope
from flashi2v_kernels.qk_norm_rope.tables import rope_tables
from flashi2v_kernels.rms_norm import reference as rms_norm_reference
from flashi2v_kernels.rms_norm.statistics import local_sum_of_squares
from flashi2v_kernels.rms_norm.torch import turn_complex, turn_real

FUSED = implementations("qk_norm_rope")
NORMS = implementations("rms_norm")
EPS = 1e-6
FP32, BF16 = torch.float32, torch.bfloat16
# grid, batch, heads, head size
CASES = [
    ((1, 1, 1), 1, 1, 2),
    ((1, 1, 1), 3, 3, 10),
    ((3, 1, 5), 3, 2, 24),
    ((2, 3, 1), 2, 5, 6),
    ((1, 9, 3), 1, 3, 128),
]


def tables(grid, head_dim, dtype=FP32):
    cos, sin = rope_tables(grid, head_dim, dtype=dtype)
    device = draw((1,)).device
    return cos.to(device), sin.to(device)


def sharded(function, shards):
    """The norm as tensor-parallel ranks compute it: heads are split, sums of squares are added."""

    def run(x, weight, *rest):
        xs, weights = x.chunk(shards, dim=2), weight.chunk(shards)
        total = sum(local_sum_of_squares(part, 2) for part in xs)
        width = x.shape[2] * x.shape[3]
        parts = [
            function(part, row, *rest, EPS, sum_of_squares=total, full_width=width)
            for part, row in zip(xs, weights, strict=True)
        ]
        return torch.cat(parts, dim=2)

    return run


def test_reference_is_the_norm_then_the_rotation():
    x, weight, (cos, sin) = draw((6, 2, 3, 8)), draw((24,), seed=1), tables((1, 2, 3), 8, torch.float64)
    normed = torch.nn.functional.rms_norm(x.flatten(-2), (24,), weight, 0.1).view_as(x)
    torch.testing.assert_close(qk_norm_rope(x, weight, cos, sin, 0.1), apply_rope(normed, cos, sin))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FUSED)
def test_output_and_gradients(name, case, dtype):
    grid, batch, heads, size = case
    cos, sin = tables(grid, size)
    inputs = [2 * draw((len(cos), batch, heads, size), dtype), draw((heads * size,), FP32, seed=1, mean=1.0)]
    actual = outputs_and_gradients(lambda x, w: FUSED[name](x, w, cos, sin, EPS), inputs, rounded_to=dtype)
    expected = outputs_and_gradients(
        lambda x, w: qk_norm_rope(x, w, cos.double(), sin.double(), EPS), inputs, torch.float64, rounded_to=dtype
    )
    assert [tensor.dtype for tensor in actual] == [dtype, dtype, FP32]
    # two numbers of one row: the norm takes their size away, and nearly all of the gradient
    smallest = inputs[0].double().square().mean(dim=(-1, -2)).sqrt().min()
    scales = [None, expected[1].abs().max() + 1 / smallest if heads * size == 2 else None, None]
    for ours, wanted, scale in zip(actual, expected, scales, strict=True):
        assert_near(ours, wanted, scale)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("name", FUSED)
def test_shards_equal_the_whole(name, shards, dtype):
    cos, sin = tables((1, 5, 1), 6)
    inputs = [2 * draw((5, 2, 4, 6), dtype), draw((24,), FP32, seed=1)]
    for parts, whole in (
        (sharded(lambda x, w, e, **o: FUSED[name](x, w, cos, sin, e, **o), shards),
         lambda x, w: qk_norm_rope(x, w, cos.double(), sin.double(), EPS)),
        (sharded(NORMS[name], shards), lambda x, w: rms_norm_reference.rms_norm(x, w, EPS)),
    ):
        actual = outputs_and_gradients(parts, inputs)
        expected = outputs_and_gradients(whole, inputs, torch.float64)
        for ours, wanted in zip(actual, expected, strict=True):
            assert_near(ours, wanted)


@pytest.mark.parametrize("name", FUSED)
def test_strided_views(name):
    """A slice of a fused projection, and a gradient that comes transposed as attention gives it."""
    fused = draw((6, 2, 3, 3, 8), FP32)  # S B h (q, k, v) D
    cos, sin = tables((1, 2, 3), 8)
    inputs = [fused, draw((24,), FP32, seed=1)]
    actual = outputs_and_gradients(
        lambda f, w: FUSED[name](f[:, :, :, 1], w, cos, sin, EPS).transpose(0, 1).square(), inputs
    )
    expected = outputs_and_gradients(
        lambda f, w: qk_norm_rope(f[:, :, :, 1], w, cos.double(), sin.double(), EPS).transpose(0, 1).square(),
        inputs, torch.float64,
    )
    for ours, wanted in zip(actual, expected, strict=True):
        assert_near(ours, wanted)


@pytest.mark.parametrize("name", FUSED)
def test_the_gradient_is_written_where_it_belongs(name):
    """Beside those of the fused projection's other parts; what cannot write there returns a tensor of its own."""
    fused, (cos, sin) = draw((6, 2, 3, 3, 8), FP32), tables((1, 2, 3), 8)
    place = torch.full_like(fused, torch.nan)[:, :, :, 1]
    grads = []
    for memory in (None, lambda: place):
        heads = fused[:, :, :, 1].detach().requires_grad_()
        output = FUSED[name](heads, draw((24,), FP32, seed=1), cos, sin, EPS, gradient_memory=memory)
        grads += torch.autograd.grad(output, heads, draw(output.shape, FP32, seed=2))
    assert torch.equal(*grads)
    assert (grads[1] is place) == (name in ("torch", "triton"))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (7, 3, 2, 24), (1, 2, 5, 7), (5, 1, 3, 128), (4, 9), (11,)])
@pytest.mark.parametrize("name", NORMS)
def test_norm_alone(name, shape, dtype):
    tail = shape[2:] if len(shape) == 4 else shape[-1:]
    inputs = [draw(shape, dtype, mean=0.3), draw(tail, FP32, seed=1)]
    actual = outputs_and_gradients(lambda x, w: NORMS[name](x, w, EPS), inputs, rounded_to=dtype)
    expected = outputs_and_gradients(
        lambda x, w: rms_norm_reference.rms_norm(x, w, EPS), inputs, torch.float64, rounded_to=dtype
    )
    for ours, wanted in zip(actual, expected, strict=True):
        assert_near(ours, wanted)


@pytest.mark.skipif(TRITON_INTERPRETED, reason="Triton has no fp64 specs")
@pytest.mark.parametrize("name", [name for name in FUSED if name != "triton"])
def test_gradcheck(name):
    cos, sin = tables((1, 1, 3), 6, torch.float64)
    x, weight = draw((3, 2, 4, 6)).requires_grad_(), draw((24,), seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: FUSED[name](x, w, cos, sin, EPS), (x, weight))
    parts = sharded(lambda x, w, eps, **options: FUSED[name](x, w, cos, sin, eps, **options), 2)
    assert torch.autograd.gradcheck(parts, (x, weight))


@pytest.mark.skipif(TRITON_INTERPRETED, reason="of torch's implementation")
def test_turn_without_complex_numbers():
    pairs, cos, sin = draw((6, 2, 3, 4, 2)), draw((6, 1, 1, 4), seed=1), draw((6, 1, 1, 4), seed=2)
    torch.testing.assert_close(turn_real(pairs, cos, sin), turn_complex(pairs, cos, sin))


@pytest.mark.parametrize("name", FUSED)
def test_wrong_shapes_are_refused(name):
    x, weight, (cos, sin) = draw((6, 2, 4, 6), FP32), draw((24,), FP32), tables((1, 2, 3), 6)
    with pytest.raises(ValueError, match="tables"):
        FUSED[name](x, weight, cos[:5], sin[:5], EPS)
    with pytest.raises(ValueError, match="weight"):
        FUSED[name](x, weight[:-1], cos, sin, EPS)
    with pytest.raises(ValueError, match="both"):
        FUSED[name](x, weight, cos, sin, EPS, full_width=24)
    with pytest.raises(ValueError, match="sums"):
        FUSED[name](x, weight, cos, sin, EPS, sum_of_squares=draw((2, 6), FP32), full_width=24)
