"""The annotations that may become samples, before any video file is looked at."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_flashi2v.config.prepare import EncodingConfig
from megatron_flashi2v.data.annotations import Entry, read_annotations
from megatron_flashi2v.data.clips import ClipSettings
from megatron_flashi2v.data.filters import FilterSettings, judge
from megatron_flashi2v.data.reasons import DroppedEntry


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What became of the annotations.

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


def select(config: EncodingConfig) -> Selection:
    """Read and filter the annotations.

    Raises:
        DataError: an annotation file is missing or malformed.
    """
    entries, malformed = read_annotations(config.sources().annotations)
    settings = filter_settings(config)
    candidates, filtered = [], []
    for entry in entries:
        drop = judge(entry, settings)
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


def filter_settings(config: EncodingConfig) -> FilterSettings:
    """What the configuration wants of a clip."""
    return FilterSettings(
        num_frames=config.num_frames,
        height=config.height,
        width=config.width,
        fps=config.fps,
        min_aspect=config.min_aspect,
        max_aspect=config.max_aspect,
        min_pixels=config.pixel_floor,
        too_long_factor=config.too_long_factor,
        min_motion=config.min_motion,
        max_motion=config.max_motion,
        rules=config.filter_rules,
    )


def clip_settings(config: EncodingConfig) -> ClipSettings:
    """What decides a sample's pixels."""
    return ClipSettings(wanted=filter_settings(config), seed=config.seed, interpolation=config.interpolation)
