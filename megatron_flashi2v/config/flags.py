"""Command-line flags to a dataclass; whatever is wrong with them is told in one line, like every other error."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import tyro

from megatron_flashi2v.config.errors import ConfigError

Config = TypeVar("Config")

_FLAG = re.compile(r"--([A-Za-z][\w-]*)(?=$|[ =])")
_RULE = re.compile(r"[─-]{4,}")


def parse_flags(cls: type[Config], flags: Sequence[str], *, prog: str, **options: Any) -> Config:
    """``tyro.cli`` with our errors.

    Args:
        cls: a dataclass, or a dataclass of dataclasses whose fields together name the flags.
        flags: the arguments.
        prog: what the help calls the command.
        options: further arguments of ``tyro.cli``.

    Raises:
        ConfigError: a flag is unknown (with a suggestion), missing or malformed.
        SystemExit: the help was asked for, and has been printed.
    """
    _refuse_unknown(cls, flags)
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(cls, args=list(flags), prog=prog, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(f"{_unboxed(told.getvalue(), flags)} (see {prog} --help)") from None


def flag_types(cls: type) -> Iterator[tuple[str, Any]]:
    """Name, with underscores, and type of each flag that the dataclass and the dataclasses inside it define."""
    return ((flag, kind) for _, flag, kind in flag_fields(cls))


def flag_fields(cls: type) -> Iterator[tuple[str, str, Any]]:
    """Name of the field, name of its flag, with underscores, and type, of each flag as in :func:`flag_types`."""
    for name, flag, kind in named_fields(cls):
        if dataclasses.is_dataclass(kind):
            yield from flag_fields(typing.cast(type, kind))
        else:
            yield name, flag, kind


def named_fields(cls: type) -> Iterator[tuple[str, str, Any]]:
    """Each field of the dataclass itself: its name, its flag's with underscores, and its type."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        names = (getattr(note, "name", None) for note in getattr(kind, "__metadata__", ()))
        yield field.name, next(filter(None, names), field.name), kind


def suggestion(name: str, known: Iterable[str]) -> str:
    """``"; did you mean ...?"`` with the known name that is nearest, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _refuse_unknown(cls: type, flags: Sequence[str]) -> None:
    types = dict(flag_types(cls))
    known = {"help", *types, *(f"no_{name}" for name, kind in types.items() if kind is bool)}
    for flag in flags:
        found = _FLAG.match(flag)
        if found and found[1].replace("-", "_") not in known:
            spelt = sorted(f"--{name.replace('_', '-')}" for name in known)
            raise ConfigError(f"unknown flag {found[0]}{suggestion(found[0], spelt)}")


def _unboxed(box: str, flags: Sequence[str]) -> str:
    """The gist of what tyro prints: a title, then paragraphs between rules, framed."""
    paragraphs: list[list[str]] = [[]]
    for line in (line.strip("│╰╯ ") for line in box.splitlines()[1:]):
        if _RULE.fullmatch(line):
            paragraphs.append([])
        elif line:
            paragraphs[-1].append(line)
    first = next(filter(None, paragraphs), ["the flags cannot be understood"])
    if first[0].startswith("Missing from"):
        missing = [found[0] for line in first[1:] if (found := _FLAG.match(line))]
        return f"{', '.join(missing)} must be given"
    text = " ".join(first).removeprefix("Error parsing ").partition(" Got errors:")[0].rstrip(".")
    if text.startswith("Unrecognized options: "):
        word = text.removeprefix("Unrecognized options: ").split(",")[0]
        return f"unexpected {word!r}{_after(word, flags)}"
    return text


def _after(word: str, flags: Sequence[str]) -> str:
    """Where a word that belongs to no flag stands."""
    place = list(flags).index(word) if word in flags else 0
    return f" after {flags[place - 1]}" if place else ""
