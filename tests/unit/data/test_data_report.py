"""The report's page: whole without samples, and without anything from outside that a browser would run."""

from __future__ import annotations

from megatron_flashi2v.data.report import Picture, SheetFrame, render

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
