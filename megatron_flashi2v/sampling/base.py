"""The bases of checkpoints of adapters, as the flags of sampling name them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from megatron_flashi2v.checkpoint.adapter_record import AdapterRecord, read_adapter_record
from megatron_flashi2v.config.convert import parse_source
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.conversion.initial_weights import find_base
from megatron_flashi2v.sampling.frozen import is_release
from megatron_flashi2v.sampling.models import FoundModels


class Bases(NamedTuple):
    """Formats and paths of the bases that were given; None for one that is where it was in training, or for none."""

    high: tuple[str, Path] | None
    low: tuple[str, Path] | None


def checked_bases(
    models: FoundModels, base: str | None, low_noise_base: str | None, adapter_scale: float
) -> Bases:
    """The bases of a model or of both experts, one or both of which may be adapters.

    Refuses, before anything large is loaded, an adapter without its base, and flags of adapters without one. One base
    is for both experts if both were trained beside it.

    Args:
        models: checkpoints or releases.
        base: FORMAT:PATH of the one model's or of the expert's for high noise, or None.
        low_noise_base: of the other expert's.
        adapter_scale: factor of what adapters add.

    Raises:
        UserError: names the flag or the path.
    """
    record = _record(models.folder)
    high = _checked(models.folder, record, base, "--base")
    records, low = [record], None
    if models.low_noise is None:
        if low_noise_base is not None:
            raise ConfigError(
                f"--low-noise-base {low_noise_base} is for the second of a pair of experts, and {models.folder} is one "
                "model; leave it out"
            )
    else:
        second = _record(models.low_noise.folder)
        shared = record is not None and second is not None and record.base_fingerprint == second.base_fingerprint
        given = base if low_noise_base is None and shared else low_noise_base
        low = _checked(models.low_noise.folder, second, given, "--low-noise-base")
        records.append(second)
    if adapter_scale != 1 and not any(one is not None and one.adapter is not None for one in records):
        raise ConfigError(
            f"--adapter-scale {adapter_scale!r} is for adapters, and {models.folder} holds none; leave it out"
        )
    return Bases(high, low)


def _record(folder: Path) -> AdapterRecord | None:
    return None if is_release(folder) else read_adapter_record(folder)


def _checked(
    folder: Path, record: AdapterRecord | None, given: str | None, flag: str
) -> tuple[str, Path] | None:
    source = None if given is None else parse_source(flag, given)
    if record is not None:
        find_base(folder, record, source, flag)
    elif given is not None:
        raise ConfigError(f"{flag} {given} is for adapters, and {folder} holds a whole model; leave it out")
    return source
