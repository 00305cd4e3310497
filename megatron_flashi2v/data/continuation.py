"""Continues a folder that an earlier run of ``flashi2v prepare``, perhaps an older version, began."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_flashi2v.config.errors import ConfigError, DataError
from megatron_flashi2v.config.prepare import PrepareConfig
from megatron_flashi2v.config.recipe import flat_values
from megatron_flashi2v.data.description import DATASET_FILE, DATASET_FORMAT
from megatron_flashi2v.data.fingerprint import LATER_FIELDS
from megatron_flashi2v.data.shards import SHARD_FOLDER, SHARD_FORMAT
from megatron_flashi2v.runtime.files import read_json, read_json_object

SETTINGS_FILE = "settings.json"

logger = logging.getLogger(__name__)


def has_begun(output: Path) -> bool:
    """Return whether a folder holds shards.

    Before the first shard stands (the last run failed over a flag, say) settings may still change.
    """
    return (output / DATASET_FILE).exists() or any((output / SHARD_FOLDER).glob("shard-*.json"))


def require_own(output: Path, names: Sequence[str]) -> None:
    """Refuse a folder in which a file of a name that ``prepare`` writes is somebody else's.

    The settings come first and go last, so that a folder with any other file of those names has them, or shards.

    Args:
        output: the data set's folder; it need not exist.
        names: of the files.

    Raises:
        ConfigError: names the file.
    """
    settings = output / SETTINGS_FILE
    foreign = [settings] if settings.exists() and not _tells(settings, "pipeline_version") else []
    shards = output / SHARD_FOLDER
    begun = _tells(output / DATASET_FILE, "format", DATASET_FORMAT) or any(
        _tells(path, "format", SHARD_FORMAT) for path in shards.glob("shard-*.json")
    )
    if not foreign and not begun and not settings.exists():
        there = [output / name for name in names]
        foreign = [path for path in (*there, *shards.glob("shard-*")) if path.exists()]
    if foreign:
        raise ConfigError(
            f"--output {output}: {foreign[0].relative_to(output)} is there already, and `flashi2v prepare` did not "
            "write it; choose another --output, or move the file"
        )


def _tells(path: Path, name: str, value: Any = None) -> bool:
    """Whether a file is a JSON object with this key, and this value if one is asked for."""
    try:
        found = read_json_object(path, error=DataError)
    except DataError:
        return False
    return name in found and value in (None, found[name])


def as_begun(config: PrepareConfig, output: Path) -> PrepareConfig:
    """The configuration with which a folder is continued: fields that it was begun without keep their old meaning.

    Args:
        config: checked.
        output: the data set's folder; an absent or empty one changes nothing.
    """
    path = output / SETTINGS_FILE
    if config.fresh or not has_begun(output) or not path.exists():
        return config
    found, asked = read_json(path, error=DataError), flat_values(config)
    if not isinstance(found, dict):
        return config
    old = {name: value for name, value in LATER_FIELDS.items() if name not in found and asked[name] != value}
    if not old:
        return config
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in old.items())
    logger.info("%s was begun with %s, and is continued so", output, flags)
    return _with_fields(config, old)


def _with_fields(config: Any, values: Mapping[str, Any]) -> Any:
    """The dataclass of dataclasses with fields set by their names."""
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = _with_fields(value, values)
        elif field.name in values:
            changes[field.name] = values[field.name]
    return dataclasses.replace(config, **changes)
