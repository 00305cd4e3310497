"""The training command in this process: small data, a small model, and everything put back after a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

from helpers.synthetic_data import write_synthetic
from megatron_flashi2v.config.recipe import parse

LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH = (4, 2, 4, 4), 8, 6
FLAGS = {
    "model": "tiny", "num-layers": 2, "hidden-size": 32, "ffn-hidden-size": 48, "num-attention-heads": 2,
    "latent-channels": LATENT_SHAPE[0], "text-dim": TEXT_DIM, "text-length": TEXT_LENGTH, "device": "cpu",
    "train-iters": 4, "seed": 5, "global-batch-size": 4, "micro-batch-size": 2, "lr": 1e-2,
    "image-embed-dim": 12,
}
INPUTS = {"grey_clip": LATENT_SHAPE, "image_rows": (17, 12)}
"""What wan_i2v takes of a sample; the other paradigms train on the same data."""


@pytest.fixture(scope="session")
def synthetic_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six samples: an iteration of four crosses the epochs' borders."""
    return write_synthetic(tmp_path_factory.mktemp("data") / "set", 6, LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, seed=3,
                           inputs=INPUTS)


@pytest.fixture
def run_command() -> Iterator[Callable[..., int]]:
    """``flashi2v train`` with just these flags, and observers; its exit code."""
    from megatron_flashi2v.cli.errors import tell_error
    from megatron_flashi2v.cli.main import main
    from megatron_flashi2v.config.errors import UserError
    from megatron_flashi2v.config.train import TrainConfig
    from megatron_flashi2v.training.run import train

    root = logging.getLogger()
    handlers = list(root.handlers)

    def observed(flags: list[str], observers: Sequence[Any]) -> int:
        try:
            train(parse(TrainConfig, flags, prog="flashi2v train", description=""), observers)
        except UserError as error:
            return tell_error("train", error)
        return 0

    def run_command(*flags: object, observers: Sequence[Any] = ()) -> int:
        words = [str(flag) for flag in flags]
        try:
            return observed(words, observers) if observers else main(["train", *words])
        finally:
            assert not torch.distributed.is_initialized() and root.handlers == handlers

    yield run_command


@pytest.fixture
def train(run_command: Callable[..., int], synthetic_data: Path) -> Callable[..., int]:
    """``flashi2v train`` with the small data and model, and the given flags after them; its exit code."""
    defaults = [part for name, value in FLAGS.items() for part in (f"--{name}", value)]

    def train(*flags: object, observers: Sequence[Any] = ()) -> int:
        return run_command("--data-path", synthetic_data, *defaults, *flags, observers=observers)

    return train
