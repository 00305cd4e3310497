"""Recipes and flags: a flat YAML file whose keys are the flags' names, overridden by the command line."""

from __future__ import annotations

import argparse
import dataclasses
import reprlib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import tyro
import yaml

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.flags import flag_fields, flag_types, named_fields, parse_flags, suggestion

Config = TypeVar("Config")


class FlagNames:
    """Gives a configuration constructors that take the flat names of flags and recipes."""

    command: ClassVar[str]
    """Whose ``--help`` explains the names, such as ``flashi2v train``."""

    @classmethod
    def from_flags(cls: type[Config], **values: Any) -> Config:
        """Build it from values by the flags' names, such as ``train_iters=100``; the others keep their defaults.

        Raises:
            ConfigError: a name is unknown (with a suggestion), or a value malformed.
        """
        return parse_values(cls, values, None)

    @classmethod
    def from_recipe(cls: type[Config], recipe: str | Path, **values: Any) -> Config:
        """Build it from a recipe as ``--config`` does, and values by the flags' names, which win over it.

        Raises:
            ConfigError: the recipe is missing or no YAML mapping; or as for :meth:`from_flags`.
        """
        path = Path(recipe)
        return parse_values(cls, values, read_recipe(cls, path, getattr(cls, "command", "flashi2v")))


def parse_values(cls: type[Config], values: Mapping[str, Any], default: Config | None) -> Config:
    """Build the dataclass ``cls`` from values by the names of its fields, or of their flags.

    Args:
        cls: a dataclass, or a dataclass of dataclasses whose fields together name the flags.
        values: by name; a path may be a string, and a sequence any.
        default: where the others come from; by default the fields' own.

    Raises:
        ConfigError: a name is unknown (with a suggestion), or a value malformed.
    """
    flag_of = {field: flag for field, flag, _ in flag_fields(cls)}
    named = {flag_of.get(name, name): value for name, value in values.items()}
    options: dict[str, Any] = {"config": (tyro.conf.OmitArgPrefixes,)}
    if default is not None:
        options["default"] = default
    return parse_flags(cls, value_flags(cls, named), prog=getattr(cls, "command", "flashi2v"), **options)


def parse(cls: type[Config], argv: Sequence[str], *, prog: str, description: str) -> Config:
    """Build the dataclass ``cls`` from ``--config recipe.yaml`` and flags; flags win.

    Args:
        cls: a dataclass, or a dataclass of dataclasses whose fields together name the flags.
        argv: arguments after the command's name.
        prog: what the help calls the command.
        description: first line of the help.

    Raises:
        ConfigError: the recipe is missing or no YAML mapping, or a key or a flag is unknown or malformed.
    """
    finder = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", type=Path, default=None)
    try:
        known, flags = finder.parse_known_args(list(argv))
    except argparse.ArgumentError:
        raise ConfigError("--config: the recipe's path is missing; give --config FILE.yaml") from None
    options: dict[str, Any] = {
        "description": f"{description} A recipe (--config FILE.yaml) holds the same names as keys; flags win over it.",
        "config": (tyro.conf.OmitArgPrefixes,),
    }
    if known.config is None:
        return parse_flags(cls, flags, prog=prog, **options)
    return parse_flags(cls, flags, default=read_recipe(cls, known.config, prog), prog=prog, **options)


def read_recipe(cls: type[Config], path: Path, prog: str) -> Config:
    """Build the dataclass ``cls`` from a recipe alone.

    Raises:
        ConfigError: as for :func:`parse`.
    """
    try:
        return parse_flags(cls, recipe_flags(cls, path), prog=prog, config=(tyro.conf.OmitArgPrefixes,))
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from error


def recipe_flags(cls: type, path: Path) -> list[str]:
    """The recipe's entries as command-line flags.

    Raises:
        ConfigError: as for :func:`parse`, which names the file.
    """
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
    return value_flags(cls, values)


def value_flags(cls: type, values: Mapping[Any, Any]) -> list[str]:
    """Values by the flags' names, in either spelling, as command-line flags.

    Raises:
        ConfigError: a name is unknown, or a value no flag's.
    """
    types = dict(flag_types(cls))
    flags: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in types:
            raise ConfigError(f"unknown key {key!r}{suggestion(name, types)}")
        _check_kind(name, value, types[name])
        flags += _as_flags(name.replace("_", "-"), value)
    return flags


def from_values(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """The dataclass of dataclasses ``cls`` with fields set by their flat names; the others keep their defaults.

    Args:
        cls: as for :func:`parse`.
        values: Python objects by the flag's name, such as ``{"lr": 1e-4}``; of their fields' types.

    Raises:
        ConfigError: a name is unknown (with a suggestion).
    """
    known = dict(flag_types(cls))
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown name {name!r}{suggestion(name, known)}")
    return _built(cls, values)


def _built(cls: type[Config], values: Mapping[str, Any]) -> Config:
    fields: dict[str, Any] = {}
    for field, name, kind in named_fields(cls):
        if dataclasses.is_dataclass(kind):
            fields[field] = _built(typing.cast(type, kind), values)
        elif name in values:
            fields[field] = values[name]
    return cls(**fields)


def flat_values(config: Any) -> dict[str, Any]:
    """The configuration as one flat, YAML-ready mapping: what :func:`recipe_flags` reads back."""
    values: dict[str, Any] = {}
    for field, name, _ in named_fields(type(config)):
        value = getattr(config, field)
        if dataclasses.is_dataclass(value):
            values.update(flat_values(value))
        else:
            values[name] = str(value) if isinstance(value, Path) else value
    return values


def _yaml_problem(error: Exception) -> str:
    """In one line what PyYAML says in several."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _check_kind(name: str, value: Any, kind: Any) -> None:
    """Refuse what would become a stray word as a flag; tyro checks the rest."""
    if kind is bool and not isinstance(value, bool):
        raise ConfigError(f"{name} is {_shown(value)}; it must be true or false")
    if value is None and type(None) not in typing.get_args(kind):
        raise ConfigError(f"{name} has no value; give one, or leave the key out")
    several = isinstance(value, (list, tuple))
    if isinstance(value, dict) or (several and _plain(kind) not in (list, tuple)):
        raise ConfigError(f"{name} is {_shown(value)}; it must be a single value")
    if several and any(isinstance(item, (dict, list, tuple)) for item in value):
        raise ConfigError(f"{name} is {_shown(value)}; it must be a list of single values")


def _plain(kind: Any) -> Any:
    """``tuple`` of ``tuple[str, ...]``, whatever it is annotated with."""
    origin = typing.get_origin(kind)
    return typing.get_origin(typing.get_args(kind)[0]) if origin is typing.Annotated else origin


def _shown(value: Any) -> str:
    """For a message: a few lines of YAML can hold one word a thousand million times."""
    short = reprlib.Repr()
    short.maxlevel = 2
    return short.repr(value)


def _as_flags(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, (list, tuple)):
        return [f"--{name}", *(str(item) for item in value)]
    return [f"--{name}", str(value)]
