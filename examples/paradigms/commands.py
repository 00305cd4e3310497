"""Commands of ``flashi2v`` as tasks: each resumes by itself, and what it says goes into a log."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_flashi2v.config.errors import UserError
from megatron_flashi2v.runtime.files import read_jsonl

FLASHI2V = (sys.executable, "-m", "megatron_flashi2v")
"""Words that start ``flashi2v`` as one process."""
UNFINISHED = 75
"""Exit code of a training that was stopped before its end."""


def run_command(command: Sequence[str], log: Path) -> None:
    """Run a command to its end, and append what it says to a log.

    Raises:
        UserError: it failed, or was stopped.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        said = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        raise UserError(f"exit code {code}: {said[0].strip()} (all of it stands in {log})")


def iterations_done(folder: Path) -> int:
    """Of a training that may not have begun."""
    metrics = folder / "metrics.jsonl"
    rows = read_jsonl(metrics) if metrics.exists() else []
    return int(rows[-1]["iteration"]) if rows else 0


def checkpoint_of(folder: Path, iteration: int) -> Path:
    """The checkpoint of a training at an iteration."""
    return folder / f"iter_{iteration:07d}"
