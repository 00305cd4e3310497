"""Pairs of experts: the noise levels that each was trained on, and that neither stands in the other's place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.conversion.containers import EXPERTS

Range = tuple[float, float]
"""Lowest and highest sigma."""
WHOLE: Range = (0.0, 1.0)
PLACES = {EXPERTS[0]: 0, "transformer": 0, EXPERTS[1]: 1, "transformer_2": 1}
"""Places in a pair by the names of folders in Wan's and diffusers' layouts: 0 for high noise, 1 for low."""


def trained_range(state: Mapping[str, Any]) -> Range:
    """What a model was trained on, as its run recorded it; all where it did not."""
    config = state.get("config")
    config = config if isinstance(config, Mapping) else {}
    return float(config.get("sigma_min", WHOLE[0])), float(config.get("sigma_max", WHOLE[1]))


def range_record(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same record for weights that are written elsewhere; empty where a model was trained on all levels."""
    low, high = trained_range(state)
    return {} if (low, high) == WHOLE else {"config": {"sigma_min": low, "sigma_max": high}}


def require_places(high: Path, low: Path, ranges: tuple[Range, Range], flags: tuple[str, str]) -> None:
    """Refuse experts in each other's place, and one given twice.

    Args:
        high: folder of the expert for high noise.
        low: of the other.
        ranges: that they were trained on.
        flags: that named them.

    Raises:
        CheckpointError: their training or their folders' names tell that they are no pair in this order.
    """
    (high_from, high_to), (low_from, low_to) = ranges
    if high.resolve() == low.resolve():
        raise CheckpointError(f"{' and '.join(flags)} both give {high}; a pair has two experts")
    if high_to < WHOLE[1] or low_from > WHOLE[0]:
        raise CheckpointError(
            f"{flags[0]} {high} was trained on noise levels from {high_from:g} to {high_to:g}, {flags[1]} {low} on "
            f"{low_from:g} to {low_to:g}; the first must reach 1 and the second 0: were they swapped?"
        )
    if high.parent.resolve() == low.parent.resolve() and PLACES.get(high.name, 0) > PLACES.get(low.name, 1):
        raise CheckpointError(
            f"{flags[0]} {high} is the expert for low noise by its folder's name, and {flags[1]} {low} the one for "
            "high; swap them"
        )


def other_expert(folder: Path) -> Path | None:
    """The other one of a pair, where a folder is one of two beside each other."""
    names = [name for name, place in PLACES.items() if place != PLACES.get(folder.name, place)]
    found = (folder.with_name(name) for name in names)
    return next((path for path in found if path.is_dir()), None)
