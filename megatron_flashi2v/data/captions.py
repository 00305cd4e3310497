"""Captions of which cleaning leaves little: told before work begins, and counted while it is done."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from megatron_flashi2v.config.clips import CaptionSettings
from megatron_flashi2v.data.annotations import Entry
from megatron_flashi2v.encoders.text_cleaning import clean_text, lost_most
from megatron_flashi2v.runtime.logging import AGREED
from megatron_flashi2v.runtime.text import excerpt

LOOKED_AT = 256
"""Annotations, evenly spread, whose captions are cleaned before work begins."""
_SHOWN = 60

logger = logging.getLogger(__name__)


def example_of(raw: str, cleaned: str) -> str:
    """A caption before and after, shortened."""
    return f"{excerpt(raw, _SHOWN)!r} becomes {excerpt(cleaned, _SHOWN)!r}"


def warn_of_emptied(entries: Sequence[Entry], settings: CaptionSettings) -> None:
    """Say once, from a look at some of the captions, that cleaning takes more than half of their letters.

    All ranks see the same entries; rank 0 alone says it.
    """
    step = -(-len(entries) // LOOKED_AT) or 1
    captions = [entry.captions[0] for entry in entries[::step] if entry.captions]
    pairs = [(raw, clean_text(raw, settings.text_cleaning)) for raw in captions]
    emptied = [pair for pair in pairs if lost_most(*pair)]
    if emptied:
        logger.warning(
            "of %d captions that were looked at, cleaning takes more than half of the letters of %d: %s; "
            "--text-cleaning light keeps them",
            len(captions), len(emptied), example_of(*emptied[0]), extra=AGREED,
        )  # fmt: skip
