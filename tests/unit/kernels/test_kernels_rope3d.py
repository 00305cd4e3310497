from __future__ import annotations

import cmath

import pytest
import torch

from flashi2v_kernels.registry import load_entry_point, specs_of
from flashi2v_kernels.rope3d import reference
from flashi2v_kernels.rope3d.tables import MAX_POSITIONS, axis_sizes, rope_tables

SPECS = [spec for spec in specs_of("rope3d") if "cpu" in spec.devices]
IMPLEMENTATIONS = {spec.name: load_entry_point(spec) for spec in SPECS}


def draw(shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("head_dim", [2, 4, 10, 16, 24, 32, 128])
def test_axis_sizes_are_even_and_fill_the_head(head_dim):
    time, height, width = axis_sizes(head_dim)
    assert time + height + width == head_dim
    assert height == width <= time
    assert all(size % 2 == 0 for size in (time, height, width))


@pytest.mark.parametrize("head_dim", [2, 16, 24, 32])
def test_reference_turns_pairs_by_their_axis(head_dim):
    grid = (2, 3, 4)
    x = draw((24, 1, 2, head_dim))
    turned = reference.apply_rope(x, *rope_tables(grid, head_dim, dtype=torch.float64))
    sizes = axis_sizes(head_dim)
    pairs = [(axis, j) for axis, size in enumerate(sizes) for j in range(size // 2)]
    assert len(pairs) == head_dim // 2
    for token in range(24):
        place = (token // 12, token // 4 % 3, token % 4)
        for head in range(2):
            for pair, (axis, j) in enumerate(pairs):
                angle = place[axis] * 10000.0 ** (-2 * j / sizes[axis])
                value = complex(x[token, 0, head, 2 * pair], x[token, 0, head, 2 * pair + 1])
                value *= cmath.exp(1j * angle)
                assert abs(complex(*turned[token, 0, head, 2 * pair : 2 * pair + 2].tolist()) - value) < 1e-13


def test_tables_are_fp32_roundings_of_fp64():
    wide_tables = rope_tables((5, 6, 7), 24, dtype=torch.float64)
    for narrow, wide in zip(rope_tables((5, 6, 7), 24), wide_tables, strict=True):
        assert narrow.dtype == torch.float32 and narrow.shape == (210, 12)
        assert torch.equal(narrow, wide.float())


def test_scores_depend_on_distances_alone():
    """What rotary embeddings are for: q.k is the same for two tokens as for both moved along an axis."""
    cos, sin = rope_tables((4, 4, 4), 24, dtype=torch.float64)
    query, key = draw((24,)).expand(64, 1, 1, 24), draw((24,), seed=1).expand(64, 1, 1, 24)
    scores = reference.apply_rope(query, cos, sin)[:, 0, 0] @ reference.apply_rope(key, cos, sin)[:, 0, 0].T
    scores = scores.view(4, 4, 4, 4, 4, 4)
    torch.testing.assert_close(scores[0, 0, 0, 1, 2, 1], scores[1, 1, 2, 2, 3, 3])
    assert abs(scores[0, 0, 0, 1, 2, 1] - scores[0, 0, 0, 2, 1, 1]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("grid", "batch", "heads", "head_dim"),
    [((1, 1, 1), 1, 1, 2), ((3, 5, 7), 3, 2, 24), ((2, 3, 1), 2, 1, 32), ((1, 9, 3), 1, 3, 128)],
)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_output_and_gradient(name, grid, batch, heads, head_dim, dtype, assert_near):
    tables = rope_tables(grid, head_dim)
    x = draw((tables[0].shape[0], batch, heads, head_dim), dtype)
    weights = draw(x.shape, dtype, seed=1)
    results = []
    for function, value in ((IMPLEMENTATIONS[name], x), (reference.apply_rope, x.double())):
        value = value.clone().requires_grad_()
        output = function(value, *tables)
        results.append((output, *torch.autograd.grad((output * weights.to(value.dtype)).sum(), value)))
    for ours, wanted in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert_near(ours, wanted)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_strided_view_and_shard_of_the_tables(name, assert_near):
    fused = draw((12, 2, 3, 3, 8), torch.float32)  # S B h (q, k, v) D
    cos, sin = rope_tables((2, 2, 3), 8)
    query = fused[:, :, :, 0]
    expected = reference.apply_rope(query.double(), cos.double(), sin.double())
    assert_near(IMPLEMENTATIONS[name](query, cos, sin), expected)
    assert_near(IMPLEMENTATIONS[name](query[6:], cos[6:], sin[6:]), expected[6:])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_gradcheck(name):
    tables = rope_tables((1, 2, 3), 8, dtype=torch.float64)
    x = draw((6, 2, 1, 8)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: IMPLEMENTATIONS[name](x, *tables), (x,))


def test_bad_tables_are_refused():
    with pytest.raises(ValueError, match=str(MAX_POSITIONS)):
        rope_tables((1, MAX_POSITIONS + 1, 1), 24)
    rope_tables((MAX_POSITIONS, 1, 1), 24)
    with pytest.raises(ValueError, match="head_dim is 7"):
        rope_tables((1, 1, 1), 7)
    with pytest.raises(ValueError, match="at least one position"):
        rope_tables((1, 0, 1), 24)
    with pytest.raises(ValueError, match="tables"):
        IMPLEMENTATIONS["torch"](draw((6, 1, 1, 8)), *rope_tables((1, 1, 5), 8))
