"""Check this checkout on a card: kernels, losses against the CPU, bits, resume, ranks that share the card, speed.

Every step is a process of its own with a limit of its own, and what fails does not stop the rest. The exit code is 0 if
all passed, 1 if one failed, and 2 if nothing could begin: no card, or a package is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NEEDED = {"torch": "torch", "megatron.core": "megatron-core", "diffusers": "diffusers", "av": "av", "tyro": "tyro",
          "ftfy": "ftfy", "pytest": "pytest"}
ITERATIONS = 4
FLAGS = ("--config", "examples/recipes/tiny.yaml", "--mock-data", "--micro-batch-size", "1", "--global-batch-size", "2",
         "--train-iters", str(ITERATIONS), "--lr-warmup-iters", "1", "--save-interval", "2", "--log-interval", "1")


class CheckFailed(Exception):
    """What was found, in a line."""


@dataclass
class Check:
    """A step under way.

    Attributes:
        device: the device that is checked.
        folder: for what steps write.
        rehearse: toy sizes, on the CPU.
        deadline: of the step, by ``time.monotonic``.
        losses: (loss, gradient norm) by iteration, of runs that later steps compare with.
    """

    device: str
    folder: Path
    rehearse: bool
    deadline: float = 0.0
    losses: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def run(self, *command: str, **environment: str) -> str:
        """What a command prints; killed with its children at the step's deadline.

        Raises:
            CheckFailed: it failed or took too long.
        """
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )
        try:
            told, _ = process.communicate(timeout=max(self.deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise CheckFailed("took longer than its limit") from None
        if process.returncode:
            lines = told.strip().splitlines() or ["printed nothing"]
            raise CheckFailed(f"exit code {process.returncode}: {lines[-1][:200]}")
        return told

    def train(self, name: str, *flags: str, ranks: int = 1, device: str = "") -> list[tuple[float, float]]:
        """Loss and gradient norm of each iteration of a tiny run into ``folder / name``."""
        save = self.folder / name
        train = [sys.executable, "-m", "megatron_flashi2v", "train", *FLAGS, "--save", str(save),
                 "--device", device or self.device, *flags]
        if ranks > 1:  # all of them on one card
            shared = 'export LOCAL_RANK=0; exec "$@"'
            train = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
                     "--no-python", "bash", "-c", shared, "rank", *train, "--distributed-backend", "gloo"]
        self.run(*train)
        rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
        return [(row["loss"], row["grad_norm"]) for row in rows]


def kernels(check: Check) -> str:
    """The kernels' tests against the references in fp64, on the device."""
    names = ("modulation", "qk_norm_rope", "rms_norm")
    files = [f"tests/unit/kernels/test_kernels_{name}.py" for name in names]
    only = ["-k", "reference or torchs"] if check.rehearse else []
    told = check.run(sys.executable, "-m", "pytest", "-q", *only, *files, FLASHI2V_TEST_DEVICE=check.device)
    return told.strip().splitlines()[-1]


def cpu_losses(check: Check) -> str:
    """fp32 on the device against fp32 on the CPU."""
    check.losses["cpu"] = check.train("cpu", device="cpu")
    check.losses["device"] = check.train("device")
    return _near(check.losses["device"], check.losses["cpu"], 1e-5)


def deterministic(check: Check) -> str:
    """bf16 with --deterministic twice: the same bits; and with other recomputation."""
    flags = ("--bf16", "--deterministic")
    first = check.train("bits", *flags)
    for name in ("selective", "skip_attention"):
        if check.train(f"bits-{name}", *flags, "--recompute-granularity", name) != first:
            raise CheckFailed(f"--recompute-granularity {name} changes bits")
    return "recomputation changes no bit"


