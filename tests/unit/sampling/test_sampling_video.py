"""mp4 round trips and the layout of strips."""

import av
import numpy as np
import pytest
from PIL import Image

from megatron_flashi2v.sampling import video
from megatron_flashi2v.sampling.video import StripRow, choose_frames, write_comparison, write_mp4


def smooth_frames(num_frames=9, height=64, width=96):
    """Slowly moving colour waves, uint8 [T, H, W, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    frames = [
        np.stack(
            [
                128 + 100 * np.sin(x / 20 + t / 5),
                128 + 100 * np.cos(y / 15 + t / 7),
                128 + 90 * np.sin((x + y) / 30),
            ],
            axis=-1,
        )
        for t in range(num_frames)
    ]
    return np.stack(frames).clip(0, 255).astype(np.uint8)


def decode(path):
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), rate


def psnr(first, second):
    return 10 * np.log10(255**2 / np.mean((first.astype(float) - second.astype(float)) ** 2))


@pytest.mark.parametrize("encoder", video.ENCODERS)
def test_round_trip_keeps_frames_rate_and_pixels(encoder, tmp_path, monkeypatch):
    if encoder not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {encoder}")
    monkeypatch.setattr(video, "ENCODERS", (encoder,))
    frames = smooth_frames()
    write_mp4(tmp_path / "new" / "a.mp4", frames, 16)
    decoded, rate = decode(tmp_path / "new" / "a.mp4")
    assert decoded.shape == frames.shape and rate == 16
    assert psnr(decoded, frames) > 35


def test_flat_colours_survive_the_colour_matrix(tmp_path):
    """A matrix mix-up (BT.601 written, BT.709 declared) shifts saturated colours by ten levels and more."""
    frames = np.empty((2, 64, 64, 3), np.uint8)
    frames[:] = (230, 30, 60)
    write_mp4(tmp_path / "a.mp4", frames, 8)
    decoded, _ = decode(tmp_path / "a.mp4")
    assert np.abs(decoded.astype(int) - frames).max() <= 4


def test_odd_sides_are_lengthened_by_one(tmp_path):
    frames = smooth_frames(height=63, width=95)
    write_mp4(tmp_path / "a.mp4", frames, 23.976)
    decoded, rate = decode(tmp_path / "a.mp4")
    assert decoded.shape == (9, 64, 96, 3)
    assert float(rate) == pytest.approx(23.976, abs=1e-3)
    assert psnr(decoded[:, :63, :95], frames) > 35


def test_a_small_sample_is_enlarged_pixel_by_pixel(tmp_path):
    frames = smooth_frames(height=48, width=80)
    write_mp4(tmp_path / "a.mp4", frames, 12, enlarge=4)
    decoded, _ = decode(tmp_path / "a.mp4")
    assert decoded.shape == (9, 192, 320, 3)
    assert psnr(decoded[:, 1::4, 2::4], frames) > 35


def test_nothing_is_left_when_encoding_fails(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(video, "_encode", fail)
    with pytest.raises(OSError, match="no space"):
        write_mp4(tmp_path / "a.mp4", smooth_frames(), 16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "frames",
    [np.zeros((2, 4, 4, 3), np.float32), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)],
)
def test_malformed_frames_are_refused(frames, tmp_path):
    with pytest.raises(ValueError, match="uint8"):
        write_mp4(tmp_path / "a.mp4", frames, 16)
    with pytest.raises(ValueError, match="uint8"):
        write_comparison(tmp_path / "a.png", [StripRow(frames_THWC=frames)])


def test_fps_must_be_above_zero(tmp_path):
    with pytest.raises(ValueError, match="fps is 0"):
        write_mp4(tmp_path / "a.mp4", smooth_frames(), 0)


@pytest.mark.parametrize(
    ("num_frames", "columns", "expected"),
    [(9, 3, [0, 4, 8]), (2, 8, [0, 1]), (1, 8, [0]), (49, 1, [0]), (9, 9, list(range(9)))],
)
def test_chosen_frames_are_spread_from_first_to_last(num_frames, columns, expected):
    assert choose_frames(num_frames, columns) == expected


def test_strip_shows_the_chosen_frames_pixel_by_pixel(tmp_path):
    frames = smooth_frames(num_frames=5)
    write_comparison(tmp_path / "a.png", [StripRow(frames_THWC=frames)], columns=3)
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    factor = 2  # 64 rows are enlarged to at least 128
    tile = video.MARGIN + 96 * factor
    top = video.LABEL_HEIGHT + video.MARGIN
    for column, index in enumerate((0, 2, 4)):
        left = video.MARGIN + column * tile
        shown = picture[top : top + 64 * factor : factor, left : left + 96 * factor : factor]
        assert np.array_equal(shown, frames[index])


def test_large_frames_are_not_enlarged(tmp_path):
    frames = np.zeros((1, 200, 100, 3), np.uint8)
    write_comparison(tmp_path / "a.png", [StripRow(frames_THWC=frames)])
    assert Image.open(tmp_path / "a.png").size == (
        100 + 2 * video.MARGIN,
        200 + video.LABEL_HEIGHT + 2 * video.MARGIN,
    )


def test_comparison_stacks_rows_of_different_sizes_under_labels(tmp_path):
    source, sample = smooth_frames(num_frames=1), smooth_frames(num_frames=4, height=128, width=64)
    write_comparison(
        tmp_path / "a.png",
        [StripRow(frames_THWC=source, label="source"), StripRow(frames_THWC=sample, label="sample")],
    )
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    row = 2 * video.LABEL_HEIGHT + 128 + 2 * video.MARGIN
    assert picture.shape == (2 * row, video.MARGIN + 4 * (64 + video.MARGIN), 3)
    assert picture[: video.LABEL_HEIGHT].min() < 128  # the label's ink
    below = row + 2 * video.LABEL_HEIGHT + video.MARGIN
    assert np.array_equal(picture[below : below + 128, video.MARGIN : video.MARGIN + 64], sample[0])


def test_captions_must_match_the_frames_shown(tmp_path):
    with pytest.raises(ValueError, match="2 captions for 4 frames"):
        write_comparison(tmp_path / "a.png", [StripRow(frames_THWC=smooth_frames(), captions=["a", "b"])], columns=4)
