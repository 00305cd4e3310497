"""Bounds that stand at a field, such as ``lr: Annotated[float, AtLeast(0)]``, and the walker that checks them all."""

from __future__ import annotations

import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.fields import Flag, HoldsPath, flags_of

CLOSE = 0.8
"""Likeness, from 0 to 1, from which a name is suggested for another; less misleads more than it helps."""


class Bound(Protocol):
    """A rule for one value."""

    @property
    def rule(self) -> str:
        """The words after "it must be"."""

    def holds(self, value: Any) -> bool:
        """Whether a value keeps the rule."""


@dataclass(frozen=True)
class AtLeast:
    """A number that is not less."""

    least: float

    @property
    def rule(self) -> str:
        """As of :class:`Bound`."""
        return f"at least {self.least:g}"

    def holds(self, value: Any) -> bool:
        """As of :class:`Bound`."""
        return value >= self.least


@dataclass(frozen=True)
class Above:
    """A number that is greater."""

    limit: float

    @property
    def rule(self) -> str:
        """As of :class:`Bound`."""
        return f"above {self.limit:g}"

    def holds(self, value: Any) -> bool:
        """As of :class:`Bound`."""
        return value > self.limit


@dataclass(frozen=True)
class Below:
    """A number that is less."""

    limit: float

    @property
    def rule(self) -> str:
        """As of :class:`Bound`."""
        return f"below {self.limit:g}"

    def holds(self, value: Any) -> bool:
        """As of :class:`Bound`."""
        return value < self.limit


@dataclass(frozen=True)
class Within:
    """A number between two others, or one of these."""

    least: float
    most: float

    @property
    def rule(self) -> str:
        """As of :class:`Bound`."""
        return f"between {self.least:g} and {self.most:g}"

    def holds(self, value: Any) -> bool:
        """As of :class:`Bound`."""
        return self.least <= value <= self.most


class OneOf:
    """A word of a list."""

    def __init__(self, *choices: str) -> None:
        self.choices = choices

    @property
    def rule(self) -> str:
        """As of :class:`Bound`."""
        return f"one of {', '.join(self.choices)}"

    def holds(self, value: Any) -> bool:
        """As of :class:`Bound`."""
        return value in self.choices


@dataclass(frozen=True)
class EndsWith:
    """A path of a certain suffix, in small or large letters."""

    suffix: str

    @property
    def rule(self) -> str:
        """As of :class:`Bound`."""
        return f"a file that ends in {self.suffix}"

    def holds(self, value: Any) -> bool:
        """As of :class:`Bound`."""
        return str(value).lower().endswith(self.suffix)


@dataclass(frozen=True)
class Matches:
    """A word of a certain form.

    Attributes:
        pattern: regular expression of the whole word.
        form: for the error.
    """

    pattern: str
    form: str

    @property
    def rule(self) -> str:
        """As of :class:`Bound`."""
        return self.form

    def holds(self, value: Any) -> bool:
        """As of :class:`Bound`."""
        return re.fullmatch(self.pattern, str(value)) is not None


_NAME_BYTES, _PATH_BYTES = 255, 3800
"""Linux takes paths of 4,095 bytes; the rest is for the names of files in a folder."""

BOUNDS = (AtLeast, Above, Below, Within, OneOf, EndsWith, Matches)


def check_bounds(config: Any, *, as_flags: bool = True) -> None:
    """Check every bound of a dataclass and of the dataclasses inside it; and that numbers are finite numbers.

    Args:
        config: the dataclass. A value of None is one that was not given.
        as_flags: name the flag in the error; otherwise the field, for what a Python call was given.

    Raises:
        ConfigError: names the flag or field, its value and the rule.
    """
    for flag in flags_of(type(config)):
        check_value(flag, flag.value_in(config), flag.spelling if as_flags else flag.path[-1])


def check_value(flag: Flag, value: Any, name: str) -> None:
    """Check the bounds of one value.

    Args:
        flag: whose value.
        value: None is one that was not given.
        name: what the error calls it.

    Raises:
        ConfigError: as for :func:`check_bounds`.
    """
    for kind, notes, part in _parts(flag.kind, flag.notes, value):
        bounds = [note for note in notes if isinstance(note, BOUNDS)]
        rule = _broken_type(kind, part)
        if rule is None and kind is Path:
            rule = _broken_path(str(part))
        elif rule is None and any(isinstance(note, HoldsPath) for note in notes):
            rule = _broken_path(str(part).rpartition(":")[2])
        if rule is None and not all(bound.holds(part) for bound in bounds):
            rule = " and ".join(bound.rule for bound in bounds)
        if rule is not None:
            choices = [choice for bound in bounds if isinstance(bound, OneOf) for choice in bound.choices]
            shown = repr(part) if isinstance(part, str) else part
            raise ConfigError(f"{name} is {shown}; it must be {rule}{suggestion(str(part), choices)}")


def suggestion(name: str, known: typing.Iterable[str]) -> str:
    """``"; did you mean ...?"`` with the known name that is nearest, or nothing where none is near."""
    close = nearest(name, known)
    return f"; did you mean {close}?" if close else ""


def nearest(name: str, known: typing.Iterable[str]) -> str | None:
    """The known name that is nearest, or has the same letters in another order; None where none is near."""
    names = list(known)
    shuffled = (one for one in names if sorted(one) == sorted(name))
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=CLOSE)), None) or next(shuffled, None)


def _parts(kind: Any, notes: tuple[Any, ...], value: Any) -> Iterator[tuple[Any, tuple[Any, ...], Any]]:
    """A value, or the parts of a tuple, each with its type and its notes."""
    if value is None:
        return
    if typing.get_origin(kind) is typing.Annotated:
        kind, notes = kind.__origin__, notes + kind.__metadata__
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (one for one in typing.get_args(kind) if one is not type(None))
    if typing.get_origin(kind) is not tuple or not isinstance(value, (tuple, list)):
        yield kind, notes, value
        return
    of = typing.get_args(kind)
    of = of[:1] * len(value) if of[-1:] == (Ellipsis,) else of
    for one, part in zip(of, value, strict=False):
        yield from _parts(one, notes, part)


def _broken_type(kind: Any, value: Any) -> str | None:
    """The rule that a value breaks by its type: JSON and Python calls can hold anything in place of a number."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if kind is int and not is_whole:
        return "a whole number"
    if kind is float and not (is_whole or isinstance(value, float)):
        return "a number"
    return "a finite number" if kind is float and not math.isfinite(value) else None


def _broken_path(path: str) -> str | None:
    """The rule that a path breaks where no file can have it: it would be found only when the file is wanted."""
    if not path:
        return "a path that is not empty"
    if "\0" in path:
        return "a path without the character of code 0"
    longest = max((len(os.fsencode(name)) for name in path.split("/")), default=0)
    if longest > _NAME_BYTES or len(os.fsencode(path)) > _PATH_BYTES:
        return f"a path of at most {_PATH_BYTES} bytes, each name in it of at most {_NAME_BYTES}"
    return None
