"""Pictures as players show them: shape, mirrors, matrices, ranges, dynamic range, transparency and the right stream."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from helpers.odd_videos import (
    BT601,
    BT709,
    BT2020,
    FULL,
    HLG,
    ICTCP,
    LIMITED,
    P3,
    PQ,
    flat_yuv,
    write_video,
)

from megatron_flashi2v.data.rendering import UnsupportedPictureError, colours_of, to_rgb
from megatron_flashi2v.data.video import Video, VideoError

COLOURS = ((128, 128, 128), (230, 220, 30), (200, 30, 30), (20, 60, 220), (60, 60, 60), (0, 0, 0))
WEIGHTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}
# Linear BT.709 to linear BT.2020 (ITU-R BT.2087) and to P3-D65.
TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
TO_P3 = np.array([[0.8225, 0.1774, 0.0], [0.0332, 0.9669, 0.0], [0.0171, 0.0724, 0.9108]])
U = 2**16
ORIENTATIONS = {
    "as it is": ((U, 0, 0, U), lambda picture: picture),
    "mirrored": ((-U, 0, 0, U), lambda picture: picture[:, ::-1]),
    "upside down": ((U, 0, 0, -U), lambda picture: picture[::-1]),
    "turned by 180": ((-U, 0, 0, -U), lambda picture: picture[::-1, ::-1]),
    "turned by 90": ((0, -U, U, 0), lambda picture: np.rot90(picture)),
    "turned by 270": ((0, U, -U, 0), lambda picture: np.rot90(picture, 3)),
    "transposed": ((0, U, U, 0), lambda picture: picture.swapaxes(0, 1)),
    "transposed about the other diagonal": ((0, -U, -U, 0), lambda picture: np.rot90(picture, 2).swapaxes(0, 1)),
}


def first_frame(path: Path) -> np.ndarray:
    with Video(path) as video:
        frame_HWC = video.read([0])[0].permute(1, 2, 0).numpy()
        assert frame_HWC.shape[:2] == (video.facts.height, video.facts.width)
    return frame_HWC


def refusal(path: Path) -> VideoError:
    with pytest.raises(VideoError) as caught, Video(path) as video:
        video.read([0])
    return caught.value


def quarter(height: int = 48, width: int = 64) -> np.ndarray:
    picture_HWC = np.full((height, width, 3), 40, np.uint8)
    picture_HWC[: height // 2, : width // 2] = 220
    return picture_HWC


def circle(height: int, width: int, aspect: float) -> np.ndarray:
    """A white disc of half the picture's height, as stored where pixels are ``aspect`` wide."""
    y, x = np.mgrid[:height, :width] + 0.5
    inside = np.hypot(y - height / 2, (x - width / 2) * aspect) < height / 4
    return np.repeat(np.where(inside, 235, 20).astype(np.uint8)[..., None], 3, axis=-1)


def extent(frame_HWC: np.ndarray) -> tuple[int, int]:
    """Rows and columns of what is bright."""
    bright = frame_HWC[..., 0] > 128
    return int(bright.any(axis=1).sum()), int(bright.any(axis=0).sum())


@pytest.mark.parametrize(
    ("name", "codec"), [("pasp.mp4", "libx264"), ("vui.h264", "libx264"), ("vol.avi", "mpeg4"), ("pasp.mov", "prores")]
)
def test_pixels_become_square(tmp_path: Path, name: str, codec: str) -> None:
    """A circle drawn at 160 x 96 and squeezed into 96 x 96 comes back round."""
    pix_fmt = "yuv422p10le" if codec == "prores" else "yuv420p"
    frames = [circle(96, 96, 5 / 3)] * 4
    path = write_video(tmp_path / name, frames, codec=codec, pix_fmt=pix_fmt, pixel_aspect=Fraction(5, 3))
    frame_HWC = first_frame(path)
    assert frame_HWC.shape == (96, 160, 3)
    height, width = extent(frame_HWC)
    assert abs(height - 48) <= 2 and abs(width - 48) <= 2


