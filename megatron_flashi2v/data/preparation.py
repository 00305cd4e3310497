"""Annotations to a prepared data set, shard by shard; every process does its share, and a killed run is continued.

The annotations that pass the filters are cut, in order, into runs of ``samples_per_shard``; shard ``k`` is the work of
rank ``k % world_size``. A shard is published whole or not at all, so a later run with the same settings keeps the
finished ones and does the others. ``dataset.json`` comes last and makes the data set usable.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from megatron_flashi2v.config.errors import ConfigError, DataError
from megatron_flashi2v.config.prepare import PrepareConfig, check_prepare
from megatron_flashi2v.data.annotations import Entry
from megatron_flashi2v.data.captions import warn_of_emptied
from megatron_flashi2v.data.continuation import SETTINGS_FILE, as_begun, has_begun, require_own
from megatron_flashi2v.data.description import (
    DATASET_FILE,
    EMPTY_TEXT_FILE,
    DatasetDescription,
    read_description,
    shard_entry,
    write_description,
)
from megatron_flashi2v.data.encoding import MAX_WARNINGS, Encoders, ShardWork
from megatron_flashi2v.data.energon import (
    META_FILES,
    META_FOLDER,
    has_energon_files,
    remove_energon_files,
    write_energon_files,
)
from megatron_flashi2v.data.fingerprint import LATER_FIELDS, data_settings, settings_hash
from megatron_flashi2v.data.reasons import ERROR_REASONS, DroppedEntry
from megatron_flashi2v.data.report import REPORT_FILE, write_report
from megatron_flashi2v.data.selection import select
from megatron_flashi2v.data.shards import (
    SHARD_FOLDER,
    ShardIndex,
    index_path,
    read_index,
    remove_leftovers,
    shard_name,
    tar_path,
)
from megatron_flashi2v.data.summary import DROPPED_FILE, SUMMARY_FILE, read_summary, summarise, write_summary
from megatron_flashi2v.runtime.files import atomic_write_json, read_json, write_errors
from megatron_flashi2v.runtime.progress import progress

WRITTEN = (DATASET_FILE, SUMMARY_FILE, DROPPED_FILE, EMPTY_TEXT_FILE, REPORT_FILE)
"""Files of a data set's folder, besides its settings, shards and what energon reads."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which process of how many this is.

    Attributes:
        rank: of this process.
        world_size: processes that share the work.
        barrier: returns when all of them have called it.
    """

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = lambda: None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be done, the same on every rank.

    Attributes:
        total: annotations in all.
        shards: the annotations that each shard is made of, in order.
        dropped: annotations that need no look at their file to be dropped.
        settings: everything that decides the samples.
        fingerprint: hash of the settings.
    """

    total: int
    shards: tuple[tuple[Entry, ...], ...]
    dropped: tuple[DroppedEntry, ...]
    settings: dict[str, Any]
    fingerprint: str


def prepare(
    config: PrepareConfig, *, place: Place, device: torch.device, console: Console | None = None
) -> dict[str, Any] | None:
    """Prepare a data set, or what is missing of it.

    Args:
        config: see :class:`PrepareConfig`.
        place: this process's share.
        device: where the encoders run.
        console: where progress is drawn; None takes standard error.

    Returns:
        On rank 0 the contents of ``summary.json``; None on the others. Where nothing was kept there is no
        ``dataset.json`` (see :func:`~megatron_flashi2v.data.summary.require_samples`).

    Raises:
        ConfigError: a flag's value is impossible, or the folder holds a data set of other settings.
        DataError: the annotations are malformed (under ``strict``: any of them, or a damaged file).
        UserError: the disk is full or failing.
    """
    check_prepare(config)
    output = config.folder()
    if place.rank == 0:
        _require_own(output)
    config = as_begun(config, output)
    plan = make_plan(config)
    if place.rank == 0:
        _warn_of_malformed(plan)
        warn_of_emptied([entry for shard in plan.shards for entry in shard], config.encoding.arguments.captions)
        _claim_folder(output, plan, fresh=config.fresh)
    place.barrier()
    encoders = Encoders(config.encoding, device)
    _write_shards(config, plan, place, encoders, console)
    place.barrier()
    return _finish(output, plan, encoders, config) if place.rank == 0 else None


def make_plan(config: PrepareConfig) -> Plan:
    """Read and filter the annotations; touches no video file.

    Raises:
        DataError: the annotations are malformed (under ``--strict``: any of them).
    """
    selection = select(config.encoding.arguments)
    if selection.malformed and config.strict:
        raise DataError(selection.malformed[0].detail)
    candidates, size = selection.candidates, config.samples_per_shard
    facts = data_settings(config.encoding, selection.entries, selection.malformed) | {"samples_per_shard": size}
    return Plan(
        total=selection.total,
        shards=tuple(candidates[first : first + size] for first in range(0, len(candidates), size)),
        dropped=(*selection.malformed, *selection.filtered),
        settings=facts,
        fingerprint=settings_hash(facts),
    )


def _warn_of_malformed(plan: Plan) -> None:
    malformed = [row for row in plan.dropped if row.reason in ERROR_REASONS]
    for row in malformed[:MAX_WARNINGS]:
        logger.warning("dropped (%s): %s", row.reason, row.detail)
    if len(malformed) > MAX_WARNINGS:
        more = len(malformed) - MAX_WARNINGS
        logger.warning("%d more annotations are malformed; %s will list them", more, DROPPED_FILE)


def _require_own(output: Path) -> None:
    require_own(output, (*WRITTEN, *(f"{META_FOLDER}/{name}" for name in META_FILES)))


