"""Reading a prepared data set: right by index, and every kind of damage named."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
from helpers.synthetic_data import write_synthetic

from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.data.description import read_description, write_description
from megatron_flashi2v.data.prepared import PreparedDataset, pad_text_rows
from megatron_flashi2v.data.shards import ShardWriter

SHAPE = (16, 5, 12, 20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_synthetic(tmp_path / "data", 10, SHAPE, text_dim=8, text_length=6, seed=3, samples_per_shard=4)


def test_samples_by_index(folder: Path) -> None:
    data = PreparedDataset(folder)
    assert len(data) == 10
    assert data.info.latent_shape == SHAPE and data.info.text_dim == 8 and data.info.text_length == 6
    for index in (9, 0, 4, 3, 7):
        sample = data[index]
        assert sample.key == f"synthetic-{index:06d}" and sample.caption == f"caption {index}"
        generator = torch.Generator().manual_seed(3 * 1_000_003 + index)
        rows = int(torch.randint(1, 7, (1,), generator=generator))
        assert torch.equal(sample.latents_CTHW, torch.randn(SHAPE, generator=generator))
        assert sample.text_rows_LD.shape == (rows, 8) and sample.text_rows_LD.dtype == torch.bfloat16
        padded_LD = pad_text_rows(sample.text_rows_LD, data.info.text_length)
        assert padded_LD.shape == (6, 8) and padded_LD.dtype == torch.bfloat16
        assert torch.equal(padded_LD[:rows], sample.text_rows_LD) and not padded_LD[rows:].any()
        assert data.record(index)["caption"] == sample.caption
    assert data.empty_text_rows_LD.shape == (1, 8)
    for index in (-1, 10):
        with pytest.raises(IndexError):
            data[index]


def test_uneven_and_empty_shards(folder: Path) -> None:
    description = read_description(folder)
    indices, keys = [], []
    for number, count in enumerate((0, 2, 0, 3, 1)):
        writer = ShardWriter(folder / "shards", number)
        for _ in range(count):
            keys.append(f"sample-{len(keys)}")
            writer.add(keys[-1], {"latents": torch.zeros(SHAPE), "text": torch.zeros(1, 8)}, {"caption": keys[-1]})
        indices.append(writer.publish(fingerprint="uneven", dropped=[], seconds=0.0))
    write_description(
        folder,
        info=description.info,
        settings={},
        fingerprint="uneven",
        indices=indices,
        empty_text_rows_LD=torch.zeros(1, 8),
    )
    data = PreparedDataset(folder)
    assert [data[index].key for index in range(len(data))] == keys == [data[n].caption for n in range(6)]


def test_too_many_text_rows_are_refused() -> None:
    with pytest.raises(DataError, match="text_length is 4"):
        pad_text_rows(torch.zeros(5, 8), 4)


def test_reads_take_less_than_a_millisecond(folder: Path) -> None:
    data = PreparedDataset(folder)
    data[0]
    times = []
    for _ in range(20):
        began = time.perf_counter()
        for index in range(10):
            data[index]
        times.append((time.perf_counter() - began) / 10)
    assert min(times) < 1e-3


def test_survives_pickling_for_workers(folder: Path) -> None:
    data = PreparedDataset(folder)
    data[2]
    copy = pickle.loads(pickle.dumps(data))  # noqa: S301 - as a spawned worker gets it
    assert torch.equal(copy[5].latents_CTHW, data[5].latents_CTHW)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shutil.rmtree, "data folder .* does not exist"),
        (lambda folder: (folder / "dataset.json").unlink(), r"dataset\.json is missing"),
        (lambda folder: (folder / "dataset.json").write_text("{"), r"dataset\.json"),
        (lambda folder: (folder / "dataset.json").write_text("{}"), r"dataset\.json: not a data set"),
        (lambda folder: (folder / "empty_text.safetensors").unlink(), r"empty_text\.safetensors"),
        (lambda folder: (folder / "empty_text.safetensors").write_bytes(b"x"), r"empty_text\.safetensors"),
        (lambda folder: (folder / "shards/shard-000001.tar").unlink(), r"shard-000001\.tar: the shard is missing"),
        (lambda folder: (folder / "shards/shard-000001.json").unlink(), r"shard-000001\.json: .* index is missing"),
        (lambda folder: os.truncate(folder / "shards/shard-000002.tar", 700), r"shard-000002\.tar: 700 bytes"),
    ],
)
def test_damage_is_named_at_once(folder: Path, damage, said: str) -> None:
    damage(folder)
    with pytest.raises(DataError, match=said):
        PreparedDataset(folder)


def test_malformed_descriptions_are_refused(folder: Path) -> None:
    path = folder / "dataset.json"
    good = json.loads(path.read_text())
    evil = [{"name": "../../etc/passwd", "samples": 1, "bytes": 1}]
    for broken, said in (
        ({**good, "version": 9}, "version 9"),
        ({**good, "info": {}}, "malformed"),
        ({**good, "info": {**good["info"], "latent_shape": [1, 2]}}, "malformed"),
        ({**good, "shards": evil}, "shard name"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(DataError, match=said):
            PreparedDataset(folder)


def test_wrong_tensors_are_named(folder: Path) -> None:
    path = folder / "dataset.json"
    values = json.loads(path.read_text())
    values["info"]["latent_shape"] = [16, 5, 12, 21]
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"shard-000000\.tar sample synthetic-000001"):
        PreparedDataset(folder)[1]


def test_an_index_of_other_settings_is_refused(folder: Path) -> None:
    path = folder / "shards/shard-000001.json"
    path.write_text(path.read_text().replace('"synthetic"', '"other"'))
    with pytest.raises(DataError, match=r"shard-000001\.json"):
        PreparedDataset(folder)[5]
