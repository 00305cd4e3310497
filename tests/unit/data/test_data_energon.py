"""What megatron-energon needs beside the shards, against what tarfile finds in them."""

from __future__ import annotations

import json
import struct
import tarfile
from pathlib import Path

import yaml
from helpers.synthetic_data import write_synthetic

from megatron_flashi2v.data.energon import has_energon_files, remove_energon_files, write_energon_files
from megatron_flashi2v.data.shards import ShardWriter, index_path, read_index


def test_offsets_counts_and_split(tmp_path: Path) -> None:
    folder = write_synthetic(tmp_path, 7, (2, 2, 4, 6), 6, 4, seed=1)
    ShardWriter(folder / "shards", 2).publish(fingerprint="synthetic", dropped=[], seconds=0.0)  # nothing was kept
    before = set(folder.rglob("*"))
    write_energon_files(folder, [read_index(index_path(folder / "shards", number)) for number in range(3)])
    assert has_energon_files(folder)
    for number, count in ((0, 4), (1, 3)):
        tar = folder / "shards" / f"shard-{number:06d}.tar"
        with tarfile.open(tar) as file:
            members = file.getmembers()
            end = file.offset  # tarfile stands at the first header that is none
        starts = [member.offset for member in members if member.name.endswith(".safetensors")]
        data = Path(f"{tar}.idx").read_bytes()
        assert struct.unpack(f"<{len(data) // 8}Q", data) == (*starts, end)
        assert len(starts) == count
    meta = folder / ".nv-meta"
    names = ["shards/shard-000000.tar", "shards/shard-000001.tar"]
    assert json.loads((meta / ".info.json").read_text())["shard_counts"] == dict(zip(names, (4, 3), strict=True))
    assert yaml.safe_load((meta / "split.yaml").read_text())["split_parts"]["train"] == names
    assert yaml.safe_load((meta / "dataset.yaml").read_text())["__class__"] == "CrudeWebdataset"
    remove_energon_files(folder)
    assert set(folder.rglob("*")) == before
