"""Continues a folder that an earlier run of ``flashi2v prepare``, perhaps an older version, began."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.config.prepare import PrepareConfig
from megatron_flashi2v.config.recipe import flat_values
from megatron_flashi2v.data.description import DATASET_FILE
from megatron_flashi2v.data.fingerprint import LATER_FIELDS
from megatron_flashi2v.data.shards import SHARD_FOLDER
from megatron_flashi2v.runtime.files import read_json

SETTINGS_FILE = "settings.json"

logger = logging.getLogger(__name__)


def has_begun(output: Path) -> bool:
    """Return whether a folder holds shards.

    Before the first shard stands (the last run failed over a flag, say) settings may still change.
    """
    return (output / DATASET_FILE).exists() or any((output / SHARD_FOLDER).glob("shard-*.json"))


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
