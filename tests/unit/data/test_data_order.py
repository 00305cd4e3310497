"""The global order: a permutation per epoch that knows nothing of ranks."""

from __future__ import annotations

import pytest

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.data.order import GlobalOrder


def test_every_epoch_visits_every_sample_once() -> None:
    order = GlobalOrder(23, seed=7)
    epochs = [[order.sample_index(23 * epoch + offset) for offset in range(23)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != list(range(23))


def test_any_position_can_be_asked_first() -> None:
    order = GlobalOrder(23, seed=7)
    sequence = [order.sample_index(position) for position in range(100)]
    for start in (0, 22, 23, 57, 99):
        resumed = GlobalOrder(23, seed=7)
        assert [resumed.sample_index(position) for position in range(start, 100)] == sequence[start:]
    assert [order.sample_index(position) for position in reversed(range(100))] == sequence[::-1]


def test_seed_decides() -> None:
    first, second = GlobalOrder(50, seed=1), GlobalOrder(50, seed=2)
    assert [first.sample_index(p) for p in range(50)] != [second.sample_index(p) for p in range(50)]


def test_impossible_values() -> None:
    with pytest.raises(ConfigError, match="0 samples"):
        GlobalOrder(0, seed=1)
    with pytest.raises(ValueError, match="negative"):
        GlobalOrder(3, seed=1).sample_index(-1)
