"""References compiled by torch, forward and backward: what the hand-written kernels must beat."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def compiled(reference: Callable[..., Any]) -> Callable[..., Any]:
    """``reference`` by ``torch.compile``; the same object at each call, so that it compiles once.

    A second number of tokens makes that number symbolic. With ``fullgraph`` torch raises where it would otherwise go
    on uncompiled, such as past its limit of variants of a function.
    """
    return torch.compile(reference, fullgraph=True)