def resume(check: Check) -> str:
    """The second half again from the checkpoint of the first, saved in the background."""
    whole = check.train("whole", "--async-save")
    half = check.folder / "half"
    shutil.copytree(check.folder / "whole", half)
    shutil.rmtree(half / f"iter_{ITERATIONS:07d}")
    (half / "latest_checkpointed_iteration.txt").write_text(str(ITERATIONS // 2))
    return _near(check.train("half"), whole, 1e-6)


def ranks(check: Check) -> str:
    """Two ranks on one device over gloo, against one process."""
    layouts = {
        "TP 2": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
        "PP 2": ("--pipeline-model-parallel-size", "2"),
        "ring 2": ("--context-parallel-size", "2", "--context-parallel-algo", "ring"),
        "DP 2": ("--use-distributed-optimizer",),
    }
    alone = check.losses.get("device") or check.train("alone")
    found = []
    for name, flags in layouts.items():
        found.append(f"{name} {_near(check.train(name.replace(' ', '-'), *flags, ranks=2), alone, 1e-5)}")
    return "; ".join(found)


def kernel_speed(check: Check) -> str:
    """The kernels' device time."""
    sizes = ["--models", "tiny", "--latent-shape", "2", "4", "6", "--rounds", "1", "--operators", "gate_residual",
             "--skip", "inductor"]
    report = check.folder / "kernels.json"
    check.run(sys.executable, "tools/bench_kernels.py", "--device", check.device, "--json", str(report),
              *(sizes if check.rehearse else ["--models", "1.3b", "--rounds", "3"]))
    return f"{len(json.loads(report.read_text())['rows'])} rows"


def step_speed(check: Check) -> str:
    """A step of the 1.3b beside diffusers' with compiled blocks."""
    peer = "diffusers" if check.rehearse else "diffusers-compiled"
    toy = ["--model", "tiny", "--latent-shape", "2", "4", "6", "--rounds", "1"]
    report = check.folder / "step.json"
    check.run(sys.executable, "tools/bench_step.py", "--device", check.device, "--peer", peer, "--json", str(report),
              *(toy if check.rehearse else ["--rounds", "3"]))
    return f"time over the peer's {json.loads(report.read_text())['ratio_to_peer']:.3f}"


STEPS: dict[str, tuple[Callable[[Check], str], int]] = {
    "kernels": (kernels, 90), "cpu_losses": (cpu_losses, 60), "deterministic": (deterministic, 60),
    "resume": (resume, 45), "ranks": (ranks, 120), "kernel_speed": (kernel_speed, 90), "step_speed": (step_speed, 150),
}
"""Steps with their limits in seconds."""


def _near(found: list[tuple[float, float]], wanted: list[tuple[float, float]], limit: float) -> str:
    if len(found) != len(wanted):
        raise CheckFailed(f"{len(found)} iterations, not {len(wanted)}")
    error = max(abs(a - b) / abs(b) for rows in zip(found, wanted, strict=True) for a, b in zip(*rows, strict=True))
    if not error <= limit:
        raise CheckFailed(f"differs by {error:.2g} where {limit:g} is allowed")
    return f"{error:.1g}"


def obstacles(rehearse: bool) -> list[str]:
    """What is missing to begin, one line each."""
    absent = [package for module, package in NEEDED.items() if not _is_there(module)]
    if absent:
        return [f"not installed: {', '.join(absent)}"]
    import torch

    if not rehearse and not torch.cuda.is_available():
        return ["torch finds no CUDA device; --rehearse runs the same steps on the CPU at toy sizes"]
    return []


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that the module is in
        return False


def main() -> int:
    """Run the steps, print the table and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at toy sizes")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="these steps alone")
    parser.add_argument("--json", type=Path, default=Path("check_gpu.json"), help="the report")
    parser.add_argument("--limit-factor", type=float, default=1.0, help="for slower machines: of all limits")
    options = parser.parse_args()
    if missing := obstacles(options.rehearse):
        sys.stderr.write("".join(f"check_gpu: {line}\n" for line in missing))
        return 2
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        check = Check("cpu" if options.rehearse else "cuda", Path(folder), options.rehearse)
        for name in options.only:
            step, limit = STEPS[name]
            start = time.monotonic()
            check.deadline = start + limit * options.limit_factor
            try:
                row = {"step": name, "passed": True, "found": step(check)}
            except (CheckFailed, OSError, ValueError, KeyError) as error:
                row = {"step": name, "passed": False, "found": str(error)}
            rows.append({**row, "seconds": time.monotonic() - start})
            mark = "passed" if row["passed"] else "FAILED"
            sys.stdout.write(f"{name:14} {mark}  {rows[-1]['seconds']:6.1f} s  {row['found']}\n")
            sys.stdout.flush()
        reports = {path.stem: json.loads(path.read_text()) for path in Path(folder).glob("*.json")}
    options.json.write_text(json.dumps({"device": check.device, "steps": rows, **reports}, indent=1) + "\n")
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
