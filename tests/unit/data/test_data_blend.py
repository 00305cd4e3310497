"""Blends: shares, epochs, shapes, and a rule for bad samples that looks at (seed, position) alone."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.damage import spoil_bytes, spoil_values
from helpers.synthetic_data import write_synthetic

from megatron_flashi2v.config.blend import parse_blend
from megatron_flashi2v.config.errors import ConfigError, DataError
from megatron_flashi2v.data.blend import MAX_SUBSTITUTES, Blend
from megatron_flashi2v.data.order import BLOCK, Apportionment, BlendOrder, GlobalOrder, block_counts
from megatron_flashi2v.data.prepared import PreparedDataset

SHAPE = (2, 2, 4, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("data") / "set", 12, SHAPE, 6, 4, seed=1)


def blend_of(*folders: Path, weights: list[float] | None = None, batch: int = 4, seed: int = 7) -> Blend:
    datasets = [PreparedDataset(folder) for folder in folders]
    return Blend(datasets, weights or [1.0] * len(folders), batch=batch, seed=seed)


def keys(blend: Blend, positions: range) -> list[str]:
    return [sample.key for sample in blend.read(positions)[0]]


def test_flag() -> None:
    assert [(part.weight, str(part.folder)) for part in parse_blend(["a"])] == [(1.0, "a")]
    assert [(part.weight, str(part.folder)) for part in parse_blend(["0.7", "a", "3", "b"])] == [(0.7, "a"), (3.0, "b")]
    for values, said in (
        ([], "--data-path is not set"),
        (["0.7", "a", "b"], "3 words"),
        (["a", "b"], "'a' must be a weight"),
        (["0", "a", "1", "b"], "'0' must be a weight"),
        (["nan", "a", "1", "b"], "'nan' must be a weight"),
        (["1", "a", "2", "a"], "names a folder twice"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_blend(values)


def test_shares_are_exact_in_every_block_and_each_part_is_counted_without_gaps() -> None:
    dealt = Apportionment([0.7, 0.2, 0.1], seed=3, purpose="test")
    seen: Counter[int] = Counter()
    for number in range(2 * BLOCK):
        part, rank = dealt.locate(number)
        assert rank == seen[part]
        seen[part] += 1
        if number == BLOCK - 1:
            assert seen == {0: 7000, 1: 2000, 2: 1000}
    assert seen == {0: 14000, 1: 4000, 2: 2000}
    fresh = Apportionment([0.7, 0.2, 0.1], seed=3, purpose="test")
    assert [fresh.locate(number) for number in (15_003, 7)] == [dealt.locate(number) for number in (15_003, 7)]
    assert any(fresh.locate(n)[0] != Apportionment([0.7, 0.2, 0.1], 4, "test").locate(n)[0] for n in range(20))


@pytest.mark.parametrize("weights", [[1, 1, 1], [1e-9, 1], [5, 1e-9, 1e-9, 3], [1] * 7])
def test_block_counts(weights: list[float]) -> None:
    counts = block_counts(weights)
    assert sum(counts) == BLOCK and min(counts) >= 1
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - weight / sum(weights) * BLOCK) <= len(weights)


def test_one_data_set_keeps_its_order() -> None:
    order, alone = BlendOrder([23], [0.3], [0], 4, seed=7), GlobalOrder(23, seed=7)
    assert [order.locate(p) for p in range(100)] == [(0, alone.sample_index(p)) for p in range(100)]


def test_each_data_set_of_a_blend_is_visited_epoch_by_epoch() -> None:
    order = BlendOrder([5, 7], [0.25, 0.75], [0, 0], 4, seed=7)
    visits: list[list[int]] = [[], []]
    for position in range(400):
        number, index = order.locate(position)
        visits[number].append(index)
    for size, visited in zip((5, 7), visits, strict=True):
        for first in range(0, len(visited) - size, size):
            assert sorted(visited[first : first + size]) == list(range(size))
    assert abs(len(visits[0]) - 100) < 30


def test_every_global_batch_has_one_shape() -> None:
    order = BlendOrder([5, 7, 6], [0.25, 0.25, 0.5], [0, 1, 0], 4, seed=7)
    shapes = [[(0, 1, 0)[order.locate(p)[0]] for p in range(4 * n, 4 * n + 4)] for n in range(200)]
    assert all(len(set(batch)) == 1 for batch in shapes)
    assert [batch[0] for batch in shapes] == [order.bucket(4 * n) for n in range(200)]
    assert 0.65 < sum(batch[0] == 0 for batch in shapes) / 200 < 0.85
    visits = [index for p in range(800) for number, index in [order.locate(p)] if number == 1]
    assert sorted(visits[:7]) == list(range(7))


def test_a_blend_reads_both_and_buckets_by_shape(folder: Path, tmp_path: Path) -> None:
    other = write_synthetic(tmp_path / "b", 5, SHAPE, 6, 3, seed=2)
    wide = write_synthetic(tmp_path / "c", 5, (2, 2, 4, 8), 6, 4, seed=3)
    blend = blend_of(folder, other, wide, weights=[1, 1, 2])
    assert len(blend) == 22 and blend.text_length == 4 and blend.latent_shapes == (SHAPE, (2, 2, 4, 8))
    seen = set()
    for start in range(0, 80, 4):
        samples, bad = blend.read(range(start, start + 4))
        assert not bad and {tuple(sample.latents_CTHW.shape) for sample in samples} == {blend.latent_shape(start)}
        for position, sample in zip(range(start, start + 4), samples, strict=True):
            number, index = blend.order.locate(position)
            assert torch.equal(sample.latents_CTHW, blend.datasets[number][index].latents_CTHW)
            seen.add(number)
    assert seen == {0, 1, 2}
    assert len({blend_of(folder).fingerprint, blend.fingerprint, blend_of(folder, other).fingerprint}) == 3
    blend.require_whole_batches(8)
    with pytest.raises(ConfigError, match="--global-batch-size is 4"):
        blend.require_whole_batches(6)


def test_data_sets_that_do_not_belong_together(folder: Path, tmp_path: Path) -> None:
    light = write_synthetic(tmp_path / "a", 2, SHAPE, 6, 4, seed=2, text_cleaning="light")
    with pytest.raises(ConfigError, match="another text_cleaning"):
        blend_of(folder, light)
    deep = write_synthetic(tmp_path / "b", 2, (3, 2, 4, 6), 6, 4, seed=2)
    with pytest.raises(ConfigError, match="channels"):
        blend_of(folder, deep)


def spoilt(folder: Path, target: Path) -> Path:
    """Samples 2 (bytes), 5 (not finite), 6 (another shape) and 9 (no safetensors) are bad."""
    shutil.copytree(folder, target)
    spoil_bytes(target, 2)
    spoil_values(target, 5, lambda latents: latents.fill_(float("nan")))
    spoil_values(target, 6, lambda latents: latents[:1].contiguous())
    spoil_values(target, 9, lambda latents: b"no safetensors")
    return target


def test_bad_samples_are_told_and_their_positions_filled(folder: Path, tmp_path: Path) -> None:
    blend, whole = blend_of(spoilt(folder, tmp_path / "bad")), blend_of(folder)
    samples, bad = blend.read(range(24))
    assert len(samples) == 24 and all(torch.isfinite(sample.latents_CTHW).all() for sample in samples)
    reasons = {row.key: row.reason for row in bad}
    words = {2: "checksum", 5: "not finite", 6: "latents are float32 (1, 2", 9: "not a safetensors"}
    assert len(reasons) == 4 and all(word in reasons[f"synthetic-{number:06d}"] for number, word in words.items())
    wrong = {row.position for row in bad}
    before = keys(whole, range(24))
    for position, (sample, key) in enumerate(zip(samples, before, strict=True)):
        assert (sample.key == key) == (position not in wrong)
    assert {before[position] for position in wrong} == set(reasons)


def test_the_substitute_depends_on_seed_and_position_alone(folder: Path, tmp_path: Path) -> None:
    bad = spoilt(folder, tmp_path / "bad")
    at_once = keys(blend_of(bad), range(48))
    one_by_one = [keys(blend_of(bad), range(p, p + 1))[0] for p in reversed(range(48))][::-1]
    assert at_once == one_by_one
    wrong = sorted({row.position for row in blend_of(bad).read(range(240))[1]})
    fills = [keys(blend_of(bad), range(p, p + 1))[0] for p in wrong]
    assert len(set(fills)) > 4  # not one favourite sample
    assert keys(blend_of(bad, seed=8), range(48)) != at_once


def test_data_that_is_all_bad_is_an_error(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "bad")
    for number in range(12):
        spoil_bytes(tmp_path / "bad", number)
    with pytest.raises(DataError, match=f"{MAX_SUBSTITUTES} samples in a row cannot be used"):
        blend_of(tmp_path / "bad").read([0])


def test_a_shard_that_vanishes_is_bad_samples(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "bad")
    blend = blend_of(tmp_path / "bad")
    (tmp_path / "bad" / "shards" / "shard-000001.tar").unlink()
    (tmp_path / "bad" / "shards" / "shard-000002.json").write_text("{")
    samples, bad = blend.read(range(12))
    assert len(samples) == 12
    assert {row.position for row in bad} >= {p for p in range(12) if blend.order.locate(p)[1] >= 4}
    assert all("shard-000001.tar: cannot be read" in row.reason or "shard-000002.json" in row.reason for row in bad)
