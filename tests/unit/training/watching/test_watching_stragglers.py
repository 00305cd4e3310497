"""Slow replicas are named, and not too soon."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from megatron_flashi2v.runtime.device import CpuDevice
from megatron_flashi2v.training.watching import stragglers
from megatron_flashi2v.training.watching.stragglers import PATIENCE, ReplicaClock, StragglerWatch

SOUND = [100_000, 101_000, 99_000, 100_500]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> StragglerWatch:
    """Of four replicas with two ranks each, on two hosts."""
    places = [[rank // 2, f"node{rank // 4}"] for rank in range(8)]
    monkeypatch.setattr(stragglers, "gather_json", lambda value: places)
    group = {size: SimpleNamespace(size=lambda size=size: size, rank=lambda: 0) for size in (1, 2, 4)}
    groups = SimpleNamespace(dp=group[4], tp=group[2], cp=group[1], pp=group[1])
    return StragglerWatch(groups, CpuDevice(), ReplicaClock(CpuDevice()))  # type: ignore[arg-type]


def test_a_slow_replica_is_named_with_its_host(watch: StragglerWatch) -> None:
    slow = [*SOUND[:2], 140_000, SOUND[3]]
    found = [watch.compare(slow) for _ in range(4 * PATIENCE)]
    said = {number for number, words in enumerate(found, start=1) if words}
    assert said == {PATIENCE, 2 * PATIENCE, 4 * PATIENCE}
    (words,) = found[PATIENCE - 1]
    assert words.startswith("replica 2 (on node1) has been slow for 10 iterations: the last took it 0.14 s")
    assert "the median of 4 replicas 0.101 s" in words


@pytest.mark.parametrize("times", [SOUND, [0, 0, 0, 0], [100_000, 100_000, 125_000, 100_000]])
def test_others_are_not(watch: StragglerWatch, times: list[int]) -> None:
    assert not any(watch.compare(times) for _ in range(3 * PATIENCE))


def test_a_pause_does_not_count(watch: StragglerWatch) -> None:
    for _ in range(5):
        assert not any(watch.compare([*SOUND[:3], 900_000]) for _ in range(PATIENCE - 1))
        watch.compare(SOUND)


def test_waiting_for_the_others_is_not_counted(watch: StragglerWatch) -> None:
    watch.before_iteration(SimpleNamespace())  # type: ignore[arg-type]
    time.sleep(0.05)
    watch._clock.meet()
    time.sleep(0.2)  # in the reduction
    watch.after_iteration({})
    own, *others = watch.counts()["times"]
    assert 0.05 <= own / 1e6 < 0.2 and others == [0, 0, 0]
