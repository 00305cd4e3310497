"""Keyed randomness."""

from __future__ import annotations

import pytest
import torch

from megatron_flashi2v.runtime.random import keyed_generator, keyed_seed


def test_seeds_are_the_same_on_every_machine() -> None:
    # Recorded numbers: a change of the encoding would silently change every run's noise and weights.
    assert keyed_seed(0, "noise", 0) == 4686926984142799005
    assert keyed_seed(42, "weights", "blocks.0.modulation") == 4052721413765595978


def test_every_part_counts() -> None:
    keys = [
        (1, "noise"), (1, "noise", 0), (1, "noise", 1), (2, "noise", 0), (1, "sigma", 0), (1, "noise", 0, 0),
        (1, "noise", "0"), (-1, "noise", 0), (1, "noise", 2**70),
        (1, "noise", "a", "bc"), (1, "noise", "ab", "c"), (1, "noise", "abc"),
    ]  # fmt: skip
    seeds = [keyed_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_use_all_63_bits() -> None:
    seeds = [keyed_seed(0, "bits", position) for position in range(200)]
    for bit in range(63):
        share = sum(seed >> bit & 1 for seed in seeds) / len(seeds)
        assert 0.3 < share < 0.7, f"bit {bit} is set in {share:.0%} of the seeds"


@pytest.mark.parametrize("part", [1.0, True, None, (1,)])
def test_unstable_key_parts_are_refused(part: object) -> None:
    with pytest.raises(TypeError, match="int or a str"):
        keyed_seed(0, "noise", part)  # type: ignore[arg-type]


def test_generators_repeat_and_are_independent_of_the_global_one() -> None:
    first = torch.randn(5, generator=keyed_generator(3, "noise", 7))
    torch.manual_seed(0)
    again = torch.randn(5, generator=keyed_generator(3, "noise", 7))
    other = torch.randn(5, generator=keyed_generator(3, "noise", 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert keyed_generator(3, "noise").device.type == "cpu"