def test_narrow_pixels_grow_in_height(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [circle(48, 96, 0.5)] * 4, codec="libx264", pix_fmt="yuv420p",
                       pixel_aspect=Fraction(1, 2))  # fmt: skip
    frame_HWC = first_frame(path)
    assert frame_HWC.shape == (96, 96, 3) and abs(extent(frame_HWC)[0] - extent(frame_HWC)[1]) <= 2


def test_pixels_are_stretched_before_the_picture_is_turned(tmp_path: Path) -> None:
    matrix = (0, -U, 0, U, 0, 0, 0, 0, 2**30)
    path = write_video(tmp_path / "a.mp4", [circle(96, 96, 5 / 3)] * 4, codec="libx264", pix_fmt="yuv420p",
                       pixel_aspect=Fraction(5, 3), matrix=matrix)  # fmt: skip
    frame_HWC = first_frame(path)
    assert frame_HWC.shape == (160, 96, 3) and abs(extent(frame_HWC)[0] - extent(frame_HWC)[1]) <= 2


def test_crops_count_stored_pixels(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [circle(96, 96, 5 / 3)] * 4, codec="libx264", pix_fmt="yuv420p",
                       pixel_aspect=Fraction(5, 3))  # fmt: skip
    with Video(path) as video:
        part = video.read([0], crop=(24, 72, 0, 96))
        assert part.shape == (1, 3, 96, 80) and video.crop_size((24, 72, 0, 96)) == (96, 80)
        assert all(abs(side - 48) <= 2 for side in extent(part[0].permute(1, 2, 0).numpy()))  # the whole disc
        with pytest.raises(VideoError, match="96 x 96"):
            video.read([0], crop=(24, 100, 0, 96))


def test_absurd_pixels_are_not_believed(tmp_path: Path) -> None:
    data = bytearray(write_video(tmp_path / "a.mp4", [quarter()] * 3, codec="libx264", pix_fmt="yuv420p",
                                 pixel_aspect=Fraction(5, 3)).read_bytes())  # fmt: skip
    place = data.index(b"pasp") + 4
    data[place : place + 8] = (2**30).to_bytes(4, "big") + (1).to_bytes(4, "big")
    (tmp_path / "a.mp4").write_bytes(data)
    assert refusal(tmp_path / "a.mp4").reason == "too_large"


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_mirrors_and_turns(tmp_path: Path, name: str) -> None:
    (a, b, c, d), shown = ORIENTATIONS[name]
    path = write_video(tmp_path / "a.mp4", [quarter()] * 3, codec="libx264", pix_fmt="yuv420p",
                       matrix=(a, b, 0, c, d, 0, 0, 0, 2**30))  # fmt: skip
    wanted_HWC, frame_HWC = shown(quarter()), first_frame(path)
    assert frame_HWC.shape == wanted_HWC.shape
    assert np.array_equal(frame_HWC[..., 0] > 128, wanted_HWC[..., 0] > 128)


@pytest.mark.parametrize(
    ("change", "shown"), [("flip=horizontal", lambda p: p[:, ::-1]), ("rotate=90", lambda p: np.rot90(p))]
)
def test_orientation_inside_the_stream(tmp_path: Path, change: str, shown: object) -> None:
    """H.264 may carry it in a message of its own, without the container's help."""
    path = write_video(tmp_path / "a.h264", [quarter()] * 3, codec="libx264", pix_fmt="yuv420p",
                       bitstream_filter=f"h264_metadata=display_orientation=insert:{change}")  # fmt: skip
    wanted_HWC = shown(quarter())  # type: ignore[operator]
    assert np.array_equal(first_frame(path)[..., 0] > 128, wanted_HWC[..., 0] > 128)


