"""Video files: what they hold, and decoding of exactly the frames that a clip needs (PyAV).

Frames are numbered in the order of display, from 0. The packets' time stamps are read once without decoding, so that
numbers are exact for variable frame rates and wrong headers; decoding then starts at the key frame before the clip.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import av.container
import numpy as np
import torch
from av.stream import Disposition
from numpy.typing import NDArray

from megatron_flashi2v.config.clips import FramePicking, PictureReading
from megatron_flashi2v.data.reasons import FileError
from megatron_flashi2v.data.rendering import Rendering, ShownPicture, StoredPicture, UnsupportedPictureError
from megatron_flashi2v.data.timestamps import mean_rate, packet_stamps, times_from_stamps, typical_rate

MAX_PIXELS = 2**26
"""Pictures beyond this (an 8K picture has half of it) are taken for damaged headers, and never allocated."""

CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,mxf,nut,ivf,gif,apng,rm,dv,"
    "h264,hevc,m4v,obu,yuv4mpegpipe"
)
"""Demuxers that read one file. Playlists and lists of files, in disguise, would open others, or the network."""

AVI_CHECKED_FRAMES = 32
"""More than decoders reorder."""

_CLOCKLESS = ("h264", "hevc", "m4v", "mpegvideo", "obu")
"""Demuxers of bare streams, which number frames at 25 frames per second; the stream itself may know better."""

_DECODER_ERRORS = (av.FFmpegError, OSError, ValueError, MemoryError, ZeroDivisionError, OverflowError)
_NO_PICTURE = Disposition.attached_pic | Disposition.timed_thumbnails
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Decoders of the transparency that WebM keeps beside the picture; FFmpeg's own leave it out."""


class VideoError(FileError):
    """A video file cannot give a clip."""


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    """Properties read from a file; sizes are those of the displayed picture.

    Attributes:
        height: pixels.
        width: pixels.
        fps: average frames per second.
        num_frames: frames that the file really holds.
    """

    height: int
    width: int
    fps: float
    num_frames: int


