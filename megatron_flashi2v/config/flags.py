"""Words of a command line to values by the flags' names; any mistake is one line, like every other error."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from megatron_flashi2v.config.bounds import nearest
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.fields import Flag, Named, spelling
from megatron_flashi2v.config.help import metavar
from megatron_flashi2v.config.megatron_flags import habitual_flag

_FLAG = re.compile(r"--([A-Za-z][\w-]*)(?=$|[ =])")
_RULE = re.compile(r"[─-]{4,}")
_NUMBERS = {int: "a whole number", float: "a number"}


def parse_words(
    flags: Sequence[Flag], words: Sequence[str], defaults: Mapping[str, Any], *, prog: str
) -> dict[str, Any]:
    """Check and convert the words of a command line.

    Args:
        flags: the flags that there are.
        words: such as ``["--lr", "1e-4", "--no-bf16"]``.
        defaults: values of flags that are not given, by name; the others have their fields' defaults.
        prog: name of the command, for errors.

    Returns:
        Every flag's value, by name.

    Raises:
        ConfigError: a flag is unknown (with a suggestion), missing or malformed, or a word belongs to none.
    """
    given = _given(flags, words, prog)
    missing = [flag.spelling for flag in flags if flag.is_required and flag.name not in {*defaults, *given}]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given (see {prog} --help)")
    try:
        found = convert([flag for flag in flags if flag.name in given], words)
    except ConfigError as error:
        raise ConfigError(f"{error} (see {prog} --help)") from None
    return {flag.name: flag.default for flag in flags} | dict(defaults) | found


def convert(flags: Sequence[Flag], words: Sequence[str]) -> dict[str, Any]:
    """Convert the words of these flags, which all are given, by the flags' types.

    Raises:
        ConfigError: a value is malformed.
    """
    import tyro  # it takes longer to import than the help takes to print

    _check_words(flags, words)
    fields: list[Any] = []
    for flag in flags:
        named = tyro.conf.arg(name=flag.spelling.removeprefix("--"), metavar=_metavar(flag))
        # Without a default, tyro would require a word after a switch.
        field = dataclasses.field(default=False) if flag.kind is bool else dataclasses.field()
        fields.append((f"{flag.name}_", Annotated[flag.kind, named], field))
    flat = dataclasses.make_dataclass("Flags", fields, kw_only=True, frozen=True)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found: Any = tyro.cli(flat, args=list(words), prog="flashi2v")
    except SystemExit:
        raise ConfigError(_unboxed(said.getvalue())) from None
    return {flag.name: getattr(found, f"{flag.name}_") for flag in flags}


def _check_words(flags: Sequence[Flag], words: Sequence[str]) -> None:
    """Refuse what is no number, and an empty word in place of a path, which would mean the working directory."""
    kinds = {flag.spelling: _given_kind(flag.kind) for flag in flags}
    kind: Any = None
    name = ""
    for word in words:
        found = _FLAG.match(word)
        if found is not None:
            name = found[0].replace("_", "-")
            kind = kinds.get(name)
        value = word if found is None else word[found.end() + 1 :] if "=" in word else None
        if value is None:
            continue
        if not value and _takes_path(kind):
            raise ConfigError(f"{name} is empty; it must be a path (a shell variable that is not set leaves it empty)")
        if kind in _NUMBERS and value != "None":  # which takes back a recipe's number, where there may be none
            try:
                kind(value)
            except ValueError:
                raise ConfigError(f"{name} is {value!r}; it must be {_NUMBERS[kind]}") from None


def _takes_path(kind: Any) -> bool:
    return kind is Path or any(map(_takes_path, typing.get_args(kind)))


def _given_kind(kind: Any) -> Any:
    """The type of a value that is given, without None."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (one for one in typing.get_args(kind) if one is not type(None))
    return kind


def word_count(kind: Any) -> int | None:
    """Words that follow a flag of this type; None is any number."""
    kind = _given_kind(kind)
    if kind is bool:
        return 0
    if typing.get_origin(kind) is not tuple:
        return 1
    parts = typing.get_args(kind)
    return None if parts[-1:] == (Ellipsis,) else len(parts)


def _given(flags: Sequence[Flag], words: Sequence[str], prog: str) -> set[str]:
    """Names of the flags that the words give; a word too many, or missing, is blamed on the flag before it."""
    known = {flag.name: flag for flag in flags}
    kinds: dict[str, Any] = {flag.name: flag.kind for flag in flags}
    kinds |= {f"no_{flag.name}": bool for flag in flags if flag.kind is bool}
    given: set[str] = set()
    after, room, name = "", 0.0, ""

    def require_full() -> None:
        if 1 <= room < float("inf"):
            wanted = f"{spelling(name)} {metavar(known[name])}"
            raise ConfigError(f"{after}: a value is missing; give {wanted} (see {prog} --help)")

    for word in words:
        found = _FLAG.match(word)
        if found is None and room < 1:
            raise ConfigError(f"unexpected {word!r}{after and f' after {after}'}{_hint(word)} (see {prog} --help)")
        if found is None:
            after, room = f"{after} {word}", room - 1
            continue
        require_full()
        name = found[1].replace("-", "_")
        if name not in kinds:
            raise ConfigError(_unknown(found[0], [*kinds, "config", "help"], prog))
        count = word_count(kinds[name])
        after, room = word, float("inf") if count is None else count - ("=" in word)
        given.add(name if name in known else name.removeprefix("no_"))
    require_full()
    return given


def _unknown(flag: str, known: Sequence[str], prog: str) -> str:
    name = flag.removeprefix("--").replace("-", "_")
    instead = habitual_flag(name, prog)
    if instead is not None:
        return f"unknown flag {flag}{instead}"
    close = nearest(name, known)
    return f"unknown flag {flag}" + (f"; did you mean {spelling(close)}?" if close else f" (see {prog} --help)")


def _hint(word: str) -> str:
    return f"; a recipe is given by --config {word}" if word.endswith((".yaml", ".yml")) else ""


def _metavar(flag: Flag) -> str | None:
    return next((note.metavar for note in flag.notes if isinstance(note, Named)), None)


def _unboxed(box: str) -> str:
    """The first paragraph of tyro's message, which has a title and paragraphs between rules, in a frame."""
    paragraphs: list[list[str]] = [[]]
    for line in (line.strip("│╰╯ ") for line in box.splitlines()[1:]):
        if _RULE.fullmatch(line):
            paragraphs.append([])
        elif line:
            paragraphs[-1].append(line)
    first = next(filter(None, paragraphs), ["the flags cannot be understood"])
    text = " ".join(first).removeprefix("Error parsing ").partition(" Got errors:")[0].rstrip(".")
    return text.replace("{None}|", "")
