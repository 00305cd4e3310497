"""Shards: WebDataset's layout, whole or absent, and damage that is always noticed."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
import torch

from megatron_flashi2v.config.errors import DataError, UserError
from megatron_flashi2v.data.shards import (
    ShardIndex,
    ShardWriter,
    TarReader,
    index_path,
    parse_tensors,
    read_index,
    remove_leftovers,
    tar_path,
)


def write_shard(folder: Path, number: int = 0) -> ShardIndex:
    writer = ShardWriter(folder, number)
    for sample in range(3):
        writer.add(f"clip-{sample}", {"x": torch.full((2, 3), float(sample))}, {"caption": f"ä {sample}"})
    return writer.publish(fingerprint="f", dropped=[{"entry": 9, "reason": "no_cap"}], seconds=1.5)


def test_round_trip(tmp_path: Path) -> None:
    written = write_shard(tmp_path)
    index = read_index(index_path(tmp_path, 0))
    assert index == written
    reader, tar = TarReader(), tar_path(tmp_path, 0)
    for number, sample in enumerate(index.samples):
        tensors = parse_tensors(reader.read(tar, sample.tensors), source="x")
        assert torch.equal(tensors["x"], torch.full((2, 3), float(number)))
        assert json.loads(reader.read(tar, sample.record)) == {"caption": f"ä {number}"}
    assert index.dropped == ({"entry": 9, "reason": "no_cap"},)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-000000.json", "shard-000000.tar"]


def test_a_record_has_a_mark_for_what_cannot_be_encoded(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 0)
    writer.add("clip", {"x": torch.zeros(1)}, {"source": "no\udce9.mkv"})
    (sample,) = writer.publish(fingerprint="f", dropped=[], seconds=0.0).samples
    assert json.loads(TarReader().read(tar_path(tmp_path, 0), sample.record)) == {"source": "no\ufffd.mkv"}


def test_any_tar_reader_reads_it(tmp_path: Path) -> None:
    index = write_shard(tmp_path)
    with tarfile.open(tar_path(tmp_path, 0)) as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == [
            name for sample in range(3) for name in (f"clip-{sample}.safetensors", f"clip-{sample}.json")
        ]
        assert [member.offset_data for member in members[::2]] == [s.tensors.offset for s in index.samples]
        assert [member.size for member in members[1::2]] == [s.record.size for s in index.samples]


def test_bytes_depend_on_the_samples_alone(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert write_shard(tmp_path).tar_sha256 == write_shard(tmp_path / "other").tar_sha256
    assert tar_path(tmp_path, 0).read_bytes() == tar_path(tmp_path / "other", 0).read_bytes()


def test_empty_shard(tmp_path: Path) -> None:
    ShardWriter(tmp_path, 4).publish(fingerprint="f", dropped=[], seconds=0.0)
    assert read_index(index_path(tmp_path, 4)).samples == ()
    with tarfile.open(tar_path(tmp_path, 4)) as tar:
        assert tar.getmembers() == []


def test_bad_keys_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 0)
    writer.add("a", {"x": torch.zeros(1)}, {})
    for key in ("a", "a.b", "../a", "", "x" * 200):
        with pytest.raises(ValueError, match="key"):
            writer.add(key, {"x": torch.zeros(1)}, {})
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_nothing_stands_before_publishing(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 0)
    writer.add("a", {"x": torch.zeros(1)}, {})
    assert [path.name.startswith(".shard-000000.") for path in tmp_path.iterdir()] == [True]
    remove_leftovers(tmp_path, [1])
    assert len(list(tmp_path.iterdir())) == 1
    remove_leftovers(tmp_path, [0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 0)
    os.dup2(os.open("/dev/full", os.O_WRONLY), writer._file._file.fileno())
    with pytest.raises(UserError, match=r"shard-000000\.tar.*full"):
        writer.add("a", {"x": torch.zeros(100_000)}, {})
        writer.publish(fingerprint="f", dropped=[], seconds=0.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("position", ["first", "middle", "last"])
def test_a_flipped_byte_is_noticed(tmp_path: Path, position: str) -> None:
    sample = write_shard(tmp_path).samples[1]
    member = sample.tensors
    offset = member.offset + {"first": 0, "middle": member.size // 2, "last": member.size - 1}[position]
    with tar_path(tmp_path, 0).open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(DataError, match=r"shard-000000\.tar: damaged"):
        TarReader().read(tar_path(tmp_path, 0), member)


def test_a_truncated_or_missing_tar_is_noticed(tmp_path: Path) -> None:
    sample = write_shard(tmp_path).samples[2]
    tar = tar_path(tmp_path, 0)
    os.truncate(tar, sample.tensors.offset + 5)
    with pytest.raises(DataError, match=r"shard-000000\.tar: truncated, 5 of"):
        TarReader().read(tar, sample.tensors)
    tar.unlink()
    with pytest.raises(DataError, match=r"shard-000000\.tar: cannot be read"):
        TarReader().read(tar, sample.tensors)


def test_malformed_indices_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path)
    path = index_path(tmp_path, 0)
    good = json.loads(path.read_text())
    for broken in ({**good, "version": 99}, {**good, "samples": [{"key": "a"}]}, [], {**good, "tar": {}}):
        path.write_text(json.dumps(broken))
        with pytest.raises(DataError, match=r"shard-000000\.json"):
            read_index(path)
    path.write_text("{")
    with pytest.raises(DataError, match=r"shard-000000\.json"):
        read_index(path)
    path.unlink()
    with pytest.raises(DataError, match="index is missing"):
        read_index(path)


def test_reader_keeps_few_files_open(tmp_path: Path) -> None:
    indices = [write_shard(tmp_path, number) for number in range(5)]
    reader = TarReader(max_open=2)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for number, index in enumerate(indices * 2):
        reader.read(tar_path(tmp_path, number % 5), index.samples[0].record)
    assert reader._open.cache_info().currsize == 2
    if before:
        assert len(os.listdir("/proc/self/fd")) == before + 2
    copy = pickle.loads(pickle.dumps(reader))  # noqa: S301 - as a spawned worker gets it
    assert copy.read(tar_path(tmp_path, 0), indices[0].samples[0].record)
    reader.close()


def test_a_file_that_is_being_read_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may meanwhile read more files than are kept open."""
    members = [write_shard(tmp_path, number).samples[0].record for number in range(2)]
    reader, pread, descriptors = TarReader(max_open=1), os.pread, []

    def reads_another_first(descriptor: int, size: int, offset: int) -> bytes:
        descriptors.append(descriptor)
        if len(descriptors) == 1:
            reader.read(tar_path(tmp_path, 1), members[1])
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", reads_another_first)
    assert reader.read(tar_path(tmp_path, 0), members[0])
    assert len(descriptors) == 2 and len(set(descriptors)) == 2  # nothing was tried again
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptors[0])


def test_foreign_bytes_are_no_tensors() -> None:
    with pytest.raises(DataError, match="clip: not a safetensors file"):
        parse_tensors(pickle.dumps({"x": 1}), source="clip")
