"""Two real msrun workers on the CPU against torchrun; needs mindspore, which tests/accelerator/msrun.sh installs."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.layouts import metrics, without_times
from helpers.synthetic_data import write_synthetic

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "pretrain_flashi2v.py"
FLAGS = [
    "--config", str(ROOT / "examples" / "recipes" / "tiny.yaml"), "--device", "cpu", "--train-iters", "5",
    "--save-interval", "5", "--lr-warmup-iters", "0", "--tensor-model-parallel-size", "2", "--sequence-parallel",
]  # fmt: skip
# A worker that raises in the middle of a job, while the other one waits for it in a collective.
RAISING = """
import os, sys
from megatron_flashi2v.cli.main import run_command
if __name__ == "__main__":
    if os.environ.get("MS_ROLE") == "MS_WORKER" and os.environ["RANK_ID"] == "1":
        from megatron_flashi2v.training.trainer import Trainer
        def train(self): raise RuntimeError("planted")
        Trainer.train = train
    sys.exit(run_command("train", sys.argv[1:]))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("msrun") is None, reason="no msrun: bash tests/accelerator/msrun.sh installs it"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the sizes that the tiny preset takes."""
    return write_synthetic(tmp_path_factory.mktemp("data") / "set", 12, (16, 3, 6, 10), 64, 32, seed=3)


def msrun(script: Path, logs: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["msrun", "--worker_num=2", "--local_worker_num=2", "--join=True", f"--master_port={port}",
               f"--log_dir={logs}", str(script), *map(str, flags)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500, check=False)


def environment() -> dict[str, str]:
    """This checkout first."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def logged(logs: Path) -> str:
    return "\n".join(f"== {path.name}\n{path.read_text()}" for path in sorted(logs.glob("*.log")))


def assert_clean_scheduler(logs: Path) -> None:
    """The scheduler ran the script too: it must have left at once, without a word."""
    text = (logs / "scheduler.log").read_text()
    assert not re.search(r"traceback|error|exception|warning", text, re.IGNORECASE), text
    assert "torch" not in text, text


def rows(save: Path) -> list[dict[str, object]]:
    """Metrics without what depends on the clock and on what else the machine does."""
    return [without_times(row) for row in metrics(save)]


def test_same_metrics_as_torchrun(data: Path, tmp_path: Path) -> None:
    flags = [*FLAGS, "--data-path", str(data)]
    ours = tmp_path / "msrun"
    done = msrun(SCRIPT, tmp_path / "logs", *flags, "--save", ours, "--load", ours)
    assert done.returncode == 0, done.stdout + done.stderr + logged(tmp_path / "logs")
    theirs = tmp_path / "torchrun"
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT), *flags,
         "--save", str(theirs), "--load", str(theirs)],
        env=environment(), timeout=500, check=True,
    )
    assert len(rows(ours)) == 5
    assert {"iteration", "consumed_samples", "loss", "grad_norm", "lr"} <= rows(ours)[0].keys()
    assert rows(ours) == rows(theirs)  # bit for bit: the same host, the same layout
    assert_clean_scheduler(tmp_path / "logs")


def test_a_worker_that_raises_makes_msrun_fail(data: Path, tmp_path: Path) -> None:
    script = tmp_path / "raising.py"
    script.write_text(RAISING)
    save = tmp_path / "run"
    done = msrun(script, tmp_path / "logs", *FLAGS, "--data-path", data, "--save", save, "--load", save)
    assert done.returncode != 0, done.stdout + done.stderr + logged(tmp_path / "logs")
    assert "RuntimeError: planted" in (tmp_path / "logs" / "worker_1.log").read_text()
    assert_clean_scheduler(tmp_path / "logs")


def test_an_error_of_the_user_makes_msrun_fail(tmp_path: Path) -> None:
    done = msrun(SCRIPT, tmp_path / "logs", *FLAGS, "--data-path", tmp_path / "absent", "--save", tmp_path / "run")
    assert done.returncode != 0, done.stdout + done.stderr + logged(tmp_path / "logs")
    assert re.search(r"flashi2v train: error: .*absent", (tmp_path / "logs" / "worker_0.log").read_text())
    assert_clean_scheduler(tmp_path / "logs")
