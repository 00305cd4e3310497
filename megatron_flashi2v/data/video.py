"""Video files: what they hold, and decoding of exactly the frames that a clip needs (PyAV).

Frames are numbered in the order of display, from 0. The packets' time stamps are read once without decoding, so that
numbers are exact for variable frame rates and wrong headers; decoding then starts at the key frame before the clip.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import av
import av.container
import numpy as np
import torch
from av.stream import Disposition

from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.data.reasons import ERROR_REASONS

MAX_PIXELS = 2**26
"""Pictures beyond this (an 8K picture has half of it) are taken for damaged headers, and never allocated."""

CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,mxf,nut,ivf,gif,rm,dv,"
    "h264,hevc,m4v,obu,yuv4mpegpipe"
)
"""Demuxers that read one file. Playlists and lists of files, in disguise, would open others, or the network."""

_DECODER_ERRORS = (av.FFmpegError, OSError, ValueError, MemoryError, ZeroDivisionError, OverflowError)


class VideoError(DataError):
    """A video file cannot give a clip.

    Attributes:
        reason: one of :data:`megatron_flashi2v.data.reasons.ERROR_REASONS`.
    """

    def __init__(self, path: Path, reason: str, detail: str) -> None:
        super().__init__(f"{path}: {detail}")
        if reason not in ERROR_REASONS:
            raise ValueError(f"unknown reason {reason!r}")
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    """What a file itself says; sizes are those of the picture as displayed, after rotation.

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

    Raises:
        VideoError: the file is missing, damaged, or holds no video.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise VideoError(path, "missing_file", "there is no such file; correct the path in the annotation")
        self._container, self._stream = self._open()
        try:
            self._time_stamps = self._read_time_stamps()
            self._turns, self.facts = self._measure()
        except BaseException:
            self._container.close()
            raise

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    def read(self, indices: Sequence[int] | np.ndarray, crop: tuple[int, int, int, int] | None = None) -> torch.Tensor:
        """Decode the named frames.

        Args:
            indices: ascending frame numbers; a number may come twice.
            crop: (x_start, x_end, y_start, y_end) in pixels of the displayed picture.

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
        region = self._region(crop)
        wanted = set(numbers)
        pictures = self._decode_from_key_frame(wanted, region)
        if wanted - pictures.keys():
            # Seeking may land behind the clip in damaged or odd files; from the start it is slow but sure.
            pictures = self._decode_from_start(wanted, region)
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
            container = av.open(f"file:{self.path}", options=options)
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
            if not stream.disposition & Disposition.attached_pic  # the cover of a song is no video
        ]
        if not streams:
            raise VideoError(self.path, "no_video_stream", "holds no video stream")
        codec = streams[0].codec_context
        if codec is None:
            raise VideoError(self.path, "undecodable", "is in a format that this build of FFmpeg cannot decode")
        if codec.height * codec.width > MAX_PIXELS:
            raise VideoError(
                self.path,
                "too_large",
                f"the header claims {codec.width} x {codec.height} pixels; at most {MAX_PIXELS} are read",
            )
        codec.thread_type = "AUTO"
        return streams[0]

    def _read_time_stamps(self) -> list[int] | None:
        """Presentation time stamps of all frames, ascending; None where they do not tell the frames apart."""
        stamps: list[int] = []
        try:
            for packet in self._container.demux(self._stream):
                if packet.size == 0 or packet.is_discard or packet.is_corrupt:
                    continue
                if packet.pts is None:
                    return None
                stamps.append(packet.pts)
        except _DECODER_ERRORS:
            pass  # a truncated file: the frames before the damage are still good
        stamps.sort()
        return stamps if len(set(stamps)) == len(stamps) else None

    def _measure(self) -> tuple[int, VideoFacts]:
        """Quarter turns counter-clockwise, and the facts; decodes the first frame."""
        rate = self._stream.average_rate or self._stream.guessed_rate or self._stream.base_rate
        if not rate or rate <= 0:
            raise VideoError(self.path, "no_fps", "does not say how many frames it shows per second")
        with contextlib.closing(self._all_frames()) as frames:
            first = next(frames, None)
            if first is None:
                raise VideoError(self.path, "no_frames", "holds no frame that can be decoded")
            count = 1 + sum(1 for _ in frames) if self._time_stamps is None else len(self._time_stamps)
        turns = round(first.rotation / 90) % 4
        self._coded_size = (first.height, first.width)
        height, width = self._coded_size[::-1] if turns % 2 else self._coded_size
        return turns, VideoFacts(height=height, width=width, fps=float(rate), num_frames=count)

    def _region(self, crop: tuple[int, int, int, int] | None) -> tuple[slice, slice]:
        if crop is None:
            return slice(None), slice(None)
        x_start, x_end, y_start, y_end = crop
        if x_end > self.facts.width or y_end > self.facts.height:
            raise VideoError(
                self.path,
                "bad_crop",
                f"crop {list(crop)} lies outside the picture of {self.facts.width} x {self.facts.height} pixels",
            )
        return slice(y_start, y_end), slice(x_start, x_end)

    def _decode_from_key_frame(self, wanted: set[int], region: tuple[slice, slice]) -> dict[int, np.ndarray]:
        if self._time_stamps is None:
            return {}
        numbers = {self._time_stamps[number]: number for number in wanted}
        pictures: dict[int, np.ndarray] = {}
        for frame in self._frames_from(min(numbers)):
            if frame.pts in numbers:
                pictures[numbers[frame.pts]] = self._picture(frame, region)
            if len(pictures) == len(wanted) or (frame.pts is not None and frame.pts > max(numbers)):
                break
        return pictures

    def _decode_from_start(self, wanted: set[int], region: tuple[slice, slice]) -> dict[int, np.ndarray]:
        # With time stamps, a frame that the decoder leaves out does not shift the numbers of those after it.
        numbers = None if self._time_stamps is None else {pts: n for n, pts in enumerate(self._time_stamps)}
        pictures: dict[int, np.ndarray] = {}
        with contextlib.closing(self._all_frames()) as frames:
            for count, frame in enumerate(frames):
                number = count if numbers is None else numbers.get(-1 if frame.pts is None else frame.pts, -1)
                if number in wanted:
                    pictures[number] = self._picture(frame, region)
                if len(pictures) == len(wanted):
                    break
        return pictures

    def _frames_from(self, pts: int) -> Iterator[av.VideoFrame]:
        """Decoded frames from the key frame at or before ``pts`` up to the first damage."""
        try:
            self._container.seek(pts, stream=self._stream, backward=True)
            yield from self._container.decode(self._stream)
        except _DECODER_ERRORS:
            return

    def _all_frames(self) -> Generator[av.VideoFrame, None, None]:
        """Decoded frames up to the first damage, the file opened afresh: not every format seeks to its start."""
        container, stream = self._open()
        with container:
            try:
                yield from container.decode(stream)
            except _DECODER_ERRORS:
                return

    def _picture(self, frame: av.VideoFrame, region: tuple[slice, slice]) -> np.ndarray:
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
            picture_HWC = frame.to_ndarray(format="rgb24")
        except _DECODER_ERRORS as error:
            raise VideoError(self.path, "undecodable", f"cannot be converted to RGB ({_plain(error)})") from error
        return np.ascontiguousarray(np.rot90(picture_HWC, self._turns)[region])


def _plain(error: BaseException) -> str:
    """The decoder's words without the path, which the message already names."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
