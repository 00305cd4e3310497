"""``--data-path``: one folder, or several with weights, in Megatron's habit (``0.7 FOLDER 0.3 FOLDER``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_flashi2v.config.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class WeightedFolder:
    """One data set of a blend, and its share of the samples relative to the others."""

    folder: Path
    weight: float = 1.0


def parse_blend(values: Sequence[str], flag: str = "--data-path") -> tuple[WeightedFolder, ...]:
    """Read the value of ``--data-path``.

    Args:
        values: one folder, or weights and folders in turn.
        flag: name of the flag.

    Raises:
        ConfigError: nothing is named, a weight is missing or not a number above 0, or a folder is named twice.
    """
    if not values:
        raise ConfigError(f"{flag} is not set; give the folder that `flashi2v prepare` wrote")
    shown = " ".join(values)
    if len(values) == 1:
        return (WeightedFolder(folder=Path(values[0])),)
    if len(values) % 2:
        raise ConfigError(
            f"{flag} {shown}: {len(values)} words; give one folder, or a weight before each folder, such as "
            "0.7 FOLDER 0.3 FOLDER"
        )
    parts = tuple(
        WeightedFolder(folder=Path(folder), weight=_weight(weight, f"{flag} {shown}"))
        for weight, folder in zip(values[::2], values[1::2], strict=True)
    )
    if len({part.folder for part in parts}) < len(parts):
        raise ConfigError(f"{flag} {shown}: names a folder twice; name it once with the sum of its weights")
    return parts


def _weight(text: str, shown: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise ConfigError(
            f"{shown}: {text!r} must be a weight; give a number above 0 before each folder, "
            "such as 0.7 FOLDER 0.3 FOLDER"
        )
    return weight