def _claim_folder(output: Path, plan: Plan, *, fresh: bool) -> None:
    """Make the folder this plan's own, or refuse it."""
    cure = "choose another --output, or --fresh to delete what is there and start over"
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output}: is a file; it must be a folder")
    if fresh:
        _remove_data_set(output)
    path = output / SETTINGS_FILE
    found = read_json(path, error=DataError) if path.exists() else None
    begun = has_begun(output)
    if begun and found is None:
        raise ConfigError(f"--output {output}: holds shards but no {SETTINGS_FILE}; {cure}")
    if begun and found != plan.settings:
        raise ConfigError(
            f"--output {output}: holds data of other settings ({_differences(found, plan.settings)}); {cure}"
        )
    with write_errors(output):
        (output / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
    if found != plan.settings:
        atomic_write_json(path, plan.settings)


def _remove_data_set(output: Path) -> None:
    """Delete what ``prepare`` writes and nothing else.

    The description goes first, so that no half is taken for whole, and the settings go last: they tell whose it is.
    """
    with write_errors(output):
        for name in WRITTEN:
            (output / name).unlink(missing_ok=True)
        remove_energon_files(output)
        for pattern in ("shard-*.json", "shard-*.tar", ".shard-*"):
            for path in (output / SHARD_FOLDER).glob(pattern):
                path.unlink(missing_ok=True)
        (output / SETTINGS_FILE).unlink(missing_ok=True)


def _differences(found: Any, wanted: dict[str, Any]) -> str:
    if not isinstance(found, dict):
        return f"{SETTINGS_FILE} is malformed"
    found, wanted = {**LATER_FIELDS, **found}, {**LATER_FIELDS, **wanted}
    names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    shown = []
    for name in names[:4]:
        if isinstance(wanted.get(name), str) and len(str(wanted.get(name))) == 64:
            shown.append(f"{name} has changed")
        else:
            shown.append(f"{name} {found.get(name)} there, {wanted.get(name)} now")
    return ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _write_shards(
    config: PrepareConfig, plan: Plan, place: Place, encoders: Encoders, console: Console | None
) -> None:
    folder = config.folder() / SHARD_FOLDER
    mine = range(place.rank, len(plan.shards), place.world_size)
    open_shards = [number for number in mine if _finished(folder, number, plan.fingerprint) is None]
    if not open_shards:
        logger.info("nothing to encode: the %d shards of this process are there already", len(mine))
        return
    remove_leftovers(folder, open_shards)
    total = sum(len(plan.shards[number]) for number in mine)
    done = total - sum(len(plan.shards[number]) for number in open_shards)
    _ = encoders.info  # sizes that do not fit the encoders are found before the first clip is decoded
    with progress("prepare", total, initial=done, unit="clips", rank=place.rank, console=console) as report:
        work = ShardWork(config.encoding, encoders, folder, plan.fingerprint, report, strict=config.strict)
        try:
            for number in open_shards:
                work.run(number, plan.shards[number])
        finally:
            work.close()


def _finished(folder: Path, number: int, fingerprint: str) -> ShardIndex | None:
    """The shard's index, if the shard is whole and of these settings."""
    if not index_path(folder, number).exists():
        return None
    try:
        index = read_index(index_path(folder, number))
        size = tar_path(folder, number).stat().st_size
    except (DataError, OSError) as error:
        logger.warning("%s is damaged and will be written again (%s)", shard_name(number), error)
        return None
    whole = index.fingerprint == fingerprint and index.number == number and size == index.tar_bytes
    return index if whole else None


def _finish(output: Path, plan: Plan, encoders: Encoders, config: PrepareConfig) -> dict[str, Any]:
    indices = []
    for number in range(len(plan.shards)):
        index = _finished(output / SHARD_FOLDER, number, plan.fingerprint)
        if index is None:
            raise DataError(f"{tar_path(output / SHARD_FOLDER, number)}: vanished while preparing; run again")
        indices.append(index)
    if not _described(output, plan, indices):
        _describe(output, plan, indices, encoders)
        (output / REPORT_FILE).unlink(missing_ok=True)
    summary = read_summary(output)
    if not (output / REPORT_FILE).exists():
        write_report(output, config.encoding, [entry for shard in plan.shards for entry in shard], summary)
    return summary


def _described(output: Path, plan: Plan, indices: list[ShardIndex]) -> bool:
    """Whether ``dataset.json`` and the summary are there and fit the shards."""
    if not (output / SUMMARY_FILE).exists() or not (output / DATASET_FILE).exists():
        return False
    try:
        found: DatasetDescription = read_description(output)
    except DataError:
        return False
    same = found.fingerprint == plan.fingerprint and found.shards == tuple(map(shard_entry, indices))
    return same and (output / EMPTY_TEXT_FILE).exists() and has_energon_files(output)


def _describe(output: Path, plan: Plan, indices: list[ShardIndex], encoders: Encoders) -> None:
    dropped = [row.to_json() for row in plan.dropped] + [row for index in indices for row in index.dropped]
    summary = summarise(
        entries=plan.total,
        dropped=dropped,
        samples=sum(len(index.samples) for index in indices),
        shards=len(indices),
        size=sum(index.tar_bytes for index in indices),
        seconds=sum(index.seconds for index in indices),
        emptied=sum(index.emptied for index in indices),
        emptied_example=next((index.emptied_example for index in indices if index.emptied), ""),
    )
    write_summary(output, summary, dropped)
    if not summary["kept"]:
        return
    write_energon_files(output, indices)
    write_description(
        output,
        info=encoders.info,
        settings=plan.settings,
        fingerprint=plan.fingerprint,
        indices=indices,
        empty_text_rows_LD=encoders.text_rows(""),
    )
