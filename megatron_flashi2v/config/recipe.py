"""Recipes and flags: a flat YAML file whose keys are the flags' names, overridden by the command line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from megatron_flashi2v.config.errors import ConfigError

Config = TypeVar("Config")


def parse(cls: type[Config], argv: Sequence[str], *, prog: str, description: str) -> Config:
    """Build the dataclass ``cls`` from ``--config recipe.yaml`` and flags; flags win.

    Unknown or malformed flags are answered by tyro, with suggestions and exit code 2.

    Args:
        cls: a dataclass, or a dataclass of dataclasses whose fields together name the flags.
        argv: arguments after the command's name.
        prog: what the help calls the command.
        description: first line of the help.

    Raises:
        ConfigError: the recipe is missing, no YAML mapping, or has an unknown key.
    """
    finder = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path, default=None)
    known, flags = finder.parse_known_args(list(argv))
    options: dict[str, Any] = {
        "description": f"{description} A recipe (--config FILE.yaml) holds the same names as keys; flags win over it.",
        "config": (tyro.conf.OmitArgPrefixes,),
    }
    if known.config is None:
        return tyro.cli(cls, args=flags, prog=prog, **options)
    recipe = tyro.cli(cls, args=recipe_flags(cls, known.config), prog=f"{prog} --config {known.config}", **options)
    return tyro.cli(cls, default=recipe, args=flags, prog=prog, **options)


def recipe_flags(cls: type, path: Path) -> list[str]:
    """The recipe's entries as command-line flags.

    Raises:
        ConfigError: as for :func:`parse`.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: must be a mapping of flag names to values, not {type(values).__name__}")
    names = set(field_names(cls))
    flags: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"--config {path}: unknown key {key!r}{hint}")
        flags += _as_flags(name.replace("_", "-"), value)
    return flags


def field_names(cls: type) -> Iterator[str]:
    """Names of all flags that the dataclass and the dataclasses inside it define."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from field_names(typing.cast(type, kind))
        else:
            yield field.name


def flat_values(config: Any) -> dict[str, Any]:
    """The configuration as one flat, YAML-ready mapping: what :func:`recipe_flags` reads back."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values.update(flat_values(value))
        else:
            values[field.name] = str(value) if isinstance(value, Path) else value
    return values


def _as_flags(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, (list, tuple)):
        return [f"--{name}", *(str(item) for item in value)]
    return [f"--{name}", str(value)]
