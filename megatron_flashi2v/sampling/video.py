"""Writing videos (H.264 in mp4) and still pictures of their frames (PNG).

Shape suffixes: T frames, H and W rows and columns, C = 3 colours (red, green, blue).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_flashi2v.runtime.files import atomic_write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

# H.264 plays everywhere; MPEG-4 part 2 is in every FFmpeg build.
ENCODERS = ("libx264", "mpeg4")
MARGIN = 4
LABEL_HEIGHT = 18
MIN_TILE_HEIGHT = 128
STRIP_SOFTWARE = "megatron_flashi2v strip of frames"
"""Value of a strip's PNG text ``Software``."""


def write_mp4(
    path: Path, frames_THWC: NDArray[np.uint8], fps: float, *, crf: int = 18, enlarge: int = 1
) -> None:
    """Encode frames as an mp4 that ordinary players show; the file appears whole or not at all.

    The pixels are stored as yuv420p in BT.709, which halves the colour resolution and needs an even width and
    height: an odd side is lengthened by repeating its last row or column, so that no pixel of the sample is lost.

    Args:
        path: the mp4; missing folders are made.
        frames_THWC: uint8, at least one frame.
        fps: frames per second.
        crf: H.264's quality, 0 (lossless) to 51; 18 is visually transparent.
        enlarge: times that each pixel is repeated along both sides, so that a small sample can be watched.

    Raises:
        ValueError: wrong shape or dtype, or fps not above 0.
    """
    frames_THWC = _checked(frames_THWC)
    if not fps > 0:
        raise ValueError(f"fps is {fps}; it must be above 0")
    frames_THWC = frames_THWC.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    height, width = frames_THWC.shape[1:3]
    frames_THWC = np.pad(frames_THWC, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    _encode(buffer, frames_THWC, Fraction(fps).limit_denominator(1001), crf)
    atomic_write_bytes(path, buffer.getvalue())


def _encode(buffer: io.BytesIO, frames_THWC: NDArray[np.uint8], rate: Fraction, crf: int) -> None:
    """Mux the frames, of even sizes, into an mp4 in memory."""
    import av
    from av.video.reformatter import ColorRange, Colorspace

    bt709 = 1  # the code of BT.709 for primaries, transfer and matrix in ITU-T H.273
    encoder = next(name for name in ENCODERS if name in av.codecs_available)
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream(encoder, rate=rate)
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # MPEG-4 has no crf; a quantiser held at 2 is its near-best.
        stream.options = {"crf": str(crf)} if encoder == "libx264" else {"qmin": "2", "qmax": "2", "b": "1G"}
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = bt709
        context.color_range = ColorRange.MPEG
        for frame_HWC in frames_THWC:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@dataclass(frozen=True, kw_only=True)
class StripRow:
    """One row of a picture of frames.

    Attributes:
        frames_THWC: uint8 frames.
        label: title, drawn above the row; empty for none.
        captions: one short text per chosen frame, drawn above each; by default the frame's number.
    """

    frames_THWC: NDArray[np.uint8]
    label: str = ""
    captions: Sequence[str] | None = None


def choose_frames(num_frames: int, columns: int) -> list[int]:
    """Indices of at most ``columns`` frames, evenly spread, with the first and the last among them.

    Raises:
        ValueError: fewer than one frame or column.
    """
    if num_frames < 1 or columns < 1:
        raise ValueError(f"{num_frames} frames in {columns} columns: both must be at least 1")
    count = min(num_frames, columns)
    if count == 1:
        return [0]
    return [round(column * (num_frames - 1) / (count - 1)) for column in range(count)]


def write_comparison(path: Path, rows: Sequence[StripRow], *, columns: int = 8) -> None:
    """Write a PNG with one row of frames per video (source above sample, for instance).

    Every row shows at most ``columns`` of its frames, evenly spread from the first to the last. Small frames are
    enlarged by a whole factor without smoothing, so that each pixel of the sample can be judged.

    Args:
        path: the PNG; written atomically, missing folders are made.
        rows: at least one; the frames' sizes may differ.
        columns: frames per row at most.

    Raises:
        ValueError: no rows, malformed frames, or captions that are not one per chosen frame.
    """
    from PIL import Image

    if not rows:
        raise ValueError("a strip needs at least one row")
    pictures = [_draw_row(row, columns) for row in rows]
    width = max(picture.width for picture in pictures)
    sheet = Image.new("RGB", (width, sum(picture.height for picture in pictures)), "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", pnginfo=_mark())
    atomic_write_bytes(path, buffer.getvalue())


def is_strip(path: Path) -> bool:
    """Whether a file is a strip that :func:`write_comparison` wrote."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return picture.info.get("Software") == STRIP_SOFTWARE
    except (OSError, UnidentifiedImageError):
        return False


def _mark() -> PngInfo:
    """The text by which :func:`is_strip` tells ours from a user's picture."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Software", STRIP_SOFTWARE)
    return info


def _draw_row(row: StripRow, columns: int) -> Image:
    """A label line (where there is a label), a caption line, and the chosen frames."""
    from PIL import Image, ImageDraw, ImageFont

    frames_THWC = _checked(row.frames_THWC)
    chosen = choose_frames(len(frames_THWC), columns)
    captions = [f"frame {index}" for index in chosen] if row.captions is None else list(row.captions)
    if len(captions) != len(chosen):
        raise ValueError(f"{len(captions)} captions for {len(chosen)} frames; give one per frame shown")
    height, width = frames_THWC.shape[1:3]
    factor = max(1, -(-MIN_TILE_HEIGHT // height))
    tile_width, tile_height = width * factor, height * factor
    head = LABEL_HEIGHT * (2 if row.label else 1)
    picture = Image.new(
        "RGB",
        (MARGIN + len(chosen) * (tile_width + MARGIN), head + tile_height + 2 * MARGIN),
        "white",
    )
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=12)
    if row.label:
        pen.text((MARGIN, MARGIN), row.label, fill="black", font=font)
    for column, (index, caption) in enumerate(zip(chosen, captions, strict=True)):
        left = MARGIN + column * (tile_width + MARGIN)
        pen.text((left, head - LABEL_HEIGHT + MARGIN), caption, fill="dimgray", font=font)
        tile = Image.fromarray(np.ascontiguousarray(frames_THWC[index]))
        picture.paste(tile.resize((tile_width, tile_height), Image.Resampling.NEAREST), (left, head + MARGIN))
    return picture


def _checked(frames_THWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The frames as a NumPy array, if they are uint8 ``[T >= 1, H >= 1, W >= 1, 3]``."""
    frames_THWC = np.asarray(frames_THWC)
    if (
        frames_THWC.dtype != np.uint8
        or frames_THWC.ndim != 4
        or frames_THWC.shape[3] != 3
        or not frames_THWC.size
    ):
        raise ValueError(
            f"frames must be uint8 [T, H, W, 3] with at least one pixel, not {frames_THWC.dtype} "
            f"{list(frames_THWC.shape)}"
        )
    return frames_THWC
