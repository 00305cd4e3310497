"""Every parameter has its part, and every kind of optimizer tells the norms that plain tensors have."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.layouts import metrics, weights

from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.models.presets import PRESETS
from megatron_flashi2v.training.watching.norms import part_of

Train = Callable[..., int]


def test_the_parts_of_the_14b_model() -> None:
    config = PRESETS["14b"]
    parts = {part_of(name, config.num_layers) for name in parameter_shapes(config)}
    assert config.num_layers == 40
    assert parts == {
        "patch_embedding", "text_embedding", "time_embedding", "phi", "fourier_embedding", "head",
        *(f"blocks_{start:02d}_{start + 4:02d}" for start in range(0, 40, 5)),
    }


@pytest.mark.parametrize("name, layers, part", [
    ("blocks.0.modulation", 2, "blocks_00_00"), ("blocks.9.mlp.linear_fc1.bias", 10, "blocks_08_09"),
    ("blocks.28.modulation", 30, "blocks_28_29"), ("conditioning.phi.conv_in.weight", 2, "phi"),
])
def test_part_of(name: str, layers: int, part: str) -> None:
    assert part_of(name, layers) == part


@pytest.mark.parametrize("flags", [
    (), ("--bf16",), ("--bf16", "--use-distributed-optimizer"), ("--optimizer", "sgd"),
], ids=str)
def test_norms_of_every_optimizer(train: Train, tmp_path: Path, flags: tuple[str, ...]) -> None:
    still = ("--lr", 0, "--clip-grad", 0.1, "--log-norms-interval", 2)
    assert train("--save", tmp_path, *still, *flags) == 0
    rows = metrics(tmp_path)
    assert ["grad_norm_by_part" in row for row in rows] == [False, True, False, True]
    row = rows[-1]
    assert row["grad_norm"] > 0.1  # so that clipping would show
    gradients, parameters = row["grad_norm_by_part"], row["param_norm_by_part"]
    assert math.sqrt(math.fsum(norm**2 for norm in gradients.values())) == pytest.approx(row["grad_norm"], rel=1e-6)
    assert gradients.keys() == parameters.keys() and min(gradients.values()) >= 0
    squares = dict.fromkeys(parameters, 0.0)
    for key, value in weights(tmp_path).items():  # which a rate of 0 leaves as they were drawn
        squares[part_of(key.removeprefix("model."), 2)] += float(value.double().square().sum())
    expected = {part: math.sqrt(square) for part, square in squares.items()}
    assert parameters == pytest.approx(expected, rel=1e-2 if "--bf16" in flags else 1e-6)
