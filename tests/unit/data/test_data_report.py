"""The report's page: whole without samples, and without anything from outside that a browser would run."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_flashi2v.data.report import (
    MAX_BINS,
    MIN_BINS,
    Facts,
    Picture,
    SheetFrame,
    _figure,
    histogram_edges,
    render,
)

EVIL = "<script>alert(1)</script>\" onload=\"alert(2)"


def test_text_from_outside_is_escaped() -> None:
    picture = Picture(alt=EVIL, data=b"\x89PNG")
    page = render(
        counts=[("annotations", 3, EVIL, EVIL)], settings=[("text", EVIL)], histograms=picture,
        sheet=[SheetFrame(picture=picture, caption=EVIL), SheetFrame(picture=None, caption=EVIL)],
    )
    assert page.count("alert(1)") == 7
    assert "<script" not in page and "\" onload" not in page
    assert page.count("data:image/png;base64,iVBORw==") == 2


def test_a_data_set_without_samples_has_counts_alone() -> None:
    page = render(counts=[("annotations", 3, "", ""), ("dropped: no_cap", 3, "no caption", "a & b")])
    assert "<td>dropped: no_cap</td><td>3</td><td>no caption</td><td>a &amp; b</td>" in page
    assert "<h2>" not in page and "<img" not in page


@pytest.mark.parametrize("values", [
    [7] * 9, [7, 8], [3, 500], list(range(90)), [2.4] * 5, [0.0] * 3, [2.4, 3.1, 2.4], [n / 7 for n in range(100)],
])  # fmt: skip
def test_histograms_have_bins_enough_of_one_width_and_lose_nothing(values: list[float]) -> None:
    edges = histogram_edges(values)
    counts, _ = np.histogram(values, edges)
    assert counts.sum() == len(values)
    assert MIN_BINS <= len(counts) <= MAX_BINS
    assert np.allclose(np.diff(edges), edges[1] - edges[0])
    if all(isinstance(value, int) for value in values):
        assert all(edge % 1 == 0.5 for edge in edges)  # no number is on an edge


def test_labels_of_bars_stay_inside_their_frame() -> None:
    facts = Facts(seconds=[2.4] * 3, sizes=["640 x 360"] * 3, words=[7] * 3, text_rows=[12] * 3)
    figure = _figure(facts, {"kept": 123_456_789, "dropped": {"missing_file": {"count": 17}}})
    figure.draw_without_rendering()
    for axes in figure.axes[3:5]:
        frame = axes.get_window_extent()
        assert len(axes.texts) and all(text.get_window_extent().x1 < frame.x1 for text in axes.texts)
