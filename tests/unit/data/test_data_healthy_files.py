"""Healthy files are not refused: titles in other encodings, still pictures as samples of one frame."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.odd_videos import write_video
from helpers.tiny_models import frame_pattern
from PIL import Image

from megatron_flashi2v.config.clips import ClipSettings, FilterSettings
from megatron_flashi2v.data.annotations import Entry, parse_entry
from megatron_flashi2v.data.clips import Frames, load_frames
from megatron_flashi2v.data.filters import judge
from megatron_flashi2v.data.reasons import Drop
from megatron_flashi2v.data.transforms import resize_and_crop
from megatron_flashi2v.data.video import Video
from megatron_flashi2v.sampling.image import load_image

WANTED = FilterSettings(num_frames=1, height=32, width=48, min_pixels=0, min_aspect=0.2, max_aspect=5.0)
TITLE = "TITLE IN GBK"
GBK = "你好世界视频".encode("gbk")
assert len(GBK) == len(TITLE)


def entry_of(path: Path, **fields: Any) -> Entry:
    entry = parse_entry({"path": path.name, "cap": "a dog", **fields}, root=path.parent, index=0, source="entry 0")
    assert isinstance(entry, Entry), entry
    return entry


def load(path: Path, fields: dict[str, Any] | None = None, **changes: Any) -> Frames | Drop:
    settings = ClipSettings(wanted=dataclasses.replace(WANTED, **changes))
    return load_frames(entry_of(path, **(fields or {})), settings, 0)


def reason(path: Path, fields: dict[str, Any] | None = None, **changes: Any) -> str:
    found = load(path, fields, **changes)
    assert isinstance(found, Drop), found
    return found.reason


def picture(height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def video(path: Path, **options: Any) -> Path:
    codec = {".avi": "mpeg4", ".wmv": "msmpeg4", ".flv": "flv", ".ts": "mpeg2video"}.get(path.suffix, "libx264")
    frames = [frame_pattern(number, 48, 64) for number in range(40)]
    return write_video(path, frames, codec=codec, pix_fmt="yuv420p", rate=16, **options)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.avi", "a.flv", "a.nut"])
@pytest.mark.parametrize("bad", [GBK, b"\xff\xfe\x80\xc3\x28\xed\xa0\x80\xf8\x88\x80\x80"])
def test_titles_that_are_not_utf8(tmp_path: Path, name: str, bad: bytes) -> None:
    path = video(tmp_path / name, metadata={"title": TITLE, "comment": TITLE})
    data = path.read_bytes()
    assert TITLE.encode() in data
    path.write_bytes(data.replace(TITLE.encode(), bad))
    assert isinstance(load(path, num_frames=9), Frames)
    assert load_image(path).shape == (3, 48, 64)


def test_names_of_tracks_that_are_not_utf8(tmp_path: Path) -> None:
    """The same in the description of a stream, which is read by another way than the file's."""
    path = video(tmp_path / "a.mp4")
    data = path.read_bytes()
    assert b"VideoHandler" in data
    path.write_bytes(data.replace(b"VideoHandler", GBK))
    assert isinstance(load(path, num_frames=9), Frames)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "tif", "avif"])
def test_a_picture_is_a_sample_of_one_frame(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    Image.fromarray(picture()).save(path)
    found = load(path)
    assert isinstance(found, Frames) and found.indices == (0,)
    assert (found.facts.height, found.facts.width, found.facts.num_frames) == (40, 60, 1)
    wanted_1CHW = resize_and_crop(load_image(path)[None], 32, 48)
    assert torch.equal(found.frames_TCHW, wanted_1CHW)


def test_pictures_follow_the_rules_of_condition_images(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture()).convert("RGBA").save(tmp_path / "a.png", exif=exif)
    found = load(tmp_path / "a.png")
    assert isinstance(found, Frames) and (found.facts.height, found.facts.width) == (60, 40)
    Image.fromarray(np.linspace(0, 1, 2400, dtype=np.float32).reshape(40, 60)).save(tmp_path / "a.tif")
    found = load(tmp_path / "a.tif")
    assert isinstance(found, Frames) and found.frames_TCHW.min() < 40 and found.frames_TCHW.max() > 215


def test_crops_and_filters_of_pictures(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(picture()).save(path)
    found = load(path, {"crop": [10, 58, 4, 36], "fps": 25, "num_frames": 1, "cut": [0, 1]})
    assert isinstance(found, Frames)
    assert np.array_equal(found.frames_TCHW[0].permute(1, 2, 0).numpy(), picture()[4:36, 10:58])
    assert reason(path, {"crop": [10, 61, 4, 36]}) == "bad_crop"
    assert reason(path, min_pixels=2401) == "res_too_small"
    assert reason(path, min_aspect=0.7) == "aspect_mismatch"
    assert reason(path, {"cut": [3, 9]}) == "truncated"
    assert isinstance(load(path, {"num_frames": 1}, filter_rules="corrected", frame_picking="index"), Frames)


def test_a_picture_is_no_clip_of_many_frames(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    found = load(tmp_path / "a.png", num_frames=9)
    assert isinstance(found, Drop) and found.reason == "too_short" and not found.is_error
    assert "is a picture (PNG)" in found.detail and "--num-frames 1" in found.detail


def test_damaged_pictures_have_reasons(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    Image.fromarray(np.full((40, 60), -5.0, np.float32)).save(tmp_path / "a.tif")
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    assert reason(tmp_path / "half.png") == "unreadable"
    assert reason(tmp_path / "a.tif") == reason(tmp_path / "a.heic") == "unsupported_picture"
    assert reason(tmp_path / "absent.png") == "missing_file"


def test_videos_of_one_frame_are_samples_of_one_frame(tmp_path: Path) -> None:
    """Their rate plays no part."""
    path = write_video(tmp_path / "a.mp4", [picture(48, 64)], codec="libx264", pix_fmt="yuv420p", rate=1)
    assert isinstance(load(path, fps=16.0), Frames)
    slow = [frame_pattern(number, 48, 64) for number in range(5)]
    path = write_video(tmp_path / "slow.mp4", slow, codec="libx264", pix_fmt="yuv420p", rate=2)
    assert isinstance(load(path, fps=16.0, too_long_factor=50.0), Frames)
    annotated = entry_of(path, fps=2, num_frames=5)
    assert judge(annotated, dataclasses.replace(WANTED, too_long_factor=50.0)) is None


def test_moving_pictures_are_videos(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((48, 64, 3), 20 * number, np.uint8)) for number in range(12)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:], duration=100)
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    for name in ("a.png", "a.gif"):
        found = load(tmp_path / name, num_frames=5, fps=5.0, too_long_factor=9.0)
        assert isinstance(found, Frames) and set(np.diff(found.indices)) == {2}, name
        levels = found.frames_TCHW.float().mean(dim=(1, 2, 3)).round().int().tolist()
        assert levels == [20 * index for index in found.indices], name
        with Video(tmp_path / name) as opened:
            assert opened.facts.fps == 10.0
