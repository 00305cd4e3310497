"""The base of a checkpoint of adapters, as the flags of sampling name it."""

from __future__ import annotations

from pathlib import Path

from megatron_flashi2v.checkpoint.adapter_record import read_adapter_record
from megatron_flashi2v.config.convert import parse_source
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.conversion.initial_weights import find_base
from megatron_flashi2v.sampling.frozen import is_release


def checked_base(folder: Path, base: str | None, adapter_scale: float) -> tuple[str, Path] | None:
    """Format and path of the base that was given; None for the one where it was in training.

    Refuses, before anything large is loaded, an adapter without its base, and flags of adapters without one.

    Args:
        folder: a checkpoint or a release.
        base: FORMAT:PATH, or None.
        adapter_scale: factor of what adapters add.

    Raises:
        UserError: names the flag or the path.
    """
    source = None if base is None else parse_source("--base", base)
    record = None if is_release(folder) else read_adapter_record(folder)
    if record is not None:
        find_base(folder, record, source)
    elif base is not None:
        raise ConfigError(f"--base {base} is for adapters, and {folder} holds a whole model; leave it out")
    if adapter_scale != 1 and (record is None or record.adapter is None):
        raise ConfigError(f"--adapter-scale {adapter_scale!r} is for adapters, and {folder} holds none; leave it out")
    return source
