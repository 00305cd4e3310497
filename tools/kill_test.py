"""Kills a random rank again and again: ``python tools/kill_test.py --folder DIR --kills 1000 -- FLAGS OF TRAIN``.

Trains once undisturbed, then again with ``kill -9`` of a random process at random moments (while it starts, between
two saves, during a save), and launches again after each. After every kill no process may remain, and every published
checkpoint must be whole; at the end the losses must equal the undisturbed run's, bit for bit. The flags must not
contain --save and --load, should contain a small --save-interval, and --train-iters must last for the kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

COMPARED = ("iteration", "consumed_samples", "loss", "grad_norm", "lr")
MOMENTS = ("start", "step", "save", "save")
MARK = "FLASHI2V_KILL_TEST"
LEAVE_S = 120.0
"""Limit for a launch to end after one of its processes was killed."""


def launch(folder: Path, processes: int, flags: list[str], mark: str) -> subprocess.Popen[bytes]:
    """Start or resume the run."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "-m", "megatron_flashi2v", "train", *flags, "--save", str(folder), "--load", str(folder),
    ]  # fmt: skip
    with open(folder.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, MARK: mark})


def marked(mark: str) -> dict[int, int]:
    """Living processes of a launch, of any depth: parent by process number."""
    found = {}
    for path in Path("/proc").iterdir():
        if not path.name.isdecimal():
            continue
        try:
            if f"{MARK}={mark}".encode() not in (path / "environ").read_bytes().split(b"\0"):
                continue
            state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended
            continue
        if state != "Z":
            found[int(path.name)] = int(parent)
    return found


def iterations_done(folder: Path) -> int:
    """Number of rows of the run's metrics."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(moment: str, folder: Path, running: subprocess.Popen[bytes], draw: random.Random) -> None:
    """Wait for a random moment of a kind, or for the end of the run."""
    delay = draw.uniform(0.0, {"start": 10.0, "step": 1.0, "save": 0.05}[moment])
    if moment != "start":
        before = set(folder.glob("iter_*"))
        while running.poll() is None and set(folder.glob("iter_*")) <= before:
            time.sleep(0.02)  # until it trains and has saved once
    while moment == "save" and running.poll() is None and not any(folder.glob(".iter_*.partial")):
        time.sleep(0.002)
    end = time.monotonic() + delay
    while running.poll() is None and time.monotonic() < end:
        time.sleep(0.005)


def kill_one(running: subprocess.Popen[bytes], mark: str, draw: random.Random) -> bool:
    """Kill a random rank as soon as there is one; returns False if the run ended first."""
    while running.poll() is None:
        ranks = sorted(process for process, parent in marked(mark).items() if parent == running.pid)
        if ranks:
            os.kill(draw.choice(ranks), signal.SIGKILL)
            return True
        time.sleep(0.1)
    return False


def require_all_gone(running: subprocess.Popen[bytes], mark: str) -> None:
    """Wait for the launcher and all its processes to end.

    Raises:
        SystemExit: a process still runs; it is killed.
    """
    end = time.monotonic() + LEAVE_S
    while (running.poll() is None or marked(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    left = marked(mark)
    for process in left:
        os.kill(process, signal.SIGKILL)
    if left:
        raise SystemExit(f"FAILED: after {LEAVE_S:g} s the processes {sorted(left)} were still there")


def require_whole_checkpoints(folder: Path) -> int:
    """Verify every published folder; returns their number.

    Raises:
        CheckpointError: one is damaged.
    """
    from megatron_flashi2v.checkpoint.manifest import verify

    published = sorted(folder.glob("iter_*"))
    for path in published:
        verify(path)
    return len(published)


def rows(folder: Path) -> list[list[float]]:
    """The numbers of every iteration that must be equal."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [[json.loads(line)[name] for name in COMPARED] for line in lines]


def run_to_end(folder: Path, processes: int, flags: list[str]) -> None:
    """Launch and wait for the end.

    Raises:
        SystemExit: the run failed.
    """
    code = launch(folder, processes, flags, secrets.token_hex(8)).wait()
    if code:
        raise SystemExit(f"FAILED: the launch ended with {code}; see {folder.with_suffix('.log')}")


def main() -> None:
    """Run the test; exits with 0 only if it passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder of both runs; must not exist")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments and the ranks")
    parser.add_argument("flags", nargs="+", help="after --: flags of flashi2v train")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    straight, killed = arguments.folder / "straight", arguments.folder / "killed"
    run_to_end(straight, arguments.processes, arguments.flags)
    draw = random.Random(arguments.seed)
    killed.mkdir()
    for number in range(1, arguments.kills + 1):
        mark, moment = secrets.token_hex(8), draw.choice(MOMENTS)
        running = launch(killed, arguments.processes, arguments.flags, mark)
        wait_for(moment, killed, running, draw)
        saving = any(killed.glob(".iter_*.partial"))
        hit = kill_one(running, mark, draw)
        require_all_gone(running, mark)
        whole = require_whole_checkpoints(killed)
        sys.stdout.write(
            f"kill {number} ({moment}{', while saving' if saving else ''}{'' if hit else ', too late'}): "
            f"{iterations_done(killed)} iterations, {whole} whole checkpoints\n"
        )
        sys.stdout.flush()
        if not hit and running.returncode:
            raise SystemExit(f"FAILED: the launch ended by itself with {running.returncode}; see {killed}.log")
        if not hit:
            break  # the run is done
    run_to_end(killed, arguments.processes, arguments.flags)
    if rows(killed) != rows(straight):
        raise SystemExit(f"FAILED: the losses in {killed} differ from those in {straight}")
    sys.stdout.write(f"passed: {len(rows(straight))} iterations, equal bit for bit\n")


if __name__ == "__main__":
    main()
