"""Writes the files that megatron-energon 7 requires beside WebDataset shards to read a prepared folder.

In ``.nv-meta``: ``dataset.yaml`` (a crude data set: a task encoder's cooker turns its samples, with the keys
``safetensors``, as bytes, and ``json``, into what it needs), ``split.yaml`` and ``.info.json`` (samples of each shard);
beside each tar an ``.idx`` file of little-endian 64-bit offsets: where each sample's first header begins, and where the
last sample ends.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import yaml

from megatron_flashi2v.data.shards import SHARD_FOLDER, TAR_BLOCK, ShardIndex, shard_name
from megatron_flashi2v.runtime.files import atomic_write_bytes, atomic_write_json, atomic_write_text

META_FOLDER = ".nv-meta"
DATASET_FILE, SPLIT_FILE, INFO_FILE = "dataset.yaml", "split.yaml", ".info.json"
META_FILES = (DATASET_FILE, SPLIT_FILE, INFO_FILE)
FORMAT_VERSION = "7.4.1"
"""The release whose format this is."""


def write_energon_files(folder: Path, indices: Sequence[ShardIndex]) -> None:
    """Write the files of a whole data set; ``.info.json`` comes last.

    Args:
        folder: the data set's.
        indices: of all its shards; those without a sample are left out.
    """
    filled = [index for index in indices if index.samples]
    names = {index.number: f"{SHARD_FOLDER}/{shard_name(index.number)}.tar" for index in filled}
    for index in filled:
        atomic_write_bytes(folder / f"{names[index.number]}.idx", _offsets(index))
    meta = folder / META_FOLDER
    split = {"split_parts": {"train": list(names.values()), "val": [], "test": []}, "exclude": []}
    atomic_write_text(
        meta / DATASET_FILE, yaml.safe_dump({"__module__": "megatron.energon", "__class__": "CrudeWebdataset"})
    )
    atomic_write_text(meta / SPLIT_FILE, yaml.safe_dump(split, sort_keys=False))
    counts = {names[index.number]: len(index.samples) for index in filled}
    atomic_write_json(meta / INFO_FILE, {"energon_version": FORMAT_VERSION, "shard_counts": counts})


def has_energon_files(folder: Path) -> bool:
    """Return whether all of them are there."""
    return (folder / META_FOLDER / INFO_FILE).exists()


def remove_energon_files(folder: Path) -> None:
    """Delete what :func:`write_energon_files` wrote, and what energon's own tool keeps beside it."""
    for name in (*META_FILES, "index.sqlite", "index.uuid"):
        (folder / META_FOLDER / name).unlink(missing_ok=True)
    for path in (folder / SHARD_FOLDER).glob("shard-*.tar.idx"):
        path.unlink(missing_ok=True)
    if (folder / META_FOLDER).is_dir() and not any((folder / META_FOLDER).iterdir()):
        (folder / META_FOLDER).rmdir()


def _offsets(index: ShardIndex) -> bytes:
    starts = [sample.tensors.offset - TAR_BLOCK for sample in index.samples]
    last = index.samples[-1].record
    end = last.offset + -(-last.size // TAR_BLOCK) * TAR_BLOCK
    return struct.pack(f"<{len(starts) + 1}Q", *starts, end)
