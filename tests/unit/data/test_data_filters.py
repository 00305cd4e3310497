"""The corrected rules, where they differ from the reference's (which the golden tests hold)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_flashi2v.config.clips import FilterSettings
from megatron_flashi2v.data.annotations import Entry, parse_entry
from megatron_flashi2v.data.filters import clip_length, judge, with_measured
from megatron_flashi2v.data.frames import choose_window, frame_indices, frame_interval

WANTED = FilterSettings(num_frames=9, height=64, width=112, fps=16.0, min_pixels=64 * 112)
REFERENCE = FilterSettings(num_frames=9, height=64, width=112, fps=16.0, min_pixels=64 * 112, filter_rules="reference")
FULL = {"path": "v.mp4", "cap": "a dog", "resolution": {"height": 72, "width": 128}, "fps": 16, "num_frames": 20}


def entry(**fields: Any) -> Entry:
    parsed = parse_entry({**FULL, **fields}, root=".", index=0, source="meta.json entry 0")
    assert isinstance(parsed, Entry), parsed
    return parsed


def reason(settings: FilterSettings, **fields: Any) -> str | None:
    drop = judge(entry(**fields), settings)
    return None if drop is None else drop.reason


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, None),
        ({"cap": None}, "no_cap"),
        ({"cap": ["", "  "]}, "no_cap"),
        ({"resolution": {"height": 40, "width": 128}}, "aspect_mismatch"),
        ({"resolution": {"height": 60, "width": 112}}, "res_too_small"),
        ({"num_frames": 46}, "too_long"),
        ({"fps": 12}, "fps_too_low"),
        ({"fps": 15.95}, None),
        ({"num_frames": 8}, "too_short"),
        ({"fps": 32, "num_frames": 16}, "too_short"),
        ({"fps": 32, "num_frames": 17}, None),
    ],
)
def test_rules(fields: dict[str, Any], wanted: str | None) -> None:
    assert reason(WANTED, **fields) == wanted


@pytest.mark.parametrize("field", ["resolution", "fps", "num_frames"])
def test_unknown_facts_are_left_to_the_file(field: str) -> None:
    assert reason(WANTED, **{field: None}) is None


def test_reference_needs_resolution_and_length() -> None:
    assert reason(REFERENCE, resolution=None) == "no_resolution"
    assert reason(REFERENCE, num_frames=None) == "malformed_entry"


def test_exact_720p_passes_a_720p_floor() -> None:
    sizes = {"resolution": {"height": 720, "width": 1280}, "num_frames": 60}
    floor = {"min_pixels": 720 * 1280, "min_aspect": 0.4, "max_aspect": 1.2}
    assert reason(FilterSettings(**floor), **sizes) is None
    assert reason(FilterSettings(**floor, filter_rules="reference"), **sizes) == "res_too_small"


def test_motion_reasons_are_not_swapped() -> None:
    settings = FilterSettings(num_frames=9, height=64, width=112, min_pixels=0, min_motion=0.2, max_motion=0.8)
    assert reason(settings, motion=0.1) == "too_slow"
    assert reason(settings, motion=0.9) == "too_fast"
    assert reason(settings, motion=0.5) is None
    assert reason(settings) == "no_motion"
    assert reason(WANTED) is None


def test_cut_end_is_honoured() -> None:
    assert clip_length(entry(cut=[4, 14], num_frames=None), "corrected") == 10
    assert clip_length(entry(cut=[4, 14], num_frames=20), "corrected") == 10
    assert clip_length(entry(cut=[4, 40], num_frames=20), "corrected") == 20
    assert clip_length(entry(cut=[4, 14], num_frames=20), "reference") == 20
    assert reason(WANTED, cut=[4, 12]) == "too_short"
    assert reason(REFERENCE, cut=[4, 12]) is None


def test_crop_decides_the_size() -> None:
    assert reason(WANTED, crop=[0, 40, 0, 72]) == "res_too_small"
    assert reason(REFERENCE, crop=[0, 40, 0, 72]) is None


def test_measured_facts() -> None:
    facts = {"height": 90, "width": 160, "fps": 25.0, "num_frames": 30}
    bare = with_measured(entry(resolution=None, fps=None, num_frames=None, cut=[5, None]), WANTED, **facts)
    assert (bare.height, bare.width, bare.fps, bare.num_frames) == (90, 160, 25.0, 25)
    longer = with_measured(entry(num_frames=40), WANTED, **facts)
    assert (longer.height, longer.fps, longer.num_frames) == (90, 16.0, 30)
    beyond = with_measured(entry(cut=[50, 60]), WANTED, **facts)
    drop = judge(beyond, WANTED)
    assert drop is not None and drop.reason == "too_short"
    assert with_measured(entry(), REFERENCE, **facts) == entry()


def test_frame_indices_convert_the_rate() -> None:
    assert frame_interval(29.97, 30.0) == 1.0
    assert frame_interval(30.0, 16.0) == 1.875
    assert frame_indices(10, 8, 1.875).tolist() == [10, 11, 13, 15, 17]
    for interval in np.linspace(1.0, 4.0, 101):
        indices = frame_indices(3, 97, float(interval))
        assert indices[0] == 3 and indices[-1] < 100


def test_every_window_can_be_chosen() -> None:
    indices = frame_indices(0, 12, 1.0)
    starts = [int(choose_window(indices, 9, lambda n, k=k: k, "corrected")[0]) for k in range(4)]
    assert starts == [0, 1, 2, 3]
    counts: list[int] = []
    choose_window(indices, 9, lambda n: counts.append(n) or 0, "corrected")
    choose_window(indices, 9, lambda n: counts.append(n) or 0, "reference")
    choose_window(indices, 12, lambda n: counts.append(n) or 0, "reference")
    assert counts == [4, 3, 1]
    with pytest.raises(ValueError, match="13 frames"):
        choose_window(indices, 13, lambda n: 0, "corrected")
