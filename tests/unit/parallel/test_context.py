"""Attention over tokens on several ranks equals attention in one process, in outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.context_cases import CASES, errors_and_arrivals, spawn

# Relative to the largest value; fp64's is rounding of sums in another order.
TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 2e-2}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawn(errors_and_arrivals, tmp_path_factory.mktemp("context"))


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    case = CASES[name]
    taking_part = [rank["errors"][name] for rank in ranks if rank["errors"][name]]
    assert len(taking_part) == case.ulysses * case.ring
    for rank, errors in enumerate(taking_part):
        assert errors.keys() == {"output", "q", "k", "v"}
        for what, error in errors.items():
            assert error <= TOLERANCE[case.dtype], f"rank {rank}: {what} is {error:.1e} off"


def test_the_next_block_travels_while_the_kernel_computes(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        # Four blocks: nothing is under way during the last forward; in backward, gradients still are.
        assert rank["arrivals"] == {"forward": [True, True, True, False], "backward": [True] * 4}
