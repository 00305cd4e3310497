"""The text of a command's ``--help``: the everyday flags first, then all others by subject."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_flashi2v.config.bounds import BOUNDS, AtLeast
from megatron_flashi2v.config.fields import Flag, HoldsPath, Named, flags_of

COLUMN = 30
"""Where explanations begin, in characters."""
WIDEST = 120
OBVIOUS = (AtLeast(1),)
"""Bounds that go without saying."""
CONFIG_HELP = "Recipe: a YAML file with the flags' names as keys; flags win over it."
WORDS: dict[Any, str] = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}


def help_text(cls: type, prog: str, description: str, recipe: Mapping[str, Any]) -> str:
    """The text that ``--help`` prints.

    Args:
        cls: a dataclass, or a dataclass of dataclasses, whose fields name the flags.
        prog: name of the command.
        description: of the command, in a sentence.
        recipe: values by flag that are shown as defaults, instead of the fields' own.
    """
    flags = {flag.name: flag for flag in flags_of(cls)}
    everyday = [flags.pop(name) for name in getattr(cls, "everyday", ())]
    sections = {"Everyday flags": [_entry(flag, recipe) for flag in everyday]}
    sections["Everyday flags"].append(_laid_out("--config FILE", CONFIG_HELP))
    for flag in flags.values():
        sections.setdefault(_title(flag.group), []).append(_entry(flag, recipe))
    usage = " ".join(f"{flag.spelling} {metavar(flag)}" for flag in everyday if flag.is_required)
    lines = [f"usage: {prog} {usage and usage + ' '}[FLAGS]", "", *_wrapped(description, 0), ""]
    for title, entries in sections.items():
        lines += [f"{title}:", *(line for entry in entries for line in entry), ""]
    if any(flag.kind is bool for flag in flags_of(cls)):
        lines += ["A switch --x is turned off again by --no-x.", ""]
    return "\n".join(lines)


def metavar(flag: Flag) -> str:
    """The words after the flag, such as ``INT``; empty for a switch."""
    given = next((note.metavar for note in flag.notes if isinstance(note, Named)), None)
    if given is None and any(isinstance(note, HoldsPath) for note in flag.notes):
        return _words(flag.kind).replace(WORDS[str], WORDS[Path])
    return given or _words(flag.kind)


def show(text: str) -> None:
    """Print on standard output; a reader that leaves early, as ``head`` does, is no error."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _title(group: type) -> str:
    """First sentence of the dataclass that defines the flags."""
    return " ".join((group.__doc__ or group.__name__).split("\n\n")[0].split()).rstrip(".")


def _words(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Annotated:
        kind = kind.__origin__
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (one for one in typing.get_args(kind) if one is not type(None))
    if kind is bool:
        return ""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return "{" + ",".join(map(str, parts)) + "}"
    if typing.get_origin(kind) is tuple:
        return f"{_words(parts[0])} ..." if parts[-1:] == (Ellipsis,) else " ".join(map(_words, parts))
    return WORDS.get(kind, "VALUE")


def _entry(flag: Flag, recipe: Mapping[str, Any]) -> list[str]:
    bounds = [note for note in flag.notes if isinstance(note, BOUNDS) and note not in OBVIOUS]
    default = recipe.get(flag.name, flag.default)
    facts = []
    if flag.is_required and flag.name not in recipe:
        facts.append("required")
    elif default is not None and default is not False and default not in ("", ()):
        facts.append(f"default {' '.join(map(str, default)) if isinstance(default, tuple) else default}")
    if bounds:
        facts.append(" and ".join(bound.rule for bound in bounds))
    text = flag.help + (f" ({'; '.join(facts)})" if facts else "")
    return _laid_out(f"{flag.spelling} {metavar(flag)}".rstrip(), text)


def _laid_out(head: str, text: str) -> list[str]:
    """A flag, and its explanation beside or below it."""
    explained = _wrapped(text, COLUMN)
    head = f"  {head}"
    if len(head) + 2 <= COLUMN and explained:
        explained[0] = head.ljust(COLUMN) + explained[0][COLUMN:]
        return explained
    return [head, *explained]


def _wrapped(text: str, indent: int) -> list[str]:
    width = min(WIDEST, max(60, shutil.get_terminal_size((100, 24)).columns))
    space = " " * indent
    return textwrap.wrap(text, width, initial_indent=space, subsequent_indent=space, break_on_hyphens=False)
