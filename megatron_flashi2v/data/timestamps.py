"""When each frame of a file is shown, from the packets' time stamps rather than from what its header claims."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import av
import numpy as np
from numpy.typing import NDArray

REGULAR_TOLERANCE = 0.25
"""Frames are evenly spaced if none is farther from its place than this share of their distance."""


def packet_stamps(packets: Iterable[av.Packet], *, ordered: bool) -> list[int] | None:
    """Presentation time stamps of all frames, ascending, read without decoding.

    Args:
        packets: of one stream, in the order of decoding.
        ordered: refuse stamps of a file in which time begins anew (joined recordings).

    Returns:
        None where they do not tell the frames apart.
    """
    stamps: list[int] = []
    latest: int | None = None
    for packet in packets:
        if packet.size == 0 or packet.is_discard or packet.is_corrupt:
            continue
        if packet.pts is None:
            return None
        if ordered and packet.dts is not None:
            if latest is not None and packet.dts < latest:
                return None
            latest = packet.dts
        stamps.append(packet.pts)
    stamps.sort()
    return stamps if len(set(stamps)) == len(stamps) else None


def is_regular(times_s: NDArray[np.float64], fps: float | None) -> bool:
    """Return whether frames come at the rate ``fps`` without a gap."""
    if not fps:
        return False
    places = (times_s - times_s[:1]) * fps
    return bool(np.all(np.abs(places - np.arange(len(times_s))) <= REGULAR_TOLERANCE))


def mean_rate(times_s: NDArray[np.float64], claimed: float | None) -> float | None:
    """Frames per second over the whole file: what the header claims, unless the time stamps tell another story.

    Args:
        times_s: ascending.
        claimed: by the header.
    """
    span = float(times_s[-1] - times_s[0]) if len(times_s) > 1 else 0.0
    intervals = len(times_s) - 1
    if span <= 0 or (claimed and abs(intervals / claimed - span) <= 0.5 / claimed):
        return claimed
    return intervals / span


def typical_rate(times_s: NDArray[np.float64]) -> float | None:
    """Frames per second where no frame is missing; None for fewer than two frames."""
    if len(times_s) < 2:
        return None
    distances = np.diff(times_s)
    # A mean, as containers may round each time to a millisecond; of all that are no gaps.
    return 1 / float(distances[distances <= 1.5 * np.median(distances)].mean())


def times_from_stamps(stamps: Sequence[int | None], time_base: float) -> NDArray[np.float64]:
    """Seconds from the first frame."""
    values = np.array(stamps, np.int64)
    return (values - values[0]) * time_base
