"""The training command in this process: small data, a small model, and everything put back after a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed

from helpers.synthetic_data import write_synthetic

LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH = (4, 2, 4, 4), 8, 6
FLAGS = {
    "model": "tiny", "num-layers": 2, "hidden-size": 32, "ffn-hidden-size": 48, "num-attention-heads": 2,
    "latent-channels": LATENT_SHAPE[0], "text-dim": TEXT_DIM, "text-length": TEXT_LENGTH, "device": "cpu",
    "train-iters": 4, "seed": 5, "global-batch-size": 4, "micro-batch-size": 2, "lr": 1e-2,
}


@pytest.fixture(scope="session")
def synthetic_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six samples: an iteration of four crosses the epochs' borders."""
    return write_synthetic(tmp_path_factory.mktemp("data") / "set", 6, LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, seed=3)


@pytest.fixture
def run_command() -> Iterator[Callable[..., int]]:
    """``flashi2v train`` with just these flags; its exit code."""
    from megatron_flashi2v.cli.main import main

    root, package = logging.getLogger(), logging.getLogger("megatron_flashi2v")
    handlers, level = list(root.handlers), package.level

    def run_command(*flags: object) -> int:
        try:
            return main(["train", *map(str, flags)])
        finally:
            assert not torch.distributed.is_initialized()
            for handler in set(root.handlers) - set(handlers):
                root.removeHandler(handler)
            package.setLevel(level)
            logging.captureWarnings(False)

    yield run_command


@pytest.fixture
def train(run_command: Callable[..., int], synthetic_data: Path) -> Callable[..., int]:
    """``flashi2v train`` with the small data and model, and the given flags after them; its exit code."""
    defaults = [part for name, value in FLAGS.items() for part in (f"--{name}", value)]

    def train(*flags: object) -> int:
        return run_command("--data-path", synthetic_data, *defaults, *flags)

    return train
