"""The flags of a configuration: the fields of a dataclass and of the dataclasses inside it, as one flat list."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Named:
    """At a field: the name of its flag, where the field cannot have it (``from`` is a keyword)."""

    name: str
    metavar: str | None = None


@dataclass(frozen=True)
class HoldsPath:
    """At a field of text: it holds a path, alone or after a colon, in which ``~`` is the home folder."""


class Only:
    """At a dataclass inside another one: the fields that are flags there; the others keep their defaults."""

    def __init__(self, *names: str) -> None:
        self.names = names


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        name: with underscores.
        path: names of the fields that lead to its value, from the outermost dataclass on.
        kind: its type, such as ``int | None``.
        notes: metadata that the type is annotated with.
        group: the dataclass that defines it.
        default: its value if it is not given; ``dataclasses.MISSING`` if it must be given.
    """

    name: str
    path: tuple[str, ...]
    kind: Any
    notes: tuple[Any, ...]
    group: type
    default: Any

    @property
    def spelling(self) -> str:
        """As a user types it."""
        return spelling(self.name)

    @property
    def is_required(self) -> bool:
        """Whether it must be given."""
        return self.default is dataclasses.MISSING

    @property
    def help(self) -> str:
        """The docstring of its field, in one line."""
        texts = (field_docstrings(owner).get(self.path[-1], "") for owner in self.group.__mro__)
        return next(filter(None, texts), "")

    def value_in(self, config: Any) -> Any:
        """Its value in a configuration."""
        return functools.reduce(getattr, self.path, config)


def flags_of(cls: type) -> tuple[Flag, ...]:
    """The flags that a dataclass and the dataclasses inside it define."""
    return _cached_flags(cls)


@functools.cache
def _cached_flags(cls: type) -> tuple[Flag, ...]:
    return tuple(_flags(cls))


def _flags(cls: type) -> Iterator[Flag]:
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        kind, notes = _bare(hints[field.name])
        if dataclasses.is_dataclass(kind):
            wanted = next((note.names for note in notes if isinstance(note, Only)), None)
            for flag in flags_of(typing.cast(type, kind)):
                if wanted is None or flag.name in wanted:
                    yield dataclasses.replace(flag, path=(field.name, *flag.path))
            continue
        named = next((note.name for note in notes if isinstance(note, Named)), field.name)
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        yield Flag(named, (field.name,), kind, notes, cls, default)


def nested_dataclasses(cls: type) -> dict[str, Any]:
    """The dataclasses directly inside a dataclass, by field."""
    hints = typing.get_type_hints(cls, include_extras=True)
    kinds: dict[str, Any] = {field.name: _bare(hints[field.name])[0] for field in dataclasses.fields(cls)}
    return {name: kind for name, kind in kinds.items() if dataclasses.is_dataclass(kind)}


def spelling(name: str) -> str:
    """The flag of a name with underscores."""
    return f"--{name.replace('_', '-')}"


@functools.cache
def field_docstrings(cls: type) -> dict[str, str]:
    """The docstrings below the fields that a class itself defines, each in one line; empty without the source."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return {}
    (definition,) = ast.parse(textwrap.dedent(source)).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else None
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, str):
            texts[field.target.id] = " ".join(text.split())
    return texts


def _bare(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its notes, and the notes."""
    if typing.get_origin(kind) is typing.Annotated:
        return kind.__origin__, kind.__metadata__
    return kind, ()
