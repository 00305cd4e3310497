"""Online encoding: the prepared samples bit for bit, each clip once, shared between ranks, kept and found again."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_corpus import make_corpus

from megatron_flashi2v.config.errors import ConfigError, UserError
from megatron_flashi2v.config.prepare import EncodingConfig, PrepareConfig
from megatron_flashi2v.config.recipe import parse
from megatron_flashi2v.data.blend import Blend
from megatron_flashi2v.data.encoding_cache import EncodingCache
from megatron_flashi2v.data.online import OnlineDataset, Replica
from megatron_flashi2v.data.prepared import BadSample, PreparedDataset, PreparedSample
from megatron_flashi2v.data.run import prepare

CLIPS = 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five good annotations, prepared too."""
    folder = tmp_path_factory.mktemp("corpus")
    flags = make_corpus(folder, CLIPS, z_dim=4, text_dim=16)
    config = parse(PrepareConfig, [*flags, "--output", str(folder / "data"), "--seed", "3"], prog="", description="")
    prepare(config)
    return folder


def config_of(corpus: Path, **changes: Any) -> EncodingConfig:
    values = {
        "annotations": corpus / "meta.json", "vae": corpus / "vae", "text_encoder": corpus / "text_encoder",
        "tokenizer": corpus / "tokenizer", "num_frames": 5, "height": 16, "width": 24, "text_length": 32, "seed": 3,
        "decode_workers": 0,
    }
    return EncodingConfig(**{**values, **changes})


def online(corpus: Path, *, memory_bytes: int = 2**30, cache: Path | None = None, **changes: Any) -> OnlineDataset:
    return OnlineDataset(
        config_of(corpus, **changes), torch.device("cpu"), memory_bytes=memory_bytes, cache=cache
    )


def assert_same(found: list, expected: list) -> None:
    for one, want in zip(found, expected, strict=True):
        assert isinstance(one, PreparedSample) and isinstance(want, PreparedSample)
        assert (one.key, one.caption) == (want.key, want.caption)
        assert torch.equal(one.latents_CTHW, want.latents_CTHW) and one.latents_CTHW.dtype == torch.float32
        assert torch.equal(one.text_rows_LD, want.text_rows_LD) and one.text_rows_LD.dtype == torch.bfloat16


def test_samples_are_those_that_prepare_writes(corpus: Path) -> None:
    data, prepared = online(corpus), PreparedDataset(corpus / "data")
    assert len(data) == len(prepared) == CLIPS and data.info == prepared.info
    assert torch.equal(data.empty_text_rows_LD, prepared.empty_text_rows_LD)
    order = [3, 0, 4, 4, 1, 2, 0]
    assert_same(data.fetch(order), prepared.fetch(order))
    assert data.encoded == CLIPS
    data.fetch(order)
    assert data.encoded == CLIPS
    assert not torch.equal(online(corpus, seed=4).fetch([0])[0].latents_CTHW, prepared[0].latents_CTHW)


def test_memory_is_bounded(corpus: Path) -> None:
    prepared = PreparedDataset(corpus / "data")
    size = max(prepared[n].latents_CTHW.nbytes + prepared[n].text_rows_LD.nbytes for n in range(CLIPS))
    data = online(corpus, memory_bytes=2 * size)
    assert_same(data.fetch(range(CLIPS)), prepared.fetch(range(CLIPS)))
    data.fetch([3, 4])
    assert data.encoded == CLIPS
    data.fetch([0])  # the oldest is gone, and its coming drives out the next
    data.fetch([4])
    assert data.encoded == CLIPS + 1
    nothing = online(corpus, memory_bytes=0)
    assert_same(nothing.fetch([0, 0, 1]), prepared.fetch([0, 0, 1]))
    assert nothing.encoded == 2


