"""Prompts to text rows, and the prompts that guidance steers away from.

Shape suffixes: B samples, L text rows, D text width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.conversion.weights import NEGATIVE_PROMPT
from megatron_flashi2v.data.prepared import pad_text_rows
from megatron_flashi2v.encoders.text_cleaning import (
    POLICIES,
    CleaningPolicy,
    clean_prompt,
    lost_most,
    require_words,
)
from megatron_flashi2v.runtime.logging import AGREED, ONCE
from megatron_flashi2v.runtime.text import excerpt

logger = logging.getLogger(__name__)

DEFAULT_NEGATIVE_PROMPT = (
    "low quality, blurry, noisy, compression artifacts, flicker, frozen picture, washed out colors, "
    "deformed bodies, extra fingers, subtitles, logo, watermark"
)
"""Guidance steers away from it unless the user gives another one, or the release has its own."""


def text_or_file(given: str, flag: str) -> str:
    """A prompt as it is given, or the text of the file that it names as ``@FILE``.

    Raises:
        ConfigError: there is no such file, or it is no text in UTF-8.
    """
    if not given.startswith("@"):
        return given
    path = Path(given[1:]).expanduser()
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{flag} {given}: cannot be read ({error}); after @ give a file of text in UTF-8, or give the prompt itself"
        ) from error


def negative_prompt_of(state: Mapping[str, Any], given: str | None = None) -> str:
    """What guidance steers away from: the prompt that is given, or that the model has, or ours.

    Args:
        state: what is recorded with the model.
        given: the prompt, or ``@FILE``.

    Raises:
        ConfigError: the file cannot be read.
    """
    if given is not None:
        return text_or_file(given, "--negative-prompt")
    recorded = state.get(NEGATIVE_PROMPT)
    return recorded if isinstance(recorded, str) else DEFAULT_NEGATIVE_PROMPT


def require_prompt(text: str, cleaning: str, what: str = "prompt") -> None:
    """Refuse, before the weights are read, a prompt of which the model would see nothing; warn once of little.

    Args:
        text: of the prompt.
        cleaning: with which the model was trained.
        what: the prompt is called.

    Raises:
        ConfigError: text cleaning empties it.
    """
    policy = next((policy for policy in POLICIES if policy == cleaning), None)
    if policy is None:
        return
    cleaned = require_words(text, policy, what)
    if lost_most(text, cleaned):
        logger.warning(
            "text cleaning %s, with which the model was trained, takes more than half of the letters of the %s: "
            "%r becomes %r (told once)", policy, what, excerpt(text), excerpt(cleaned), extra={**AGREED, **ONCE},
        )


class RowsOfText(Protocol):
    """A text encoder, such as :class:`~megatron_flashi2v.encoders.text.TextEncoder`."""

    text_dim: int

    def encode(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """One ``[L, D]`` tensor for each cleaned prompt."""


def encode_prompts(
    text_encoder: RowsOfText, prompts: Sequence[str], cleaning: CleaningPolicy, length: int, what: str = "prompt"
) -> torch.Tensor:
    """Text rows ``[B, L, D]`` of cleaned prompts, with zeros after each one's last up to ``length``.

    Raises:
        ConfigError: cleaning empties a prompt; ``what`` it is called.
    """
    rows_LD = text_encoder.encode([clean_prompt(prompt, cleaning, what) for prompt in prompts])
    return torch.stack([pad_text_rows(rows, length) for rows in rows_LD])