class Video:
    """A video file opened for reading; use it as a context manager.

    Args:
        path: of the file.
        frame_picking: "time" takes the rate from time stamps where the header is wrong; "index" believes the header.
        picture: as players show it, or as FlashI2V's reference reads it (:mod:`megatron_flashi2v.data.rendering`).

    Attributes:
        facts: what the file says.
        times_s: float64 [num_frames], seconds from the first frame.
        rates: frames per second that an annotator may have read from this file.

    Raises:
        VideoError: the file is missing, damaged, or holds no video.
    """

    def __init__(
        self, path: Path, *, frame_picking: FramePicking = "time", picture: PictureReading = "shown"
    ) -> None:
        self.path = path
        self._by_time, self._as_shown = frame_picking == "time", picture == "shown"
        if not _is_file(path):
            raise VideoError(path, "missing_file", _why_missing(path))
        self._container, self._stream = self._open()
        try:
            self._time_stamps = self._read_time_stamps()
            self._rendering, self.facts, self.times_s = self._measure()
        except BaseException:
            self._container.close()
            raise

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    @property
    def rates(self) -> tuple[float, ...]:
        """The header's rate, the mean one, and the one where no frame is missing."""
        if not self._by_time:
            return (self.facts.fps,)
        return tuple(rate for rate in (self._claimed_rate(), self.facts.fps, typical_rate(self.times_s)) if rate)

    def crop_size(self, crop: tuple[int, int, int, int]) -> tuple[int, int]:
        """(height, width) of a crop as displayed.

        Args:
            crop: as for :meth:`read`.
        """
        x_start, x_end, y_start, y_end = crop
        height, width = self._rendering.upright_size
        rows, columns = self.facts.height / height, self.facts.width / width
        return round((y_end - y_start) * rows), round((x_end - x_start) * columns)

    def read(self, indices: Sequence[int] | np.ndarray, crop: tuple[int, int, int, int] | None = None) -> torch.Tensor:
        """Decode the named frames.

        Args:
            indices: ascending frame numbers; a number may come twice.
            crop: (x_start, x_end, y_start, y_end) in pixels of the upright picture before its pixels are made square.

        Returns:
            uint8 RGB [T, C, H, W], T = len(indices).

        Raises:
            VideoError: a frame does not exist or cannot be decoded, or the crop lies outside the picture.
        """
        numbers = [int(index) for index in indices]
        if numbers[-1] >= self.facts.num_frames:
            raise VideoError(
                self.path,
                "truncated",
                f"frames {numbers[0]} to {numbers[-1]} are needed, but the file holds {self.facts.num_frames}",
            )
        self._check_crop(crop)
        wanted = set(numbers)
        pictures = self._decode_from_key_frame(wanted, crop)
        if wanted - pictures.keys():
            # Seeking may land behind the clip in damaged or odd files; from the start it is slow but sure.
            pictures = self._decode_from_start(wanted, crop)
        lost = wanted - pictures.keys()
        if lost:
            raise VideoError(
                self.path, "undecodable", f"frame {min(lost)} cannot be decoded ({len(lost)} of {len(wanted)} lost)"
            )
        frames_THWC = torch.from_numpy(np.stack([pictures[number] for number in numbers]))
        return frames_THWC.permute(0, 3, 1, 2).contiguous()

    def _open(self) -> tuple[av.container.InputContainer, av.VideoStream]:
        options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
        try:
            # Titles in other encodings than UTF-8 are nothing to fail for.
            container = av.open(f"file:{self.path}", options=options, metadata_errors="replace")
        except _DECODER_ERRORS as error:
            raise VideoError(self.path, "unreadable", f"is not a readable video file ({_plain(error)})") from error
        try:
            return container, self._find_stream(container)
        except BaseException:
            container.close()
            raise

    def _find_stream(self, container: av.container.InputContainer) -> av.VideoStream:
        streams = [
            stream
            for stream in container.streams.video
            if not stream.disposition & (_NO_PICTURE if self._as_shown else Disposition.attached_pic)
        ]  # the cover of a song is no video
        if not streams:
            raise VideoError(self.path, "no_video_stream", "holds no video stream")
        stream = max(streams, key=_size) if self._as_shown else streams[0]  # previews come before the real one
        codec = stream.codec_context
        if codec is None:
            raise VideoError(self.path, "undecodable", "is in a format that this build of FFmpeg cannot decode")
        if codec.height * codec.width > MAX_PIXELS:
            raise VideoError(
                self.path,
                "too_large",
                f"the header claims {codec.width} x {codec.height} pixels; at most {MAX_PIXELS} are read",
            )
        codec.thread_type = "AUTO"
        return stream

    def _read_time_stamps(self) -> list[int] | None:
        """Presentation time stamps of all frames, ascending; None where they do not tell the frames apart."""
        return packet_stamps(self._packets(), ordered=self._by_time)

    def _packets(self) -> Iterator[av.Packet]:
        try:
            yield from self._container.demux(self._stream)
        except _DECODER_ERRORS:
            return  # a truncated file: the frames before the damage are still good

    def _claimed_rate(self) -> float | None:
        """Frames per second that the header claims."""
        stream = self._stream
        rates = [stream.average_rate, stream.guessed_rate, stream.base_rate]
        if self._is_clockless():
            rates.insert(0, stream.guessed_rate)
        rate = next((rate for rate in rates if rate), None)
        return float(rate) if rate and rate > 0 else None

    def _is_clockless(self) -> bool:
        return self._by_time and self._container.format.name in _CLOCKLESS

    def _measure(self) -> tuple[Rendering, VideoFacts, NDArray[np.float64]]:
        """How frames become pictures, the facts, and each frame's time; decodes the first frame."""
        with contextlib.closing(self._all_frames()) as frames:
            first = next(frames, None)
            if first is None:
                raise VideoError(self.path, "no_frames", "holds no frame that can be decoded")
            if self._by_time and "avi" in self._container.format.name:
                self._distrust_avi(first, frames)
            stamps: Sequence[int | None] | None = self._time_stamps
        if stamps is None:
            with contextlib.closing(self._all_frames()) as frames:
                stamps = [frame.pts for frame in frames]
        self._coded_size = (first.height, first.width)
        rendering = self._render(first)
        times_s = self._times(stamps)
        rate = mean_rate(times_s, self._claimed_rate()) if self._by_time else self._claimed_rate()
        if rate is None and (len(stamps) > 1 or not self._by_time):
            raise VideoError(self.path, "no_fps", "does not say how many frames it shows per second")
        facts = VideoFacts(height=rendering.height, width=rendering.width, fps=rate or 0.0, num_frames=len(stamps))
        return rendering, facts, times_s

    def _distrust_avi(self, first: av.VideoFrame, following: Iterator[av.VideoFrame]) -> None:
        """Drop the time stamps if they are those of decoding, as AVI keeps no others."""
        shown = [frame.pts for frame in (first, *itertools.islice(following, AVI_CHECKED_FRAMES))]
        if None in shown or not _ascending(shown):
            self._time_stamps = None

    def _times(self, stamps: Sequence[int | None]) -> NDArray[np.float64]:
        """Seconds from the first frame; counted at the header's rate where frames carry no time of their own."""
        if not self._is_clockless() and None not in stamps and _ascending(stamps):
            return times_from_stamps(stamps, float(self._stream.time_base or 1))
        return np.arange(len(stamps)) / (self._claimed_rate() or 1.0)

    def _render(self, first: av.VideoFrame) -> Rendering:
        if not self._as_shown:
            return StoredPicture(first)
        rendering = ShownPicture(first, self._stream.codec_context.name, self._stream.sample_aspect_ratio)
        if rendering.height * rendering.width > MAX_PIXELS:
            raise VideoError(
                self.path,
                "too_large",
                f"pixels of the shape {self._stream.sample_aspect_ratio} make a picture of {rendering.width} x "
                f"{rendering.height}; at most {MAX_PIXELS} pixels are read",
            )
        return rendering

    def _check_crop(self, crop: tuple[int, int, int, int] | None) -> None:
        height, width = self._rendering.upright_size
        if crop is not None and (crop[1] > width or crop[3] > height):
            raise VideoError(
                self.path,
                "bad_crop",
                f"crop {list(crop)} lies outside the picture of {width} x {height} pixels",
            )

    def _decode_from_key_frame(
        self, wanted: set[int], crop: tuple[int, int, int, int] | None
    ) -> dict[int, np.ndarray]:
        if self._time_stamps is None:
            return {}
        numbers = {self._time_stamps[number]: number for number in wanted}
        pictures: dict[int, np.ndarray] = {}
        for frame in self._frames_from(min(numbers)):
            if frame.pts in numbers:
                pictures[numbers[frame.pts]] = self._picture(frame, crop)
            if len(pictures) == len(wanted) or (frame.pts is not None and frame.pts > max(numbers)):
                break
        return pictures

    def _decode_from_start(self, wanted: set[int], crop: tuple[int, int, int, int] | None) -> dict[int, np.ndarray]:
        # With time stamps, a frame that the decoder leaves out does not shift the numbers of those after it.
        numbers = None if self._time_stamps is None else {pts: n for n, pts in enumerate(self._time_stamps)}
        pictures: dict[int, np.ndarray] = {}
        with contextlib.closing(self._all_frames()) as frames:
            for count, frame in enumerate(frames):
                number = count if numbers is None else numbers.get(frame.pts, -1) if frame.pts is not None else -1
                if number in wanted:
                    pictures[number] = self._picture(frame, crop)
                if len(pictures) == len(wanted):
                    break
        return pictures

    def _frames_from(self, pts: int) -> Iterator[av.VideoFrame]:
        """Decoded frames from the key frame at or before ``pts`` up to the first damage."""
        try:
            self._container.seek(pts, stream=self._stream, backward=True)
            yield from self._decoded(self._container, self._stream)
        except _DECODER_ERRORS:
            return

    def _all_frames(self) -> Generator[av.VideoFrame, None, None]:
        """Decoded frames up to the first damage, the file opened afresh: not every format seeks to its start."""
        container, stream = self._open()
        with container:
            try:
                yield from self._decoded(container, stream)
            except _DECODER_ERRORS:
                return

    def _decoded(self, container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
        decoder = self._alpha_decoder(stream) if self._as_shown else None
        if decoder is None:
            yield from container.decode(stream)
            return
        for packet in container.demux(stream):
            yield from decoder.decode(packet if packet.size else None)

    def _alpha_decoder(self, stream: av.VideoStream) -> Any:
        name = _ALPHA_DECODERS.get(stream.codec_context.name)
        if name is None or stream.metadata.get("alpha_mode") != "1":
            return None
        try:
            return av.CodecContext.create(name, "r")
        except _DECODER_ERRORS as error:
            raise VideoError(
                self.path, "unsupported_picture", f"is transparent, and this build of FFmpeg has no {name} to show it"
            ) from error

    def _picture(self, frame: av.VideoFrame, crop: tuple[int, int, int, int] | None) -> np.ndarray:
        if frame.is_corrupt:
            raise VideoError(self.path, "undecodable", f"the frame at {frame.time} s is damaged")
        if (frame.height, frame.width) != self._coded_size:
            raise VideoError(
                self.path,
                "size_changed",
                f"the picture changes from {self._coded_size[1]} x {self._coded_size[0]} to "
                f"{frame.width} x {frame.height} pixels at {frame.time} s",
            )
        try:
            return self._rendering.picture(frame, crop)
        except UnsupportedPictureError as error:
            raise VideoError(self.path, "unsupported_picture", str(error)) from error
        except _DECODER_ERRORS as error:
            raise VideoError(
                self.path,
                "undecodable",
                f"its pixel format {frame.format.name} cannot be converted to RGB ({_plain(error)})",
            ) from error


def _ascending(stamps: Sequence[Any]) -> bool:
    return all(earlier < later for earlier, later in zip(stamps, stamps[1:], strict=False))


def _size(stream: av.VideoStream) -> tuple[int, bool]:
    """Pixels, and whether it is the one to be shown; no decoder, no picture."""
    codec = stream.codec_context
    return (0 if codec is None else codec.width * codec.height, bool(stream.disposition & Disposition.default))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or that no file system has bytes for
        return False


def _why_missing(path: Path) -> str:
    # Under the annotations' folder, and with one slash of its two, an address looks like a path.
    if any(re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+:", part) for part in path.parts):
        return "is an address, and nothing is fetched; download the file and give its path"
    return "there is no such file; correct the path in the annotation"


def _plain(error: BaseException) -> str:
    """The decoder's words without the path, which the message already names."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