def to_yuv(codes: np.ndarray, matrix: str, depth: int = 8, *, full: bool = False) -> list[tuple[int, int, int]]:
    """Non-linear RGB in [0, 1] to samples (H.273, equations 38 to 43 and 20 to 28)."""
    red, blue = WEIGHTS[matrix]
    luma = codes @ np.array([red, 1 - red - blue, blue])
    chroma = np.stack([(codes[:, 2] - luma) / (2 * (1 - blue)), (codes[:, 0] - luma) / (2 * (1 - red))], axis=1)
    unit = 2 ** (depth - 8)
    if full:
        scale, samples = 2**depth - 1, np.concatenate([luma[:, None], chroma], axis=1)
        return [(round(y * scale), *(round(128 * unit + scale * c) for c in cs)) for y, *cs in samples]
    return [
        (round((16 + 219 * y) * unit), *(round((128 + 224 * c) * unit) for c in cs))
        for y, cs in zip(luma, chroma, strict=True)
    ]


def linear(levels: object) -> np.ndarray:
    codes = np.array(levels) / 255
    return np.where(codes <= 0.04045, codes / 12.92, ((codes + 0.055) / 1.055) ** 2.4)


def pq(nits: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084, inverse EOTF."""
    power = (nits / 10_000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hlg(nits: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100, for a display of 1000 nits: inverse OOTF, then OETF."""
    display = nits / 1000
    luminance = np.maximum(display @ np.array([0.2627, 0.6780, 0.0593]), 1e-12)
    scene = display * luminance[:, None] ** (-0.2 / 1.2)
    upper = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-12)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), upper)


