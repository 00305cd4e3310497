"""Small videos of every odd kind: shapes, mirrors, tags, ranges, transparency, streams and time stamps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

LIMITED, FULL = 1, 2
BT709, BT601, BT2020, ICTCP = 1, 6, 9, 14
PQ, HLG = 16, 18
P3 = 12
"""FFmpeg's numbers of colour tags."""


def write_video(
    path: Path,
    frames: Sequence[np.ndarray | av.VideoFrame],
    *,
    codec: str = "ffv1",
    pix_fmt: str = "yuv444p",
    rate: Fraction | int = 25,
    stamps: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    pixel_aspect: Fraction | None = None,
    matrix: Sequence[int] | None = None,
    tags: Mapping[str, int] | None = None,
    options: Mapping[str, str] | None = None,
    container_options: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    container_format: str | None = None,
    bitstream_filter: str | None = None,
    preview: tuple[int, int] | None = None,
) -> Path:
    """Write frames (uint8 RGB or RGBA arrays, or frames in ``pix_fmt``) to a file.

    Args:
        path: the ending picks the container.
        frames: all of one size.
        codec: an encoder's name in FFmpeg.
        pix_fmt: what is encoded.
        rate: frames per second that the header claims.
        stamps: presentation time stamps, in units of ``time_base``.
        time_base: seconds; by default 1 / rate.
        pixel_aspect: width / height of a pixel.
        matrix: the display matrix, nine whole numbers.
        tags: ``color_range``, ``colorspace``, ``color_trc`` and ``color_primaries``.
        options: of the encoder.
        container_options: of the muxer.
        metadata: of the container.
        container_format: of the muxer, where the ending does not say.
        bitstream_filter: over the encoded packets.
        preview: (height, width) of a stream before this one, which shows black.
    """
    pictures = [_frame(frame, pix_fmt) for frame in frames]
    stamps = list(range(len(pictures))) if stamps is None else list(stamps)
    with av.open(str(path), "w", format=container_format, options=dict(container_options or {})) as container:
        container.metadata.update(metadata or {})
        small = None if preview is None else _stream(container, codec, pix_fmt, rate, *preview)
        stream = _stream(container, codec, pix_fmt, rate, pictures[0].height, pictures[0].width)
        context = stream.codec_context
        context.options = dict(options or {})
        context.time_base = time_base or 1 / Fraction(rate)
        if pixel_aspect is not None:
            context.sample_aspect_ratio = pixel_aspect
        for name, value in (tags or {}).items():
            setattr(context, name, value)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        filtered = None
        for stamp, frame in zip([*stamps, None], [*pictures, None], strict=True):
            if frame is not None:
                frame.pts, frame.time_base = stamp, context.time_base
                for name, value in (tags or {}).items():
                    setattr(frame, name, value)
            if small is not None:
                container.mux(small.encode(None if frame is None else _black(frame, *preview, pix_fmt)))
            for packet in stream.encode(frame):
                if bitstream_filter is None:
                    container.mux(packet)
                    continue
                filtered = filtered or av.BitStreamFilterContext(bitstream_filter, stream)
                for changed in filtered.filter(packet):
                    changed.stream = stream
                    container.mux(changed)
    return path


def flat_yuv(
    levels: Sequence[tuple[int, int, int]], pix_fmt: str, height: int = 64, column: int = 32
) -> av.VideoFrame:
    """A frame of upright columns, each of one (Y, U, V), in a planar format of 8 or 16 bits a sample."""
    frame = av.VideoFrame(column * len(levels), height, pix_fmt)
    for plane, samples in zip(frame.planes, zip(*levels, strict=True), strict=False):
        kind = np.uint8 if plane.line_size // plane.width == 1 else np.uint16
        rows = np.zeros((plane.height, plane.line_size // kind().itemsize), kind)
        rows[:, : plane.width] = np.repeat(np.array(samples, kind), plane.width // len(levels))
        plane.update(rows.tobytes())
    return frame


def _frame(picture: np.ndarray | av.VideoFrame, pix_fmt: str) -> av.VideoFrame:
    if isinstance(picture, av.VideoFrame):
        return picture
    kind = "rgba" if picture.shape[-1] == 4 else "rgb24"
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format=kind).reformat(format=pix_fmt)


def _stream(
    container: Any, codec: str, pix_fmt: str, rate: Fraction | int, height: int, width: int
) -> av.VideoStream:
    stream = container.add_stream(codec, rate=rate)
    stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
    return stream


def _black(like: av.VideoFrame, height: int, width: int, pix_fmt: str) -> av.VideoFrame:
    frame = _frame(np.zeros((height, width, 3), np.uint8), pix_fmt)
    frame.pts, frame.time_base = like.pts, like.time_base
    return frame
