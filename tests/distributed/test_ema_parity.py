"""The moving average of the weights at several layouts, against one process."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from helpers.layouts import Layout, run_layouts, tensors
from helpers.synthetic_data import write_synthetic

from megatron_flashi2v.checkpoint.folders import find_checkpoint
from megatron_flashi2v.checkpoint.index import read_index

DISTRIBUTED = "--use-distributed-optimizer"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ema")
    data = write_synthetic(folder / "set", 6, (16, 2, 8, 10), 64, 32, seed=3)
    tp2 = ("--tensor-model-parallel-size", "2")
    layouts = [
        Layout("single", 1),
        Layout("tp2", 2, (*tp2, "--sequence-parallel")),
        Layout("dp2", 2, (DISTRIBUTED,)),
        Layout("again", 2, (*tp2, "--load", str(folder / "dp2")), saves_again=True),
        Layout("dp2-half", 2, (DISTRIBUTED, "--exit-interval", "1")),
        Layout("dp2-rest", 2, (DISTRIBUTED, "--load", str(folder / "dp2-half"))),
    ]
    common = [
        "--model", "tiny", "--data-path", str(data), "--device", "cpu", "--train-iters", "3", "--seed", "7",
        "--micro-batch-size", "2", "--global-batch-size", "4", "--lr", "1e-2", "--adam-eps", "1e-3",
        "--ema-decay", "0.3",  # a large epsilon keeps Adam from making a rounding a step
    ]
    return run_layouts(layouts, folder, common)


def averages(save: Path) -> dict[str, torch.Tensor]:
    folder = find_checkpoint(save)
    assert folder is not None
    found = tensors(folder, "ema.")
    assert found
    return found


@pytest.mark.parametrize("name", ["tp2", "dp2"])
def test_any_layout_averages_like_one_process(runs: dict[str, Path], name: str) -> None:
    found, expected = averages(runs[name]), averages(runs["single"])
    assert found.keys() == expected.keys()
    for key, want in expected.items():
        torch.testing.assert_close(found[key], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["again", "dp2-rest"])
def test_the_average_is_loaded_bit_for_bit(runs: dict[str, Path], name: str) -> None:
    found, expected = averages(runs[name]), averages(runs["dp2"])
    assert all(torch.equal(found[key], want) for key, want in expected.items())


def test_replicas_share_the_average(runs: dict[str, Path]) -> None:
    folder = find_checkpoint(runs["dp2"])
    assert folder is not None
    held: defaultdict[str, int] = defaultdict(int)
    for key, tensor in read_index(folder).tensors.items():
        if key.startswith("ema."):
            for piece in tensor.pieces:
                assert piece.flat_range is not None
                held[piece.file] += piece.flat_range[1] - piece.flat_range[0]
    assert len(held) == 2 and max(held.values()) < 0.55 * sum(held.values())