def shown_colours(
    path: Path, samples: list[tuple[int, int, int]], pix_fmt: str, *, codec: str = "ffv1", height: int = 64,
    **tags: int,
) -> np.ndarray:  # fmt: skip
    frames = [flat_yuv(samples, pix_fmt, height) for _ in range(2)]
    options = {"qp": "0"} if codec == "libx264" else {}
    write_video(path, frames, codec=codec, pix_fmt=pix_fmt, tags=tags, options=options)
    return first_frame(path)[height // 2, 16::32].astype(int)


@pytest.mark.parametrize(("name", "codec"), [("container.mkv", "ffv1"), ("stream.mp4", "libx264")])
@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_high_dynamic_range(tmp_path: Path, name: str, codec: str, transfer: int) -> None:
    """What an ordinary video shows, at 203 nits for its white, looks the same in an HDR one."""
    light = np.maximum(linear(COLOURS) @ TO_BT2020.T, 0) * 203
    samples = to_yuv({PQ: pq, HLG: hlg}[transfer](light), "bt2020", 10)
    tags = {"color_range": LIMITED, "colorspace": BT2020, "color_trc": transfer, "color_primaries": BT2020}
    shown = shown_colours(tmp_path / name, samples, "yuv420p10le", codec=codec, **tags)
    assert np.abs(shown - COLOURS).max() <= 3


def test_highlights_are_compressed_and_keep_their_order(tmp_path: Path) -> None:
    nits = np.array([150, 203, 400, 1000, 4000])
    samples = to_yuv(pq(np.repeat(nits[:, None], 3, axis=1).astype(float)), "bt2020", 10)
    tags = {"color_range": LIMITED, "colorspace": BT2020, "color_trc": PQ, "color_primaries": BT2020}
    levels = shown_colours(tmp_path / "a.mkv", samples, "yuv420p10le", **tags)[:, 0]
    assert levels[0] < levels[1] < levels[2] <= levels[3] <= levels[4] <= 255 and levels[1] >= 245


def test_high_dynamic_range_without_primaries_is_bt2020(tmp_path: Path) -> None:
    light = np.maximum(linear(COLOURS) @ TO_BT2020.T, 0) * 203
    samples = to_yuv(pq(light), "bt2020", 10)
    shown = shown_colours(tmp_path / "a.mkv", samples, "yuv420p10le", color_range=LIMITED, color_trc=PQ)
    assert np.abs(shown - COLOURS).max() <= 3


@pytest.mark.parametrize(("primaries", "matrix"), [(BT2020, TO_BT2020), (P3, TO_P3)])
def test_wide_gamuts_of_ordinary_range(tmp_path: Path, primaries: int, matrix: np.ndarray) -> None:
    light = np.maximum(linear(COLOURS) @ matrix.T, 0)
    codes = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    tags = {"color_range": LIMITED, "colorspace": BT709, "color_primaries": primaries}
    shown = shown_colours(tmp_path / "a.mkv", to_yuv(codes, "bt709", 10), "yuv444p10le", **tags)
    assert np.abs(shown - COLOURS).max() <= 3


def test_colours_that_cannot_be_shown_right_are_refused_by_name(tmp_path: Path) -> None:
    samples = to_yuv(linear(COLOURS), "bt2020", 10)
    for name, tags, word in (
        ("matrix", {"colorspace": ICTCP, "color_trc": PQ}, "ICtCp"),
        ("ycgco", {"colorspace": 8}, "YCgCo"),
        ("transfer", {"color_trc": 9}, "logarithmic"),
        ("primaries", {"color_primaries": 10}, "XYZ"),
    ):
        frames = [flat_yuv(samples, "yuv420p10le") for _ in range(2)]
        error = refusal(write_video(tmp_path / f"{name}.mkv", frames, pix_fmt="yuv420p10le", tags=tags))
        assert error.reason == "unsupported_picture" and word in str(error)


def test_dolby_vision_needs_a_base_layer() -> None:
    """Without tags (profile 5) its colours are of its own kind; with those of HDR10 (profile 8) other players' too."""

    def frame(trc: int) -> Any:  # FFmpeg has no encoder for such streams
        real = av.VideoFrame(16, 16, "yuv420p10le")
        return SimpleNamespace(
            side_data={"DOVI_METADATA": b"a mapping"}, format=real.format, colorspace=BT2020, color_range=LIMITED,
            color_primaries=2, color_trc=trc, height=16,
        )  # fmt: skip

    with pytest.raises(UnsupportedPictureError, match="Dolby Vision"):
        colours_of(frame(2), "hevc")
    assert colours_of(frame(PQ), "hevc").gamut == "bt2020"


@pytest.mark.parametrize(
    ("height", "tag", "matrix"),
    [
        (718, 2, "bt601"), (720, 2, "bt709"), (1080, 2, "bt709"), (64, BT709, "bt709"), (720, BT601, "bt601"),
        (64, BT2020, "bt2020"),
    ],
)  # fmt: skip
def test_matrices(tmp_path: Path, height: int, tag: int, matrix: str) -> None:
    samples = to_yuv(np.array(COLOURS) / 255, matrix)
    shown = shown_colours(tmp_path / "a.mkv", samples, "yuv420p", height=height, color_range=LIMITED, colorspace=tag)
    assert np.abs(shown - COLOURS).max() <= 2


@pytest.mark.parametrize(
    ("pix_fmt", "depth"),
    [
        ("yuv420p", 8), ("yuv422p", 8), ("yuv444p", 8), ("yuv411p", 8), ("yuv420p10le", 10), ("yuv422p10le", 10),
        ("yuv444p10le", 10), ("yuv420p12le", 12), ("yuv444p12le", 12), ("yuv420p16le", 16), ("yuv444p16le", 16),
    ],
)  # fmt: skip
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("height", [64, 63])
def test_ranges_of_all_depths(tmp_path: Path, pix_fmt: str, depth: int, full: bool, height: int) -> None:
    colours = (*COLOURS, (255, 255, 255))
    samples = to_yuv(np.array(colours) / 255, "bt601", depth, full=full)
    tags = {"color_range": FULL if full else LIMITED, "colorspace": BT601}
    shown = shown_colours(tmp_path / "a.mkv", samples, pix_fmt, height=height, **tags)
    # FFmpeg's quick way, of even heights, is a level less exact than its general one.
    assert np.abs(shown - colours).max() <= 2
    assert (shown[-1] == 255).all() and (shown[-2] == 0).all() and np.abs(shown[0] - 128).max() <= 1


@pytest.mark.parametrize(
    "pix_fmt",
    [
        "rgb24", "bgr0", "gbrp", "gbrp10le", "gbrp16le", "gbrpf32le", "rgb48le", "x2rgb10le", "nv12", "nv21", "nv16",
        "nv24", "p010le", "p016le", "p210le", "yuyv422", "uyvy422", "y210le", "vuyx", "xv30le", "ayuv64le", "yuvj444p",
        "yuv410p", "yuv440p", "yuv420p9le", "yuv420p14le", "yuv444p10be",
    ],
)  # fmt: skip
def test_other_pixel_formats(pix_fmt: str) -> None:
    """FFmpeg writes them; what comes back is the colour that went in."""
    colours = np.array([*COLOURS, (255, 255, 255)], np.uint8)
    picture = av.VideoFrame.from_ndarray(np.repeat(np.repeat(colours[None], 64, 0), 32, 1), format="rgb24")
    found = to_rgb(picture.reformat(format=pix_fmt), "rawvideo")[32, 16::32].astype(int)
    assert np.abs(found - colours).max() <= 3 and (found[-1] == 255).all()


@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
@pytest.mark.parametrize("depth", ["8", "16le", "16be"])
def test_mosaics_of_cameras(pattern: str, depth: str) -> None:
    frame = av.VideoFrame(64, 48, f"bayer_{pattern}{depth}")
    kind = np.dtype("u1") if depth == "8" else np.dtype(f"{'<' if depth == '16le' else '>'}u2")
    levels = [{"r": 200, "g": 120, "b": 40}[letter] * (1 if depth == "8" else 257) for letter in pattern]
    rows = np.zeros((48, frame.planes[0].line_size // kind.itemsize), kind)
    rows[:, :64] = np.tile(np.array(levels, kind).reshape(2, 2), (24, 32))
    frame.planes[0].update(rows.tobytes())
    assert to_rgb(frame, "rawvideo")[24, 32].tolist() == [200, 120, 40]


@pytest.mark.parametrize("pix_fmt", ["xyz12le", "rgb565be", "bgr555be", "rgb444le", "rgb8", "bgr8", "yaf32le"])
def test_pixel_formats_that_come_out_wrong_are_refused_by_name(pix_fmt: str) -> None:
    try:
        frame = av.VideoFrame(16, 16, pix_fmt)
    except ValueError:
        pytest.skip(f"this FFmpeg has no {pix_fmt}")
    with pytest.raises(UnsupportedPictureError, match=pix_fmt):
        to_rgb(frame, "rawvideo")


@pytest.mark.parametrize("pix_fmt", ["gray", "gray10le", "gray12le", "gray16le"])
@pytest.mark.parametrize("full", [False, True])
def test_ranges_of_grey(tmp_path: Path, pix_fmt: str, full: bool) -> None:
    depth = int(pix_fmt.removeprefix("gray").removesuffix("le") or 8)
    unit, levels = 2 ** (depth - 8), np.array([0, 128, 255])
    samples = levels / 255 * (2**depth - 1) if full else (16 + 219 * levels / 255) * unit
    shown = shown_colours(
        tmp_path / "a.mkv", [(round(value), 0, 0) for value in samples], pix_fmt, color_range=FULL if full else LIMITED
    )
    assert np.abs(shown - levels[:, None]).max() <= 1


def test_untagged_grey_is_full_in_lossless_files(tmp_path: Path) -> None:
    shown = shown_colours(tmp_path / "a.mkv", [(0, 0, 0), (128, 0, 0), (255, 0, 0)], "gray")
    assert shown[:, 0].tolist() == [0, 128, 255]


def test_jpeg_frames_are_of_full_range(tmp_path: Path) -> None:
    shown = shown_colours(
        tmp_path / "a.avi", to_yuv(np.array(COLOURS) / 255, "bt601", full=True), "yuvj420p", codec="mjpeg", height=720
    )
    assert np.abs(shown - COLOURS).max() <= 6  # lossy, and JPEG's matrix is BT.601 at every size


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("alpha.webm", "libvpx-vp9", "yuva420p"),
        ("animation.mov", "qtrle", "argb"),
        ("png.mov", "png", "rgba"),
        ("lossless.mkv", "ffv1", "yuva420p"),
        ("prores.mov", "prores_ks", "yuva444p10le"),
        ("animated.png", "apng", "rgba"),
    ],
)
def test_transparent_videos_lie_on_white(tmp_path: Path, name: str, codec: str, pix_fmt: str) -> None:
    rgba_HWC = np.zeros((48, 64, 4), np.uint8)  # transparent black
    rgba_HWC[:, :32] = (200, 0, 0, 255)
    rgba_HWC[24:, :32, 3] = 128
    path = write_video(tmp_path / name, [rgba_HWC] * 3, codec=codec, pix_fmt=pix_fmt, container_format=None
                       if name != "animated.png" else "apng")  # fmt: skip
    frame_HWC = first_frame(path).astype(int)
    for place, wanted in (((12, 8), (200, 0, 0)), ((36, 8), (227, 127, 127)), ((24, 56), (255, 255, 255))):
        assert np.abs(frame_HWC[place] - wanted).max() <= 3, place


def test_palettes_with_holes_lie_on_white(tmp_path: Path) -> None:
    from PIL import Image

    frames = []
    for level in (60, 90, 120):
        frame = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
        frame.paste((200, level, 0, 255), (0, 0, 32, 48))
        frames.append(frame)
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100, disposal=2)
    frame_HWC = first_frame(tmp_path / "a.gif").astype(int)
    assert np.abs(frame_HWC[24, 8] - (200, 60, 0)).max() <= 3 and frame_HWC[24, 56].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "ffv1"), ("a.mp4", "libx264")])
