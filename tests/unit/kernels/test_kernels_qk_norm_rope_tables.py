"""The rotary tables and the rotation's definition, against complex numbers."""

from __future__ import annotations

import cmath

import pytest
import torch

from flashi2v_kernels.qk_norm_rope.reference import apply_rope
from flashi2v_kernels.qk_norm_rope.tables import MAX_POSITIONS, axis_sizes, rope_tables


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
    turned = apply_rope(x, *rope_tables(grid, head_dim, dtype=torch.float64))
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
    scores = apply_rope(query, cos, sin)[:, 0, 0] @ apply_rope(key, cos, sin)[:, 0, 0].T
    scores = scores.view(4, 4, 4, 4, 4, 4)
    torch.testing.assert_close(scores[0, 0, 0, 1, 2, 1], scores[1, 1, 2, 2, 3, 3])
    assert abs(scores[0, 0, 0, 1, 2, 1] - scores[0, 0, 0, 2, 1, 1]) > 1e-3


def test_bad_tables_are_refused():
    with pytest.raises(ValueError, match=str(MAX_POSITIONS)):
        rope_tables((1, MAX_POSITIONS + 1, 1), 24)
    rope_tables((MAX_POSITIONS, 1, 1), 24)
    with pytest.raises(ValueError, match="head_dim is 7"):
        rope_tables((1, 1, 1), 7)
    with pytest.raises(ValueError, match="at least one position"):
        rope_tables((1, 0, 1), 24)
