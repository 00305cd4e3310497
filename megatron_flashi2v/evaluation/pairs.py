"""Assigns videos to references."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SEEDED = re.compile(r"(?P<id>.+)-(?P<seed>\d+)")


@dataclass(frozen=True, kw_only=True)
class Group:
    """A reference and the videos sampled from its first frame.

    Attributes:
        reference: the real video.
        videos: at least one; several differ in their seed.
    """

    reference: Path
    videos: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """How two folders of videos correspond.

    Attributes:
        groups: in the order of the references' names.
        rule: "names" (ID.mp4 or ID-SEED.mp4 to the reference ID.mp4) or "order" (of the names).
        unpaired: files of either folder that have no counterpart.
    """

    groups: tuple[Group, ...]
    rule: str
    unpaired: tuple[Path, ...]

    @property
    def videos(self) -> int:
        """Videos in all groups."""
        return sum(len(group.videos) for group in self.groups)


def pair(videos: Sequence[Path], references: Sequence[Path]) -> Pairing:
    """Pair by name, or by order where no name matches.

    By order, videos named ID-SEED count as one image per ID if that gives as many images as references.

    Args:
        videos: in the order of their names.
        references: likewise.
    """
    named = {path.stem: path for path in references}
    matched: dict[Path, list[Path]] = {}
    for video in videos:
        reference = named.get(video.stem) or named.get(_id(video))
        if reference is not None:
            matched.setdefault(reference, []).append(video)
    if matched:
        return _pairing("names", [(reference, matched.get(reference, [])) for reference in references], videos)
    images = _images(videos, len(references))
    rows = [(reference, images[place] if place < len(images) else []) for place, reference in enumerate(references)]
    return _pairing("order", rows, videos)


def _images(videos: Sequence[Path], count: int) -> list[list[Path]]:
    """Videos by image: by ID if there are ``count`` of them, else each its own."""
    by_id: dict[str, list[Path]] = {}
    for video in videos:
        by_id.setdefault(_id(video), []).append(video)
    return list(by_id.values()) if len(by_id) == count else [[video] for video in videos]


def _pairing(rule: str, rows: Sequence[tuple[Path, list[Path]]], videos: Sequence[Path]) -> Pairing:
    groups = tuple(
        Group(reference=reference, videos=tuple(sorted(members, key=_seed))) for reference, members in rows if members
    )
    used = {video for group in groups for video in group.videos}
    unpaired = [video for video in videos if video not in used]
    unpaired += [reference for reference, members in rows if not members]
    return Pairing(groups=groups, rule=rule, unpaired=tuple(unpaired))


def _id(video: Path) -> str:
    found = _SEEDED.fullmatch(video.stem)
    return found["id"] if found else video.stem


def _seed(video: Path) -> tuple[int, str]:
    found = _SEEDED.fullmatch(video.stem)
    return (int(found["seed"]) if found else -1), video.name
