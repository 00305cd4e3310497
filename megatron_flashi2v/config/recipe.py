"""Recipes, flags and keyword arguments: one flat list of names, from which a nested configuration is built.

A recipe is a YAML file whose keys are the flags' names. :func:`parse` reads it, with flags that win over it, and so
does ``from_recipe``; ``from_flags`` takes the same names from Python.
"""

from __future__ import annotations

import reprlib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from megatron_flashi2v.config.bounds import check_bounds, check_value, suggestion
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.fields import Flag, HoldsPath, flags_of, nested_dataclasses
from megatron_flashi2v.config.flags import convert, parse_words, word_count
from megatron_flashi2v.config.help import help_text, show
from megatron_flashi2v.config.megatron_flags import habitual_flag

Config = TypeVar("Config")


class FlagNames:
    """Gives a configuration constructors that take the flat names of flags and recipes, and checks its bounds."""

    command: ClassVar[str] = "flashi2v"
    """The command whose ``--help`` explains the names, such as ``flashi2v train``."""
    everyday: ClassVar[tuple[str, ...]] = ()
    """Names of the flags that the help lists first."""

    def __post_init__(self) -> None:
        check_bounds(self)

    @classmethod
    def from_flags(cls: type[Config], **values: Any) -> Config:
        """Build it from values by the flags' names, such as ``train_iters=100``; the others keep their defaults.

        Raises:
            ConfigError: a name is unknown (with a suggestion), or a value malformed or out of bounds.
        """
        return from_values(cls, values)

    @classmethod
    def from_recipe(cls: type[Config], recipe: str | Path, **values: Any) -> Config:
        """Build it from a recipe as ``--config`` does, and values by the flags' names, which win over it.

        Raises:
            ConfigError: the recipe is missing or no YAML mapping; or as for :meth:`from_flags`.
        """
        return from_values(cls, values, read_recipe(cls, Path(recipe)))


def parse(cls: type[Config], argv: Sequence[str], *, prog: str, description: str) -> Config:
    """Build the dataclass ``cls`` from ``--config recipe.yaml`` and flags; flags win.

    Args:
        cls: a dataclass, or a dataclass of dataclasses whose fields together name the flags.
        argv: arguments after the command's name.
        prog: name of the command in the help.
        description: first line of the help.

    Raises:
        ConfigError: the recipe is missing or no YAML mapping, or a key or a flag is unknown, malformed or out of
            bounds.
        SystemExit: the help was asked for, and has been printed.
    """
    path, words = split_config(argv)
    recipe = {} if path is None else read_recipe(cls, path)
    if {"-h", "--help"} & set(words):
        show(help_text(cls, prog, description, recipe))
        raise SystemExit(0)
    return _built(cls, parse_words(flags_of(cls), words, recipe, prog=prog))


