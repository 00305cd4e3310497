"""A rank that is killed while its thread writes a checkpoint costs what was trained since the checkpoint before.

Weights, gradients and the optimizer's state are sharded: each rank's file is the only one with its part.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers.layouts import metrics
from helpers.synthetic_data import write_synthetic
from helpers.train_command import FLAGS, LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH

# Rank 1 dies in the second file that its thread writes, when half of the tensors are written.
KILLED = """
import os, signal, sys, threading
from megatron_flashi2v.checkpoint import saving
from megatron_flashi2v.cli.main import main

original, files = saving.write_rank_file, []

def write(folder, pieces, **keywords):
    pieces, written = list(pieces), []
    beside = threading.current_thread() is not threading.main_thread()
    files.append(beside)

    def on_bytes(count):
        written.append(count)
        if os.environ["RANK"] == "1" and len(files) == 2 and beside and 2 * len(written) > len(pieces):
            os.kill(os.getpid(), signal.SIGKILL)

    return original(folder, pieces, **{**keywords, "on_bytes": on_bytes})

saving.write_rank_file = write
sys.exit(main(sys.argv[1:]))
"""


# They say how long the run is that wrote them, which one does once more after the flipped byte.
SETTINGS = ("state.json", "manifest.json")


def launch(module: list[str], data: Path, save: Path, iterations: int = 8) -> subprocess.CompletedProcess:
    flags = {**FLAGS, "data-path": data, "save": save, "load": save, "save-interval": 2, "train-iters": iterations}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *module, "train",
        *(part for name, value in flags.items() for part in (f"--{name}", str(value))),
        "--data-parallel-sharding-strategy", "optim_grads_params", "--async-save",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


def test_killed_while_the_thread_writes(tmp_path: Path) -> None:
    data = write_synthetic(tmp_path / "set", 6, LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, seed=3)
    script, straight, killed = tmp_path / "killed.py", tmp_path / "straight", tmp_path / "run"
    script.write_text(KILLED)
    done = launch([str(script)], data, killed)
    assert done.returncode and "Signal 9" in done.stdout + done.stderr, done.stderr[-4000:]
    assert {path.name for path in killed.glob("*iter_*")} == {"iter_0000002", ".iter_0000004.partial"}
    assert any((killed / ".iter_0000004.partial").iterdir())
    plain = ["-m", "megatron_flashi2v"]
    for save in (killed, straight):
        done = launch(plain, data, save)
        assert done.returncode == 0, done.stderr[-4000:]
    assert_same_run(killed, straight, checkpoints=4)
    # A flipped byte in the newest file of the other rank costs the iterations of that checkpoint.
    spoiled = max(killed.glob("iter_*")) / "tensors-00000-of-00002.safetensors"
    content = bytearray(spoiled.read_bytes())
    content[-1] ^= 1
    spoiled.write_bytes(content)
    for save in (killed, straight):
        done = launch(plain, data, save, iterations=10)
        assert done.returncode == 0, done.stderr[-4000:]
        assert ("is damaged" in done.stderr) == (save == killed)
    assert_same_run(killed, straight, checkpoints=5)


def assert_same_run(run: Path, straight: Path, *, checkpoints: int) -> None:
    """The same losses and, bit for bit, the same checkpoints of every second iteration."""
    rows = [[(row["loss"], row["grad_norm"]) for row in metrics(save)] for save in (run, straight)]
    assert rows[0] == rows[1] and len(rows[0]) == 2 * checkpoints
    files = [
        {str(path.relative_to(save)): path.read_bytes() for path in save.glob("*iter_*/*") if path.name not in SETTINGS}
        for save in (run, straight)
    ]
    assert files[0] == files[1] and len(files[0]) == 4 * checkpoints
