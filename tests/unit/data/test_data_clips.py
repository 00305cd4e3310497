"""From an annotation and a real file to pixels, or to a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import frame_number, make_video

from megatron_flashi2v.config.clips import ClipSettings, FilterSettings
from megatron_flashi2v.data.annotations import Entry, parse_entry
from megatron_flashi2v.data.clips import Clip, choose_caption, load_frames
from megatron_flashi2v.data.reasons import Drop

WANTED = FilterSettings(num_frames=9, height=32, width=48, fps=8.0, min_pixels=32 * 48, too_long_factor=9.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    make_video(folder / "v.mkv", 60, 48, 64, fps=16)
    return folder


def entry(folder: Path, **fields: Any) -> Entry:
    parsed = parse_entry({"path": "v.mkv", "cap": "a dog", **fields}, root=folder, index=0, source="meta.json entry 0")
    assert isinstance(parsed, Entry), parsed
    return parsed


def load(folder: Path, settings: FilterSettings = WANTED, seed: int = 1, **fields: Any) -> Clip | Drop:
    found = load_frames(entry(folder, **fields), ClipSettings(wanted=settings), seed)
    return found if isinstance(found, Drop) else found.clip()


def reason(folder: Path, **fields: Any) -> str:
    result = load(folder, **fields)
    assert isinstance(result, Drop)
    return result.reason


def test_pixels_and_indices(folder: Path) -> None:
    clip = load(folder, cut=[10, 40])
    assert isinstance(clip, Clip)
    assert clip.video_CTHW.shape == (3, 9, 32, 48) and clip.video_CTHW.dtype == torch.float32
    assert clip.video_CTHW.min() >= -1.0 and clip.video_CTHW.max() <= 1.0
    start = clip.indices[0]
    assert clip.indices == tuple(range(start, start + 18, 2)) and start >= 10 and clip.indices[-1] < 40
    shown = ((clip.video_CTHW + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    assert [frame_number(frame) for frame in shown] == list(clip.indices)


def test_windows_are_keyed_by_seed_and_sample(folder: Path) -> None:
    def start(seed: int, cut: list[int]) -> int:
        clip = load(folder, seed=seed, cut=cut)
        assert isinstance(clip, Clip)
        return clip.indices[0]

    assert [start(seed, [0, 60]) for seed in range(4)] == [start(seed, [0, 60]) for seed in range(4)]
    starts = {start(seed, [0, 22]) for seed in range(14)}
    assert starts == {0, 2, 4}  # the last one included
    assert len({start(1, [first, first + 40]) - first for first in range(4)}) > 1


def test_reasons(folder: Path) -> None:
    assert reason(folder, path="absent.mkv") == "missing_file"
    assert reason(folder, fps=25) == "fps_mismatch"
    assert reason(folder, cut=[0, 16]) == "too_short"
    assert reason(folder, cut=[50, 80], num_frames=30) == "truncated"
    assert reason(folder, num_frames=90, cut=[55, None]) == "truncated"
    assert reason(folder, crop=[0, 10, 0, 10]) == "res_too_small"
    assert reason(folder, crop=[0, 64, 0, 60]) == "bad_crop"


def test_facts_are_read_from_the_file(folder: Path) -> None:
    small = {"resolution": {"height": 480, "width": 640}}
    settings = FilterSettings(num_frames=9, height=32, width=48, fps=8.0, min_pixels=10_000)
    result = load(folder, settings=settings, **small)
    assert isinstance(result, Drop) and result.reason == "res_too_small" and "48 * 64" in result.detail
    large = FilterSettings(num_frames=5, height=32, width=48, min_pixels=9999)
    assert reason(folder, settings=large) == "res_too_small"
    too_long = FilterSettings(num_frames=5, height=32, width=48, fps=8.0, min_pixels=0)
    assert reason(folder, settings=too_long) == "too_long"


def test_captions(folder: Path) -> None:
    both = entry(folder, cap=["a dog", " ", "a brown dog"])
    drawn = {choose_caption(both, seed=seed) for seed in range(30)}
    assert drawn == {"a dog", "a brown dog"}
    assert choose_caption(both, seed=3) == choose_caption(both, seed=3)
