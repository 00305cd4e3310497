"""What a model computes of a text alone, the same at every step of sampling, kept from one step to the next."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor, nn

Known = dict[nn.Module, Any]
"""Results of layers for one text."""

TEXTS = 2
"""Guidance's two; the oldest is forgotten for the next one."""


class TextMemory:
    """Results of the texts that a model samples with: the embedding, and every block's keys and values.

    They stay true while the weights and the texts' tensors keep their numbers. A text takes the memory of its keys and
    values in all blocks: 94 MB for 1.3b in bf16, divided as the model is.
    """

    def __init__(self) -> None:
        self._texts: deque[tuple[Tensor, Known]] = deque(maxlen=TEXTS)

    def of(self, text_BLX: Tensor) -> Known:
        """Results for this very tensor; none yet for one that is met for the first time."""
        for text, known in self._texts:
            if text is text_BLX:
                return known
        self._texts.append((text_BLX, {}))
        return self._texts[-1][1]
