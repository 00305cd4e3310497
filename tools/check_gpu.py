"""Check this checkout on a card: kernels, losses, bits, resume, sampling, host reads, ranks that share it, speed.

Every step has processes and a limit of its own, and what fails does not stop the rest. The exit code is 0 if all
passed, 1 if one failed, 2 if nothing could begin (no card, or a package is missing), and 3 if none failed but some had
no time left.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from check_gpu_runs import Check, CheckFailed, OutOfTime
from check_gpu_steps import STEPS

ROOT = Path(__file__).resolve().parents[1]
NEEDED = {
    "torch": "torch", "megatron.core": "megatron-core", "diffusers": "diffusers", "transformers": "transformers",
    "accelerate": "accelerate", "safetensors": "safetensors", "numpy": "numpy", "einops": "einops", "yaml": "pyyaml",
    "psutil": "psutil", "av": "av", "PIL": "pillow", "imageio": "imageio", "imageio_ffmpeg": "imageio-ffmpeg",
    "ftfy": "ftfy", "bs4": "beautifulsoup4", "tyro": "tyro", "rich": "rich", "packaging": "packaging",
    "pytest": "pytest",
}  # fmt: skip
"""Packages by the module that shows that they are there."""
PRELOADED = [
    "megatron_flashi2v.evaluation.bench_kernels", "megatron_flashi2v.evaluation.bench_step",
    "megatron_flashi2v.sampling.pipeline", "megatron_flashi2v.training.assembly",
    "diffusers.models.autoencoders.autoencoder_kl_wan", "transformers.models.umt5.modeling_umt5",
    "transformers.models.auto.tokenization_auto",
]  # fmt: skip
"""What the steps' processes are forked with: to import it takes each of them longer than the step."""


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


def conditions(rehearse: bool) -> dict[str, Any]:
    """What the figures are of: commit, card, versions and date."""
    import torch

    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a checkout without its history
        commit = None
    versions = {}
    for package in (*NEEDED.values(), "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = "CPU, a rehearsal" if rehearse else torch.cuda.get_device_name()
    free = 0.0 if rehearse else torch.cuda.mem_get_info()[0] / 2**30
    return {"commit": commit, "device": device, "free_gib": free, "versions": versions,
            "date": time.strftime("%Y-%m-%d")}


def run_steps(check: Check, names: Sequence[str], budget: float, factor: float = 1.0) -> Iterator[dict[str, Any]]:
    """Rows of the table.

    Args:
        check: where.
        names: of the steps.
        budget: seconds for all of them; what it leaves no time for has neither passed nor failed.
        factor: of the steps' own limits.
    """
    end = time.monotonic() + budget
    for name in names:
        step, limit = STEPS[name]
        start = time.monotonic()
        check.deadline = min(start + limit * factor, end)
        row: dict[str, Any] = {"step": name, "passed": False}
        try:
            if start >= end:
                raise OutOfTime("it has not begun")
            row.update(found=step(check), passed=True)
        except OutOfTime as error:
            row.update(found=str(error), log=error.log)
            if check.deadline == end:
                row.update(found="not run: no time left", passed=None)
        except CheckFailed as error:
            row.update(found=str(error), log=error.log)
        except (OSError, ValueError, KeyError) as error:  # of a file that is not as it should be
            row.update(found=f"{type(error).__name__}: {error}")
        yield {**row, "seconds": time.monotonic() - start}


def main() -> int:
    """Run the steps, print the table and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at toy sizes")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="these steps alone")
    parser.add_argument("--json", type=Path, default=Path("check_gpu.json"), help="the report")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds for all steps; the last have least worth")
    parser.add_argument("--limit-factor", type=float, default=1.0, help="for slower machines: of the steps' own limits")
    options = parser.parse_args()
    if missing := obstacles(options.rehearse):
        sys.stderr.write("".join(f"check_gpu: {line}\n" for line in missing))
        return 2
    report = {**conditions(options.rehearse), "steps": []}
    target = options.json.absolute()
    os.chdir(ROOT)
    sys.path[:0] = paths = [str(ROOT), str(ROOT / "kernels")]
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["PYTHONWARNINGS"] = "ignore"  # of what is imported; between the table's lines
    multiprocessing.set_forkserver_preload(PRELOADED)
    sys.stdout.write(f"{report['device']}, torch {report['versions']['torch']}, commit {report['commit']}\n")
    with tempfile.TemporaryDirectory() as folder:
        device = "cpu" if options.rehearse else "cuda"
        check = Check(device, Path(folder), options.rehearse, report["free_gib"])
        for row in run_steps(check, options.only, options.budget, options.limit_factor):
            report["steps"].append(row)
            mark = {True: "passed", False: "FAILED", None: "-"}[row["passed"]]
            sys.stdout.write(f"{row['step']:14} {mark:6}  {row['seconds']:6.1f} s  {row['found']}\n")
            sys.stdout.flush()
        report.update((path.stem, json.loads(path.read_text())) for path in sorted(Path(folder).glob("*.json")))
    target.write_text(json.dumps(report, indent=1) + "\n")
    sys.stdout.write(f"report: {target}\n")
    passed = [row["passed"] for row in report["steps"]]
    return 1 if False in passed else 3 if None in passed else 0


if __name__ == "__main__":
    sys.exit(main())