def test_a_small_preview_before_the_video_is_left_out(tmp_path: Path, name: str, codec: str) -> None:
    path = write_video(tmp_path / name, [quarter()] * 4, codec=codec, pix_fmt="yuv420p", preview=(24, 32))
    frame_HWC = first_frame(path)
    assert frame_HWC.shape == (48, 64, 3) and frame_HWC[4, 4, 0] > 200


def test_a_cover_larger_than_the_video_is_left_out(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 320, 240, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        still = av.VideoFrame(320, 240, "yuvj420p")
        container.mux([*cover.encode(still), *cover.encode()])
        for number in range(4):
            frame = av.VideoFrame.from_ndarray(quarter(), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert first_frame(tmp_path / "a.mp4").shape == (48, 64, 3)


def test_stored_pixels_are_as_the_reference_reads_them(tmp_path: Path) -> None:
    """``picture="stored"`` is FFmpeg's own conversion of the first stream, in quarter turns upright."""
    path = write_video(tmp_path / "a.mkv", [quarter(720, 96)] * 3, pix_fmt="yuv420p", pixel_aspect=Fraction(5, 3),
                       preview=(24, 32), tags={"color_primaries": BT2020})  # fmt: skip
    with Video(path, picture="stored") as video, av.open(str(path)) as container:
        wanted_HWC = next(container.decode(container.streams.video[0])).to_ndarray(format="rgb24")
        assert np.array_equal(video.read([0])[0].permute(1, 2, 0).numpy(), wanted_HWC)
        assert wanted_HWC.shape == (24, 32, 3)
