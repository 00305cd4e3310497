"""Decoding: exactly the asked frames, and a named reason for every kind of broken file."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from helpers.tiny_models import frame_number, make_video

from megatron_flashi2v.data.video import Video, VideoError

HEIGHT, WIDTH = 48, 64


def numbers_of(frames_TCHW: torch.Tensor) -> list[int]:
    return [frame_number(frame.permute(1, 2, 0).numpy()) for frame in frames_TCHW]


def reason_of(path: Path, indices: tuple[int, ...] = (0,)) -> str:
    with pytest.raises(VideoError) as caught, Video(path) as video:
        video.read(indices)
    assert str(path) in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mp4", {}),
        ("b.mkv", {"gop": 40}),
        ("c.avi", {}),
        ("d.ts", {"codec": "mpeg2video"}),
        ("e.mkv", {"codec": "ffv1"}),
        ("variable.mkv", {"gaps": (3, 7, 8, 20)}),
        ("f.mp4", {"codec": "libx264"}),
    ],
)
def test_frames_are_numbered_exactly(tmp_path: Path, name: str, options: dict[str, object]) -> None:
    if options.get("codec") == "libx264" and "libx264" not in av.codecs_available:
        pytest.skip("this build of FFmpeg cannot write H.264")
    path = make_video(tmp_path / name, 40, HEIGHT, WIDTH, **options)
    with Video(path) as video:
        assert (video.facts.height, video.facts.width, video.facts.num_frames) == (HEIGHT, WIDTH, 40)
        for indices in ([0, 1, 2], [13, 15, 29], [39], [5, 5, 6], list(range(0, 40, 7))):
            frames_TCHW = video.read(indices)
            assert frames_TCHW.dtype == torch.uint8 and frames_TCHW.shape == (len(indices), 3, HEIGHT, WIDTH)
            assert numbers_of(frames_TCHW) == indices


def test_rate(tmp_path: Path) -> None:
    with Video(make_video(tmp_path / "a.mp4", 10, HEIGHT, WIDTH, fps=25)) as video:
        assert video.facts.fps == 25.0


def test_odd_sizes(tmp_path: Path) -> None:
    with Video(make_video(tmp_path / "a.mkv", 6, 49, 63, codec="ffv1")) as video:
        frames_TCHW = video.read([0, 5])
    assert frames_TCHW.shape == (2, 3, 49, 63)
    assert numbers_of(frames_TCHW) == [0, 5]


@pytest.mark.parametrize(("rotation", "corner"), [(90, (-1, 0)), (180, (-1, -1)), (270, (0, -1))])
def test_rotation(tmp_path: Path, rotation: int, corner: tuple[int, int]) -> None:
    path = make_video(tmp_path / "a.mp4", 4, HEIGHT, WIDTH, rotation=rotation)
    with Video(path) as video:
        turned = rotation != 180
        assert (video.facts.height, video.facts.width) == ((WIDTH, HEIGHT) if turned else (HEIGHT, WIDTH))
        frame_CHW = video.read([2])[0]
    corners = {(y, x): int(frame_CHW[0, y, x]) for y in (0, -1) for x in (0, -1)}
    # The coded picture's top left corner is red; counter-clockwise turns carry it down, across and up.
    assert max(corners, key=lambda place: corners[place]) == corner


def test_crop(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 4, HEIGHT, WIDTH)
    with Video(path) as video:
        whole_TCHW = video.read([0, 1])
        assert torch.equal(video.read([0, 1], crop=(8, 40, 4, 20)), whole_TCHW[:, :, 4:20, 8:40])
        with pytest.raises(VideoError, match="crop") as caught:
            video.read([0], crop=(0, WIDTH + 1, 0, 8))
    assert caught.value.reason == "bad_crop"


def test_frames_past_the_end_are_missed(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 10, HEIGHT, WIDTH)
    assert reason_of(path, (8, 9, 10)) == "truncated"


def test_a_truncated_file_gives_what_it_has(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "whole.mkv", 40, HEIGHT, WIDTH).read_bytes()
    path = tmp_path / "cut.mkv"
    path.write_bytes(whole[: len(whole) // 2])
    with Video(path) as video:
        assert 2 < video.facts.num_frames < 40
        last = video.facts.num_frames - 1
        assert numbers_of(video.read([0, last])) == [0, last]
    assert reason_of(path, (0, 39)) == "truncated"


def test_broken_files_have_reasons(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "whole.mp4", 10, HEIGHT, WIDTH).read_bytes()
    files = {"empty.mp4": b"", "text.mp4": b"hello world\n" * 40, "half.mp4": whole[: len(whole) // 2]}
    # Playlists in disguise: they must not make the decoder open other files.
    files["playlist.mp4"] = b"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nwhole.mp4\n#EXT-X-ENDLIST\n"
    files["list.mp4"] = b"ffconcat version 1.0\nfile whole.mp4\n"
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert reason_of(tmp_path / name) == "unreadable", name
    assert reason_of(tmp_path / "absent.mp4") == "missing_file"
    assert reason_of(tmp_path) == "missing_file"
    for address in ("https://host/a.mp4", "s3://bucket/a.mp4"):  # joined to the annotations' folder
        with pytest.raises(VideoError, match="is an address, and nothing is fetched; download the file"):
            Video(tmp_path / address)


def test_damage_in_the_middle_is_contained(tmp_path: Path) -> None:
    data = bytearray(make_video(tmp_path / "a.mkv", 40, HEIGHT, WIDTH, gop=10).read_bytes())
    generator = np.random.default_rng(0)
    for trial in range(8):
        broken = bytearray(data)
        for place in generator.integers(200, len(data), 40):
            broken[place] ^= 0xFF
        path = tmp_path / f"broken{trial}.mkv"
        path.write_bytes(broken)
        try:
            with Video(path) as video:
                video.read(range(video.facts.num_frames))
        except VideoError as error:
            assert error.reason  # a named reason is as good as frames; anything else is a crash


def test_audio_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "audio.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        for number in range(5):
            samples = np.zeros((1, 1024), dtype=np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert reason_of(path) == "no_video_stream"


def test_huge_pictures_are_not_believed(tmp_path: Path) -> None:
    data = make_video(tmp_path / "a.avi", 4, HEIGHT, WIDTH, codec="rawvideo").read_bytes()
    size = WIDTH.to_bytes(4, "little") + HEIGHT.to_bytes(4, "little")
    assert size in data
    path = tmp_path / "huge.avi"
    path.write_bytes(data.replace(size, (10_000).to_bytes(4, "little") * 2))
    assert reason_of(path) == "too_large"


def test_huge_counts_are_not_believed(tmp_path: Path) -> None:
    data = bytearray(make_video(tmp_path / "a.mp4", 12, HEIGHT, WIDTH).read_bytes())
    place = data.index(b"stsz") + 12  # version and flags, one size for all, then the number of frames
    assert int.from_bytes(data[place : place + 4], "big") == 12
    data[place : place + 4] = (2**31 - 2).to_bytes(4, "big")
    path = tmp_path / "huge.mp4"
    path.write_bytes(data)
    try:
        with Video(path) as video:
            assert video.facts.num_frames <= 12
            video.read([0])
    except VideoError as error:
        assert error.reason in ("unreadable", "no_frames", "no_fps", "undecodable")


@pytest.mark.parametrize("chosen", [0, 1])
def test_of_two_streams_of_one_size_the_default_one_is_taken(tmp_path: Path, chosen: int) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        for number in range(2):
            stream = container.add_stream("ffv1", rate=10)
            stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv444p"
            stream.disposition = Disposition.default if number == chosen else Disposition(0)
        for number, level in ((0, 50), (1, 200)):
            stream = container.streams.video[number]
            pixels = np.full((24, 32, 3), level, np.uint8)
            for pts in range(3):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv444p")
                frame.pts = pts
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    with Video(tmp_path / "a.mkv") as video:
        assert abs(int(video.read([0])[0, 0, 0, 0]) - (50, 200)[chosen]) <= 2