class Exchange:
    """An all-gather between threads."""

    def __init__(self, size: int) -> None:
        self.data: list[bytes] = [b""] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def gather(self, rank: int, data: bytes) -> list[bytes]:
        self.data[rank] = data
        self.barrier.wait()
        found = list(self.data)
        self.barrier.wait()
        return found


def test_the_ranks_of_a_replica_share_the_work(corpus: Path) -> None:
    prepared, exchange = PreparedDataset(corpus / "data"), Exchange(2)
    ranks = [online(corpus) for _ in range(2)]
    for rank, data in enumerate(ranks):
        data.replica = Replica(rank=rank, size=2, gather=lambda blob, rank=rank: exchange.gather(rank, blob))
    with ThreadPoolExecutor(2) as pool:
        for indices in ([1], [0, 1, 2, 3], [4, 2]):
            for found in pool.map(lambda data: data.fetch(indices), ranks):  # noqa: B023
                assert_same(found, prepared.fetch(indices))
    assert sum(data.encoded for data in ranks) == CLIPS and min(data.encoded for data in ranks) >= 1


def test_the_cache_on_disk_is_used_checked_and_mended(corpus: Path, tmp_path: Path) -> None:
    prepared = PreparedDataset(corpus / "data").fetch(range(CLIPS))
    first = online(corpus, cache=tmp_path)
    first.fetch(range(CLIPS))
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == CLIPS
    second = online(corpus, cache=tmp_path)
    assert_same(second.fetch(range(CLIPS)), prepared)
    assert (second.encoded, second.from_cache) == (0, CLIPS)
    data = bytearray(files[0].read_bytes())
    data[-5] ^= 0xFF
    files[0].write_bytes(data)
    files[1].write_bytes(files[1].read_bytes()[:100])
    files[2].write_bytes(b"")
    third = online(corpus, cache=tmp_path)
    assert_same(third.fetch(range(CLIPS)), prepared)
    assert (third.encoded, third.from_cache) == (3, 2)
    assert online(corpus, cache=tmp_path).fetch(range(CLIPS)) and len(list(tmp_path.rglob("*.safetensors"))) == CLIPS
    other = online(corpus, cache=tmp_path, interpolation="bilinear")
    other.fetch([0])
    assert other.from_cache == 0


def test_a_full_disk_costs_the_cache_and_not_the_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(EncodingCache, "put", full)
    assert len(online(corpus, cache=tmp_path).fetch([0, 1])) == 2


def test_clips_that_give_no_sample_are_told_and_filled(corpus: Path, tmp_path: Path) -> None:
    entries = json.loads((corpus / "meta.json").read_text())
    bad = [{"path": "absent.mkv", "cap": "x"}, {"path": "one.mkv", "cap": "x", "cut": [38, 60]}, {"path": 3}]
    (corpus / "bad.json").write_text(json.dumps([*entries, *bad]))
    data = online(corpus, annotations=corpus / "bad.json")
    assert len(data) == CLIPS + 2  # what is malformed is known before
    found = data.fetch([5, 6])
    assert all(isinstance(one, BadSample) for one in found)
    assert "absent.mkv" in found[0].reason and found[0].damaged
    assert "frame 60" in found[1].reason and found[1].damaged
    short = [{**entries[0], "cut": None, "num_frames": None}, *entries[1:]]
    (corpus / "short.json").write_text(json.dumps(short))
    unwanted = online(corpus, annotations=corpus / "short.json", too_long_factor=7.0)
    assert not unwanted.fetch([0])[0].damaged  # forty frames are too many, and nothing is broken
    samples, rows = Blend([data], [1.0], batch=4, seed=1).read(range(7))
    assert len(samples) == 7 and {row.key for row in rows} == {one.key for one in found}


def test_flags(corpus: Path) -> None:
    (corpus / "none.json").write_text('[{"path": "a.mkv"}]')
    with pytest.raises(ConfigError, match="none of 1 annotations passes"):
        online(corpus, annotations=corpus / "none.json")
