"""Flags of the training runs, which are the same for every paradigm."""

from __future__ import annotations

import math
from pathlib import Path

from paradigms.commands import UNFINISHED
from paradigms.pixels import LATENT_CHANNELS, TEXT_DIM, TEXT_LENGTH
from paradigms.settings import Settings


def save_interval(settings: Settings) -> int:
    """Iterations from checkpoint to checkpoint: all that are measured are saved."""
    return math.gcd(*settings.iterations)


def train_flags(settings: Settings, data: Path, paradigm: str, seed: int, start: Path | None) -> list[str]:
    """Flags of ``flashi2v train`` but ``--save``: the same for every paradigm but ``--conditioning`` and its own."""
    is_start = paradigm == "text_to_video"
    end, interval = (
        (settings.start_iterations, settings.start_iterations) if is_start
        else (settings.iterations[-1], save_interval(settings))
    )
    flags = {
        "--data-path": data, "--conditioning": paradigm, "--seed": seed, "--device": "cpu", "--model": "tiny",
        "--num-layers": settings.layers, "--hidden-size": settings.hidden, "--ffn-hidden-size": settings.ffn,
        "--num-attention-heads": settings.heads, "--latent-channels": LATENT_CHANNELS, "--text-dim": TEXT_DIM,
        "--text-length": TEXT_LENGTH, "--micro-batch-size": settings.batch, "--global-batch-size": settings.batch,
        "--sigma-shift": settings.train_shift, "--train-iters": end,
        "--save-interval": interval, "--log-interval": 50, "--exit-code-when-unfinished": UNFINISHED,
    }  # fmt: skip
    if start is not None and not is_start:
        flags["--load-weights"] = f"megatron:{start}"
    words = [str(word) for pair in flags.items() for word in pair]
    return [*words, *settings.train_flags, *settings.paradigm_flags.get(paradigm, ())]
