"""Random numbers that depend on their purpose, never on the rank that draws them.

A seed is the BLAKE2b digest of (seed, purpose, position): two layouts that see the same sample draw the same numbers,
and any draw can be repeated without the draws before it.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def keyed_seed(seed: int, purpose: str, *position: int | str) -> int:
    """A 63-bit seed for one draw.

    Args:
        seed: the run's seed.
        purpose: of the draw, such as "noise" or "weights"; different purposes are independent.
        position: of the draw, such as the sample's number in the global order, or a parameter's name.

    Returns:
        An integer in [0, 2**63), the same on every machine and in every version of Python.

    Raises:
        TypeError: a part is neither an int nor a str (a float's digits, or a bool's name, are no stable key).
    """
    digest = hashlib.blake2b(digest_size=8, person=b"flashi2v")
    for part in (seed, purpose, *position):
        if isinstance(part, bool) or not isinstance(part, (int, str)):
            raise TypeError(f"a key part is {part!r} ({type(part).__name__}); it must be an int or a str")
        kind = b"s" if isinstance(part, str) else b"i"
        text = str(part).encode("utf-8")
        # Kind and length come first, so that ("a", "bc"), ("ab", "c"), 1 and "1" are different keys.
        digest.update(kind + len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest(), "little") >> 1


def keyed_generator(seed: int, purpose: str, *position: int | str) -> torch.Generator:
    """A host (CPU) generator seeded with :func:`keyed_seed`; draw on the host, then move to the device."""
    import torch

    generator = torch.Generator(device="cpu")
    generator.manual_seed(keyed_seed(seed, purpose, *position))
    return generator
