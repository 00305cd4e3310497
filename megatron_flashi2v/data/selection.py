"""The annotations that may become samples, before any video file is looked at."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_flashi2v.config.clips import EncodingArguments, FilterSettings, given
from megatron_flashi2v.data.annotations import Entry, read_annotations
from megatron_flashi2v.data.filters import judge
from megatron_flashi2v.data.reasons import DroppedEntry

MAX_FPS = 300.0
"""Annotated rates beyond this are looked up in the file."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Annotations by the outcome of the first filters.

    Attributes:
        entries: all that are well formed.
        malformed: the others.
        candidates: entries that pass the filters as far as their annotation tells.
        filtered: entries that do not.
    """

    entries: tuple[Entry, ...]
    malformed: tuple[DroppedEntry, ...]
    candidates: tuple[Entry, ...]
    filtered: tuple[DroppedEntry, ...]

    @property
    def total(self) -> int:
        """Annotations in all."""
        return len(self.entries) + len(self.malformed)


def select(arguments: EncodingArguments) -> Selection:
    """Read and filter the annotations.

    Raises:
        DataError: an annotation file is missing or malformed.
    """
    entries, malformed = read_annotations(given(arguments.sources.annotations, "--annotations"))
    candidates, filtered = [], []
    for entry in entries:
        drop = judge(_believed(entry, arguments.clips.wanted), arguments.clips.wanted)
        if drop is None:
            candidates.append(entry)
        else:
            filtered.append(entry.dropped(drop))
    return Selection(
        entries=tuple(entries),
        malformed=tuple(malformed),
        candidates=tuple(candidates),
        filtered=tuple(filtered),
    )


def _believed(entry: Entry, wanted: FilterSettings) -> Entry:
    """The annotation without a rate that says no more than that a header counts in small units of time."""
    absurd = entry.fps is not None and entry.fps > MAX_FPS
    if absurd and wanted.frame_picking == "time" and wanted.filter_rules == "corrected":
        return dataclasses.replace(entry, fps=None)
    return entry
