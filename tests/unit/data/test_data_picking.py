"""Frames by presentation time: each near its wanted time, whatever rate the header claims."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.odd_videos import write_video
from helpers.tiny_models import frame_number, frame_pattern

from megatron_flashi2v.config.clips import ClipSettings, FilterSettings
from megatron_flashi2v.data.annotations import Entry, parse_entry
from megatron_flashi2v.data.clips import Frames, load_frames
from megatron_flashi2v.data.frames import choose_by_time, nearest
from megatron_flashi2v.data.picking import pick_frames
from megatron_flashi2v.data.reasons import Drop
from megatron_flashi2v.data.timestamps import is_regular, mean_rate, typical_rate
from megatron_flashi2v.data.video import Video

WANTED = FilterSettings(
    num_frames=9, height=32, width=48, fps=10.0, min_pixels=0, too_long_factor=50.0, min_aspect=0.2, max_aspect=5.0
)
MILLISECOND = Fraction(1, 1000)


def patterns(count: int) -> list[np.ndarray]:
    return [frame_pattern(number, 48, 64) for number in range(count)]


def entry_of(path: Path, **fields: Any) -> Entry:
    entry = parse_entry({"path": path.name, "cap": "a dog", **fields}, root=path.parent, index=0, source="entry 0")
    assert isinstance(entry, Entry), entry
    return entry


def load(path: Path, seed: int = 0, wanted: FilterSettings = WANTED, **changes: Any) -> Frames | Drop:
    fields = {key: value for key, value in changes.items() if key in ("fps", "cut", "num_frames", "crop")}
    settings = {key: value for key, value in changes.items() if key not in fields}
    if "rate" in settings:
        settings["fps"] = settings.pop("rate")
    return load_frames(entry_of(path, **fields), ClipSettings(wanted=dataclasses.replace(wanted, **settings)), seed)


def seconds(path: Path, stamps: Sequence[int], time_base: Fraction, **changes: Any) -> np.ndarray:
    """When the frames of a sample are shown, from the numbers that their pictures show."""
    found = load(path, **changes)
    assert isinstance(found, Frames), found
    shown = [frame_number(frame.permute(1, 2, 0).numpy()) for frame in found.frames_TCHW]
    assert shown == [index % 56 for index in found.indices]
    return np.array([stamps[index] * float(time_base) for index in found.indices])


def distance(times_s: np.ndarray, fps: float) -> float:
    """How far the worst frame is from its wanted time, seconds."""
    return float(np.abs(times_s - times_s[0] - np.arange(len(times_s)) / fps).max())


CHANGING = [100 * n for n in range(20)] + [2000 + round(1000 * n / 30) for n in range(60)]


@pytest.mark.parametrize(("name", "codec", "pix_fmt"), [("a.mkv", "ffv1", "yuv444p"), ("a.mp4", "libx264", "yuv420p")])
def test_a_rate_that_changes(tmp_path: Path, name: str, codec: str, pix_fmt: str) -> None:
    """20 frames at 10 fps and then 60 at 30, asked at 10 fps: steps of 0.1 s throughout."""
    path = write_video(tmp_path / name, patterns(80), codec=codec, pix_fmt=pix_fmt, rate=30, stamps=CHANGING,
                       time_base=MILLISECOND)  # fmt: skip
    places = set()
    for seed in range(12):
        times_s = seconds(path, CHANGING, MILLISECOND, seed=seed)
        assert np.abs(np.diff(times_s) - 0.1).max() < 0.003
        places.add(times_s[0] < 2 < times_s[-1])
    assert places == {True, False}  # windows on either side of the change, and across it
    times_s = seconds(path, CHANGING, MILLISECOND, cut=[0, 20])
    assert np.abs(np.diff(times_s) - 0.1).max() < 0.003


@pytest.mark.parametrize("ending", ["mkv", "webm", "avi"])
def test_a_header_that_claims_1000_fps(tmp_path: Path, ending: str) -> None:
    codec, pix_fmt = ("libvpx-vp9", "yuv420p") if ending == "webm" else ("ffv1", "yuv444p")
    stamps = [40 * n for n in range(50)]
    path = write_video(tmp_path / f"a.{ending}", patterns(50), codec=codec, pix_fmt=pix_fmt, rate=1000, stamps=stamps,
                       time_base=MILLISECOND)  # fmt: skip
    with Video(path) as video:
        assert video.facts.fps == 25.0
    assert distance(seconds(path, stamps, MILLISECOND, rate=12.5), 12.5) < 0.003
    assert distance(seconds(path, stamps, MILLISECOND, fps=25), 10.0) <= 0.02 + 1e-6
    assert isinstance(load(path, fps=1000), Frames)  # read from the header by an annotator
    assert load(path, frame_picking="index").reason == "too_short"  # type: ignore[union-attr]


@pytest.mark.parametrize(("ending", "fps"), [("mkv", 30), ("mp4", 30), ("mp4", 29.6)])
def test_missing_frames(tmp_path: Path, ending: str, fps: float) -> None:
    """296 of 300 frames are there: 30 fps, as annotated; what is missing shifts nothing."""
    codec, pix_fmt = ("ffv1", "yuv444p") if ending == "mkv" else ("libx264", "yuv420p")
    stamps = [n for n in range(300) if n not in (40, 41, 150, 220)]
    path = write_video(tmp_path / f"a.{ending}", patterns(296), codec=codec, pix_fmt=pix_fmt, rate=30, stamps=stamps,
                       time_base=Fraction(1, 30))  # fmt: skip
    for rate, cut, largest in ((12.0, [30, 70], 3), (30.0, [36, 50], 3), (15.0, [140, 170], 2), (10.0, [41, 140], 1)):
        times_s = seconds(path, stamps, Fraction(1, 30), fps=fps, rate=rate, cut=cut)
        assert distance(times_s, rate) <= largest / 2 / 30 + 1e-6  # half a source frame, or half a hole
    assert load(path, fps=25).reason == "fps_mismatch"  # type: ignore[union-attr]


def test_jitter_neither_repeats_nor_skips_frames(tmp_path: Path) -> None:
    """Phones stamp frames when they come; at their own rate and at half of it, each or every other is taken."""
    jitter = np.random.default_rng(0).integers(-7, 8, 80)
    stamps = [max(0, round(1000 * n / 30) + int(jitter[n])) for n in range(80)]
    path = write_video(tmp_path / "a.mkv", patterns(80), rate=30, stamps=stamps, time_base=MILLISECOND)
    for rate, step in ((30.0, 1), (15.0, 2), (10.0, 3)):
        for seed in range(6):
            found = load(path, seed=seed, rate=rate)
            assert isinstance(found, Frames) and set(np.diff(found.indices)) == {step}, found


def test_still_stretches_of_screen_recordings(tmp_path: Path) -> None:
    """Frames that come only when something changes: the one nearest in time is shown as long as it lasts."""
    stamps = [0, 100, 200, 900, 1000, 1100, 1200, 1300, 1400, 1500, 1600, 1700]
    path = write_video(tmp_path / "a.mkv", patterns(12), rate=30, stamps=stamps, time_base=MILLISECOND)
    for seed in range(4):
        found = load(path, seed, cut=[0, 7])
        assert isinstance(found, Frames)
        times_s = np.array(stamps) / 1000
        wanted_s = times_s[found.indices[0]] + np.arange(9) / 10
        assert np.abs(times_s[list(found.indices)] - wanted_s).max() <= 0.35 + 1e-6  # half of the stillness
        assert found.indices.count(2) >= 3


@pytest.mark.parametrize("offset", [-5, -1, 1000])
@pytest.mark.parametrize(("name", "codec", "pix_fmt"), [
    ("a.mkv", "ffv1", "yuv444p"), ("a.mp4", "libx264", "yuv420p"), ("a.mov", "prores_ks", "yuv422p10le"),
    ("a.ts", "libx264", "yuv420p"),
])  # fmt: skip
def test_first_times_other_than_zero(tmp_path: Path, offset: int, name: str, codec: str, pix_fmt: str) -> None:
    """Offsets, and edit lists: MP4 hides what comes before 0, as players do."""
    path = write_video(tmp_path / name, patterns(40), codec=codec, pix_fmt=pix_fmt, rate=20,
                       stamps=[n + offset for n in range(40)],
                       container_options={"avoid_negative_ts": "disabled"})  # fmt: skip
    hidden = -offset if offset < 0 and name[-2:] in ("p4", "ov") else 0
    with Video(path) as video:
        assert video.facts.num_frames == 40 - hidden and video.facts.fps == 20.0 and video.times_s[0] == 0.0
        shown = [frame_number(frame.permute(1, 2, 0).numpy()) for frame in video.read(range(video.facts.num_frames))]
        assert shown == list(range(hidden, 40))
    found = load(path)
    assert isinstance(found, Frames) and set(np.diff(found.indices)) == {2}


@pytest.mark.parametrize(("name", "codec", "options"), [
    ("stream.h264", "libx264", {}), ("stream.m2v", "mpeg2video", {"b": "4M"}),
    ("reordered.avi", "libx264", {"bf": "3"}), ("plain.avi", "libx264", {"bf": "0"}),
])  # fmt: skip
def test_files_without_times_of_presentation(tmp_path: Path, name: str, codec: str, options: dict[str, str]) -> None:
    """Raw streams have none, AVI those of decoding: frames are counted in the order in which they are shown."""
    path = write_video(tmp_path / name, patterns(40), codec=codec, pix_fmt="yuv420p", rate=20, options=options)
    with Video(path) as video:
        assert video.facts.num_frames == 40 and video.facts.fps == 20.0
        shown = [frame_number(frame.permute(1, 2, 0).numpy()) for frame in video.read(range(40))]
        assert shown == list(range(40))
    found = load(path)
    assert isinstance(found, Frames) and set(np.diff(found.indices)) == {2}


def test_recordings_joined_byte_by_byte(tmp_path: Path) -> None:
    """Time begins anew in the middle: the second part is not sorted into the first one."""
    parts = []
    for first, offset in ((0, 50), (20, 7)):
        frames = [frame_pattern(number, 48, 64) for number in range(first, first + 20)]
        path = write_video(tmp_path / f"{first}.ts", frames, codec="libx264", pix_fmt="yuv420p", rate=20,
                           stamps=[offset + 2 * n for n in range(20)], time_base=Fraction(1, 40))  # fmt: skip
        parts.append(path.read_bytes())
    (tmp_path / "a.ts").write_bytes(b"".join(parts))
    with Video(tmp_path / "a.ts") as video:
        assert video.facts.num_frames == 40
        shown = [frame_number(frame.permute(1, 2, 0).numpy()) for frame in video.read(range(40))]
    assert shown == list(range(40))


@pytest.mark.parametrize("file_fps", [Fraction(30000, 1001), Fraction(24000, 1001), 24, 25, 30, 50, 60])
@pytest.mark.parametrize("ending", ["mkv", "mp4"])
def test_constant_rates_give_the_same_frames_either_way(tmp_path: Path, file_fps: Any, ending: str) -> None:
    codec, pix_fmt = ("ffv1", "yuv444p") if ending == "mkv" else ("libx264", "yuv420p")
    path = write_video(tmp_path / f"a.{ending}", patterns(90), codec=codec, pix_fmt=pix_fmt, rate=file_fps)
    with Video(path) as by_time, Video(path, frame_picking="index", picture="stored") as by_index:
        for rate, cut, start in itertools.product(
            (7.5, 10.0, 12.0, 16.0, 23.976, 24.0, float(file_fps)), (None, [0, 90], [3, 70], [11, 41]), range(3)
        ):
            clip, wanted = entry_of(path, cut=cut), dataclasses.replace(WANTED, fps=rate)
            found = pick_frames(clip, wanted, by_time, lambda n, k=start: k % n)
            wanted = dataclasses.replace(wanted, frame_picking="index")
            same = pick_frames(clip, wanted, by_index, lambda n, k=start: k % n)
            if isinstance(same, Drop) and same.reason == "fps_too_low" and not isinstance(found, Drop):
                assert rate / float(file_fps) < 1.02  # 24 from 23.976, say, is no reason to refuse a file
                continue
            assert type(found) is type(same) and (isinstance(same, Drop) or found == same), (rate, cut, found, same)


def test_durations_are_of_time(tmp_path: Path) -> None:
    """A slow first half does not make a clip too long or too short by its number of frames."""
    path = write_video(tmp_path / "a.mkv", patterns(80), rate=30, stamps=CHANGING, time_base=MILLISECOND)
    assert isinstance(load(path, too_long_factor=4.5), Frames)  # 4 s, and 0.9 s for a sample
    assert load(path, too_long_factor=4.0).reason == "too_long"  # type: ignore[union-attr]
    assert isinstance(load(path, num_frames=9, cut=[0, 9]), Frames)  # 0.8 s from the first frame to the last
    assert load(path, cut=[20, 42]).reason == "too_short"  # type: ignore[union-attr]
    assert load(path, cut=[0, 20], rate=16.0).reason == "fps_too_low"  # type: ignore[union-attr]


@pytest.mark.parametrize(("annotated", "kept"), [(119.88, True), (120, True), (118, True), (100, False), (60, False)])
def test_annotated_rates_are_compared_by_their_ratio(tmp_path: Path, annotated: float, kept: bool) -> None:
    path = write_video(tmp_path / "a.mp4", patterns(60), codec="libx264", pix_fmt="yuv420p", rate=120)
    found = load(path, fps=annotated, rate=30.0)
    assert isinstance(found, Frames) if kept else found.reason == "fps_mismatch"  # type: ignore[union-attr]


def test_nearest_frames() -> None:
    times_s = np.array([0.0, 1.0, 3.0])
    wanted_s = np.array([-1.0, 0.4, 0.5, 0.6, 1.9, 2.0, 2.1, 9.0])
    assert nearest(times_s, wanted_s).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    brute = np.abs(times_s[None] - wanted_s[:, None]).argmin(axis=1)
    assert nearest(times_s, wanted_s).tolist() == brute.tolist()
    assert nearest(np.array([2.0]), wanted_s).tolist() == [0] * 8


def test_windows_by_time_may_start_anywhere_that_fits() -> None:
    times_s = np.cumsum([0, 0.1, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    counts: list[int] = []
    starts = {choose_by_time(times_s, 4, 10.0, lambda n, k=k: counts.append(n) or k, "corrected")[0] for k in range(8)}
    assert starts == {0, 1, 2, 3, 4, 5} and set(counts) == {8}  # twice the frame before the hole
    choose_by_time(times_s, 4, 10.0, lambda n: counts.append(n) or 0, "reference")
    assert counts[-1] == 7  # the reference leaves the last start out
    assert not len(choose_by_time(times_s, 13, 10.0, lambda n: 0, "corrected"))
    assert not len(choose_by_time(times_s[:0], 1, 10.0, lambda n: 0, "corrected"))


def test_rates_of_time_stamps() -> None:
    even_s, broken_s = np.arange(30) / 30, np.delete(np.arange(30) / 30, [10, 11])
    assert is_regular(even_s, 30.0) and not is_regular(broken_s, 30.0) and not is_regular(even_s, 25.0)
    assert is_regular(np.round(even_s, 3), 30.0) and not is_regular(even_s, None)
    assert mean_rate(even_s, 30.0) == 30.0 and mean_rate(even_s, 1000.0) == pytest.approx(30.0)
    assert mean_rate(broken_s, None) == pytest.approx(27 / (29 / 30)) and mean_rate(even_s[:1], 24.0) == 24.0
    assert typical_rate(broken_s) == pytest.approx(30.0) and typical_rate(even_s[:1]) is None