def split_config(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The value of ``--config``, the last one as for any flag, and the other words.

    Raises:
        ConfigError: its value is missing.
    """
    path: str | None = None
    words: list[str] = []
    remaining = iter(argv)
    for word in remaining:
        if word == "--config":
            path = next(remaining, "")
        elif word.startswith("--config="):
            path = word.partition("=")[2]
        else:
            words.append(word)
        if path is not None and (not path or path.startswith("--")):
            raise ConfigError("--config: the recipe's path is missing; give --config FILE.yaml")
    return (None if path is None else _at_home(Path(path))), words


def read_recipe(cls: type, path: Path) -> dict[str, Any]:
    """The values of a recipe, by the flags' names.

    Raises:
        ConfigError: as for :func:`parse`; it names the file.
    """
    try:
        return typed_values(cls, _mapping(path))
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from error


def from_values(cls: type[Config], values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Config:
    """Build the dataclass ``cls`` from values by the flags' names; the others keep their defaults.

    Args:
        cls: as for :func:`parse`.
        values: such as ``{"lr": 1e-4}``; a path may be a string, and a sequence of any type.
        defaults: values, by name, to use instead of the fields' defaults.

    Raises:
        ConfigError: a name is unknown (with a suggestion) or missing, or a value malformed or out of bounds.
    """
    found = {**(defaults or {}), **typed_values(cls, values)}
    missing = [flag.name for flag in flags_of(cls) if flag.is_required and flag.name not in found]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given")
    return _built(cls, {flag.name: found.get(flag.name, flag.default) for flag in flags_of(cls)})


def typed_values(cls: type, values: Mapping[Any, Any]) -> dict[str, Any]:
    """Values by the flags' names, in either spelling, or their fields', converted to the flags' types.

    Raises:
        ConfigError: a name is unknown, or a value malformed.
    """
    known = {flag.path[-1]: flag for flag in flags_of(cls)} | {flag.name: flag for flag in flags_of(cls)}
    flags: dict[str, Flag] = {}
    words: list[str] = []
    empty: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            hint = habitual_flag(name, getattr(cls, "command", "")) or suggestion(name, known)
            raise ConfigError(f"unknown key {key!r}{hint}")
        flag = known[name]
        _check_kind(name, value, flag.kind)
        if value is None:
            empty[flag.name] = None
            continue
        flags[flag.name] = flag
        words += _as_words(flag, value)
    return {**convert(list(flags.values()), words), **empty}


def flat_values(config: Any) -> dict[str, Any]:
    """The configuration as one flat, YAML-ready mapping, which a recipe can be."""
    return {flag.name: _plain(flag.value_in(config)) for flag in flags_of(type(config))}


def _built(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """The configuration of these values, one for each flag; ``~`` in a path becomes the home folder."""
    expanded = {}
    for flag in flags_of(cls):
        expanded[flag.name] = _expanded(values[flag.name], any(isinstance(note, HoldsPath) for note in flag.notes))
        check_value(flag, expanded[flag.name], flag.spelling)
    return _nested(cls, {flag.path: expanded[flag.name] for flag in flags_of(cls)})


def _nested(cls: type[Config], values: Mapping[tuple[str, ...], Any]) -> Config:
    fields = {path[0]: value for path, value in values.items() if len(path) == 1}
    for name, kind in nested_dataclasses(cls).items():
        fields[name] = _nested(kind, {path[1:]: value for path, value in values.items() if path[0] == name})
    return cls(**fields)


def _expanded(value: Any, holds_path: bool) -> Any:
    if isinstance(value, tuple):
        return tuple(_expanded(part, holds_path) for part in value)
    if isinstance(value, Path):
        return _at_home(value)
    if holds_path and isinstance(value, str):
        before, colon, path = value.rpartition(":")
        return f"{before}{colon}{_at_home(Path(path))}" if path.startswith("~") else value
    return value


def _at_home(path: Path) -> Path:
    """The path with the home folder for ``~``, which no shell has expanded in a recipe or after ``FORMAT:``."""
    return path.expanduser() if path.parts[:1] == ("~",) else path


def _mapping(path: Path) -> dict[Any, Any]:
    """The YAML mapping that a file holds."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"not valid YAML: {_yaml_problem(error)}") from error
    except RecursionError:
        raise ConfigError("is nested too deeply; it must be a flat mapping of flag names to values") from None
    if not isinstance(values, dict):
        raise ConfigError(f"must be a mapping of flag names to values, not {type(values).__name__}")
    return values


def _yaml_problem(error: Exception) -> str:
    """PyYAML's message in one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', '')}"
    return " ".join(str(error).split())


def _check_kind(name: str, value: Any, kind: Any) -> None:
    """Refuse values that would become a stray word as a flag; the conversion checks the rest."""
    if kind is bool and not isinstance(value, bool):
        raise ConfigError(f"{name} is {_shown(value)}; it must be true or false")
    if kind is not bool and isinstance(value, bool):
        raise ConfigError(f"{name} is {_shown(value)}; it must not be true or false: if it is a word, quote it")
    if value is None and type(None) not in typing.get_args(kind):
        raise ConfigError(f"{name} has no value; give one, or leave the key out")
    several = isinstance(value, (list, tuple))
    if isinstance(value, dict) or (several and word_count(kind) in (0, 1)):
        raise ConfigError(f"{name} is {_shown(value)}; it must be a single value")
    if several and any(item is None or isinstance(item, (dict, list, tuple)) for item in value):
        raise ConfigError(f"{name} is {_shown(value)}; it must be a list of single values")


def _shown(value: Any) -> str:
    """For a message: a few lines of YAML can hold one word a thousand million times."""
    short = reprlib.Repr()
    short.maxlevel = 2
    short.maxstring = 1000  # cut in its middle, an address loses what tells that its end is a key
    return short.repr(value)


def _as_words(flag: Flag, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag.spelling if value else f"--no-{flag.spelling[2:]}"]
    if isinstance(value, (list, tuple)):
        return [flag.spelling, *(str(item) for item in value)]
    return [f"{flag.spelling}={value}"]


def _plain(value: Any) -> Any:
    """A value of YAML's own types."""
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
