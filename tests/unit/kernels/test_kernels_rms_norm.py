from __future__ import annotations

import math

import pytest
import torch

from flashi2v_kernels.registry import load_entry_point, specs_of
from flashi2v_kernels.rms_norm import reference
from flashi2v_kernels.rms_norm.statistics import local_sum_of_squares

SPECS = [spec for spec in specs_of("rms_norm") if "cpu" in spec.devices]
IMPLEMENTATIONS = {spec.name: load_entry_point(spec) for spec in SPECS}
EPS = 1e-6


def draw(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 0.3).to(dtype)


def run(function, x, weight, weights):
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    output = function(x, weight, EPS)
    return output.detach(), *torch.autograd.grad((output * weights.to(output.dtype)).sum(), (x, weight))


def sharded(function, x, weight, shards):
    """The norm as tensor-parallel ranks compute it: heads are split, sums of squares are added."""
    xs, weights = x.chunk(shards, dim=2), weight.chunk(shards)
    total = sum(local_sum_of_squares(part, 2) for part in xs)
    width = x.shape[2] * x.shape[3]
    parts = [function(part, row, EPS, total, width) for part, row in zip(xs, weights, strict=True)]
    return torch.cat(parts, dim=2)


def test_reference_is_the_root_mean_square_over_the_full_width():
    x, weight = draw((2, 1, 3, 4)), draw((12,), seed=1)
    output = reference.rms_norm(x, weight, 0.5)
    for token in range(2):
        row = x[token, 0].flatten().tolist()
        root = math.sqrt(sum(value * value for value in row) / 12 + 0.5)
        expected = [value / root * float(weight[i]) for i, value in enumerate(row)]
        torch.testing.assert_close(output[token, 0].flatten(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (7, 3, 2, 24), (1, 2, 5, 6), (5, 1, 3, 128), (4, 9)])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_output_and_gradients(name, shape, dtype, assert_near):
    tail = math.prod(shape[2:]) if len(shape) == 4 else shape[-1]
    x, weight, weights = draw(shape, dtype), draw((tail,), torch.float32, seed=1), draw(shape, dtype, seed=2)
    actual = run(IMPLEMENTATIONS[name], x, weight, weights)
    expected = run(reference.rms_norm, x.double(), weight.double(), weights)
    assert [tensor.dtype for tensor in actual] == [dtype, dtype, torch.float32]
    for ours, wanted in zip(actual, expected, strict=True):
        assert_near(ours, wanted)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_strided_view_of_a_fused_projection(name, assert_near):
    fused = draw((5, 2, 3, 3, 8), torch.float32)  # S B h (q, k, v) D
    query, weight = fused[:, :, :, 0], draw((24,), torch.float32, seed=1)
    assert not query.is_contiguous()
    expected = reference.rms_norm(query.contiguous().double(), weight.double(), EPS)
    assert_near(IMPLEMENTATIONS[name](query, weight, EPS), expected)
    assert_near(IMPLEMENTATIONS[name](query, weight.view(3, 8), EPS), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_shards_equal_the_whole(name, shards, dtype, assert_near):
    x, weights = draw((5, 2, 4, 6), dtype), draw((5, 2, 4, 6), seed=2)
    weight = draw((24,), torch.float32, seed=1)
    actual = run(lambda x, w, eps: sharded(IMPLEMENTATIONS[name], x, w, shards), x, weight, weights)
    expected = run(reference.rms_norm, x.double(), weight.double(), weights.to(dtype).double())
    for ours, wanted in zip(actual, expected, strict=True):
        assert_near(ours, wanted)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_gradcheck(name):
    x, weight = draw((3, 2, 4, 6)).requires_grad_(), draw((24,), seed=1).requires_grad_()
    function = IMPLEMENTATIONS[name]
    assert torch.autograd.gradcheck(lambda x, w: function(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w: sharded(function, x, w, 2), (x, weight))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_wrong_shapes_are_refused(name):
    function, x = IMPLEMENTATIONS[name], draw((3, 2, 4, 6))
    with pytest.raises(ValueError, match="weight"):
        function(x, draw((25,)), EPS)
    with pytest.raises(ValueError, match="weight"):
        function(x, draw((6, 4)), EPS)
    with pytest.raises(ValueError, match="sums"):
        function(x, draw((24,)), EPS, draw((2, 3)), 24)
    with pytest.raises(ValueError, match="both"):
        function(x, draw((24,)), EPS, draw((3, 2)))
