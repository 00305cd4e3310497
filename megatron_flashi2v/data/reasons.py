"""Reasons why an annotation gave no sample: a closed list of names, which summaries count and compare."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.runtime.text import shown

FILTER_REASONS = {
    "no_cap": "no caption",
    "no_resolution": "no resolution in the annotation",
    "aspect_mismatch": "height / width outside the accepted range",
    "res_too_small": "too few pixels",
    "too_long": "clip too long",
    "fps_too_low": "fewer frames per second than asked for",
    "too_slow": "too little motion",
    "too_fast": "too much motion",
    "no_motion": "no motion score, though a range of motion is asked for",
    "too_short": "too few frames at the asked rate",
}
"""Rules on an annotation's facts; the first eight that apply have the reference's names."""

ERROR_REASONS = {
    "malformed_entry": "a field of the annotation is missing or has another type than it must",
    "missing_file": "the video file does not exist",
    "unreadable": "not a video file, or its header is damaged",
    "no_video_stream": "the file holds no video stream",
    "no_frames": "the video stream holds no frames",
    "no_fps": "the file does not say its frame rate",
    "too_large": "the header claims an absurd picture size",
    "fps_mismatch": "the file's frame rate is another one than the annotation's",
    "truncated": "the file ends before the annotated clip does",
    "undecodable": "frames cannot be decoded",
    "size_changed": "the picture size changes inside the clip",
    "unsupported_picture": "the picture is in a form whose colours or transparency cannot be shown right",
    "bad_crop": "the annotated crop lies outside the picture",
    "decoder_crash": "the decoder crashed on the file; its process was restarted",
    "decoder_hang": "the decoder passed its time limit on the file; its process was restarted",
    "not_finite": "the encoders gave values that are not finite",
}
"""Damage: of an annotation or a file."""

REASONS = {**FILTER_REASONS, **ERROR_REASONS}


class FileError(DataError):
    """A video or picture file cannot give a clip.

    Attributes:
        reason: one of :data:`ERROR_REASONS`.
    """

    def __init__(self, path: Path, reason: str, detail: str) -> None:
        super().__init__(f"{path}: {detail}")
        if reason not in ERROR_REASONS:
            raise ValueError(f"unknown reason {reason!r}")
        self.reason = reason


@dataclass(frozen=True)
class Drop:
    """Why something was dropped.

    Attributes:
        reason: one of :data:`REASONS`.
        detail: names the field or file, its value and the rule; kept as it may be shown.
    """

    reason: str
    detail: str

    def __post_init__(self) -> None:
        if self.reason not in REASONS:
            raise ValueError(f"unknown drop reason {self.reason!r}")
        object.__setattr__(self, "detail", shown(self.detail))

    @property
    def is_error(self) -> bool:
        """Return whether something is damaged, rather than merely unwanted."""
        return self.reason in ERROR_REASONS


@dataclass(frozen=True, kw_only=True)
class DroppedEntry:
    """One annotation that gave no sample.

    Attributes:
        entry: number of the annotation over all annotation files, from 0.
        source: annotation file and number in it, for people.
        path: the video's path as annotated; empty where there is none.
        reason: one of :data:`REASONS`.
        detail: names the field or file, its value and the rule.
    """

    entry: int
    source: str
    path: str
    reason: str
    detail: str

    def __post_init__(self) -> None:
        for name in ("source", "path", "detail"):
            object.__setattr__(self, name, shown(getattr(self, name)))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)
