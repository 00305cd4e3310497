"""Training runs by ``flashi2v train``, several at a time, one thread each."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_flashi2v.config.errors import UserError
from megatron_flashi2v.runtime.files import read_jsonl
from paradigms.pixels import LATENT_CHANNELS, TEXT_DIM, TEXT_LENGTH
from paradigms.settings import Settings

LOG_FILE = "train.log"
UNFINISHED = 75


def train_flags(settings: Settings, data: Path, paradigm: str, seed: int, start: Path | None) -> list[str]:
    """Flags of ``flashi2v train`` but ``--save``: the same for every paradigm but ``--conditioning`` and its own."""
    is_start = paradigm == "text_to_video"
    iterations = (settings.start_iterations,) if is_start else settings.iterations
    flags = {
        "--data-path": data, "--conditioning": paradigm, "--seed": seed, "--device": "cpu", "--model": "tiny",
        "--num-layers": settings.layers, "--hidden-size": settings.hidden, "--ffn-hidden-size": settings.ffn,
        "--num-attention-heads": settings.heads, "--latent-channels": LATENT_CHANNELS, "--text-dim": TEXT_DIM,
        "--text-length": TEXT_LENGTH, "--micro-batch-size": settings.batch, "--global-batch-size": settings.batch,
        "--sigma-shift": settings.shift, "--train-iters": iterations[-1], "--save-interval": math.gcd(*iterations),
        "--log-interval": 50, "--exit-code-when-unfinished": UNFINISHED,
    }  # fmt: skip
    if start is not None and not is_start:
        flags["--load-weights"] = f"megatron:{start}"
    words = [str(word) for pair in flags.items() for word in pair]
    return [*words, *settings.train_flags, *settings.paradigm_flags.get(paradigm, ())]


def train_run(flags: Sequence[str], folder: Path) -> None:
    """Train until the end, from the folder's last checkpoint; what it says goes into ``train.log`` there.

    Raises:
        UserError: it failed, or was stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / LOG_FILE
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a") as file:
        command = [sys.executable, "-m", "megatron_flashi2v", "train", *flags, "--save", str(folder)]
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if code:
        said = log.read_text(errors="replace").strip().splitlines()[-1:] or [""]
        raise UserError(f"{folder}: training ended with exit code {code} ({said[0].strip()}); see {log}")


def iterations_done(folder: Path) -> int:
    """Of a run that may not have begun."""
    metrics = folder / "metrics.jsonl"
    rows = read_jsonl(metrics) if metrics.exists() else []
    return int(rows[-1]["iteration"]) if rows else 0


def checkpoint_of(folder: Path, iteration: int) -> Path:
    """The checkpoint of a run at an iteration."""
    return folder / f"iter_{iteration:07d}"
