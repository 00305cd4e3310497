"""Check this checkout on a card: kernels, losses, bits, resume, sampling, host reads, ranks that share it, speed.

Every step has processes and a limit of its own, and what fails does not stop the rest. The exit code is 0 if all
passed, 1 if one failed, and 2 if nothing could begin: no card, or a package is missing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "examples" / "quickstart" / "models"
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
ITERATIONS = 4
TRAIN = (
    "--config", "examples/recipes/tiny.yaml", "--mock-data", "--micro-batch-size", "1", "--global-batch-size", "2",
    "--train-iters", str(ITERATIONS), "--lr-warmup-iters", "1", "--save-interval", "2", "--log-interval", "1",
)  # fmt: skip
SAMPLE = (
    "--vae", str(MODELS / "vae"), "--text-encoder", str(MODELS / "text_encoder"), "--tokenizer",
    str(MODELS / "tokenizer"), "--prompt", "a red square", "--num-frames", "9", "--height", "48", "--width", "80",
    "--num-steps", "4", "--latents",
)  # fmt: skip
LATENTS = (16, 5, 12, 20)
TOY = ("--latent-shape", "2", "4", "6", "--rounds", "1")

Losses = list[tuple[float, float]]


class CheckFailed(Exception):
    """What was found, in a line.

    Attributes:
        log: the end of what the failed process printed.
    """

    def __init__(self, found: str, log: str = "") -> None:
        super().__init__(found)
        self.log = log[-4000:]


@dataclass
class Check:
    """A step under way.

    Attributes:
        device: the device that is checked.
        folder: for what steps write.
        rehearse: toy sizes, on the CPU.
        deadline: of the step, by ``time.monotonic``.
        losses: of each run of :meth:`train`, by its name.
    """

    device: str
    folder: Path
    rehearse: bool
    deadline: float = 0.0
    losses: dict[str, Losses] = field(default_factory=dict)

    def python(self, *words: str, ranks: int = 1, **environment: str) -> str:
        """What ``python WORDS`` prints, or the first of some ranks; all are killed at the step's deadline.

        Raises:
            CheckFailed: it failed or took too long.
        """
        logs = [self.folder / f"rank-{rank}.log" for rank in range(ranks)]
        environments = [environment]
        if ranks > 1:
            import torch.distributed as dist

            # As torchrun's agent does, the parent holds the store. All ranks take the one card.
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            shared = {
                "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "LOCAL_RANK": "0",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            environments = [{**environment, **shared, "RANK": str(rank)} for rank in range(ranks)]
        context = multiprocessing.get_context("forkserver")
        processes = [
            context.Process(target=_python, args=(words, *of_rank)) for of_rank in zip(environments, logs, strict=True)
        ]
        try:
            for process in processes:
                process.start()
            self._wait(processes, logs)
        finally:
            for process in processes:
                _kill(process)
        return logs[0].read_text(errors="replace")

    def _wait(self, processes: list[BaseProcess], logs: list[Path]) -> None:
        running = dict(zip(processes, logs, strict=True))
        while running:
            multiprocessing.connection.wait(
                [process.sentinel for process in running], max(self.deadline - time.monotonic(), 0.0)
            )
            for process in [process for process in running if process.exitcode is not None]:
                told = running.pop(process).read_text(errors="replace").strip()
                if process.exitcode:
                    line = (told.splitlines() or ["printed nothing"])[-1]
                    raise CheckFailed(f"exit code {process.exitcode}: {line[:200]}", told)
            if running and time.monotonic() >= self.deadline:
                log = next(iter(running.values()))
                raise CheckFailed("took longer than its limit", log.read_text(errors="replace"))

    def train(self, name: str, *flags: str, ranks: int = 1, device: str = "") -> Losses:
        """Loss and gradient norm of each iteration of a tiny run into ``folder / name``, which is made once."""
        if name not in self.losses:
            save = self.folder / name
            gloo = ("--distributed-backend", "gloo") if ranks > 1 else ()
            self.python("-m", "megatron_flashi2v", "train", *TRAIN, "--save", str(save), "--device",
                        device or self.device, *gloo, *flags, ranks=ranks)
            rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
            self.losses[name] = [(row["loss"], row["grad_norm"]) for row in rows]
        return self.losses[name]

    def train_device(self) -> Losses:
        """The run in fp32 on the device that others are compared with; its checkpoints are written beside it."""
        return self.train("device", "--async-save")


def _python(words: tuple[str, ...], environment: dict[str, str], log: Path) -> None:
    """Become ``python WORDS``, whose output goes to a file."""
    os.setsid()  # so that whatever it starts is killed with it
    with open(log, "wb", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    torch = sys.modules.get("torch")
    # A library, such as Transformer Engine, took the card when it was imported: no fork can have it.
    if torch is not None and torch.cuda._is_in_bad_fork():
        os.execv(sys.executable, [sys.executable, *words])
    if words[0] == "-m":
        sys.argv = ["", *words[2:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")


def _kill(process: BaseProcess) -> None:
    if process.pid is None or process.exitcode is not None:
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # before it has a group of its own
        process.kill()
    process.join()


def kernels(check: Check) -> str:
    """The kernels' tests against the references in fp64, on the device."""
    names = ("modulation", "qk_norm_rope") if check.rehearse else ("modulation", "qk_norm_rope", "inductor")
    files = [f"tests/unit/kernels/test_kernels_{name}.py" for name in names]
    only = ["-k", "reference or torchs"] if check.rehearse else []
    options = ["-q", "-p", "no:cacheprovider", *only]
    told = check.python("-m", "pytest", *options, *files, FLASHI2V_TEST_DEVICE=check.device)
    return told.strip().splitlines()[-1]


def cpu_losses(check: Check) -> str:
    """fp32 on the device against fp32 on the CPU."""
    return _near(check.train_device(), check.train("cpu", device="cpu"), 1e-5)


def deterministic(check: Check) -> str:
    """bf16 with --deterministic: the same bits again, and with other recomputation."""
    flags = ("--bf16", "--deterministic")
    first = check.train("bits", *flags)
    for name in ("again", "selective", "skip_attention"):
        other = () if name == "again" else ("--recompute-granularity", name)
        if check.train(f"bits-{name}", *flags, *other) != first:
            raise CheckFailed(f"other bits: {name}")
    return "the same bits again, with selective and with skip_attention"


def resume(check: Check) -> str:
    """The second half again from the checkpoint in its midst, which was saved beside training."""
    whole = check.train_device()
    half = check.folder / "half"
    shutil.copytree(check.folder / "device", half)
    shutil.rmtree(half / f"iter_{ITERATIONS:07d}")
    (half / "latest_checkpointed_iteration.txt").write_text(str(ITERATIONS // 2))
    (half / "metrics.jsonl").unlink()
    return _near(check.train("half"), whole[ITERATIONS // 2 :], 1e-6)


def sampling(check: Check) -> str:
    """A video of the run's checkpoint on the device and on the CPU: the way from the same noise."""
    import torch
    from PIL import Image
    from safetensors.torch import load_file, save_file

    check.train_device()
    picture, start = check.folder / "picture.png", check.folder / "noise.safetensors"
    Image.linear_gradient("L").convert("RGB").save(picture)
    noise = torch.randn(LATENTS, generator=torch.Generator().manual_seed(0))
    save_file({"noise": noise}, start)
    ways = []
    for name, device in (("on-device", check.device), ("on-cpu", "cpu")):
        video = check.folder / f"{name}.mp4"
        check.python("-m", "megatron_flashi2v", "sample", "--load", str(check.folder / "device"), *SAMPLE,
                     "--image", str(picture), "--noise", str(start), "--output", str(video), "--device", device)
        (latents,) = load_file(video.with_suffix(".safetensors")).values()
        ways.append(latents.view(LATENTS) - noise)
        if not video.stat().st_size or not ways[-1].isfinite().all():
            raise CheckFailed(f"{name}: latents are not finite")
    way, wanted = ways
    return _within(((way - wanted).abs().max() / wanted.abs().max()).item(), 1e-4)


def host_reads(check: Check) -> str:
    """A step in bf16 under ``torch.cuda.set_sync_debug_mode("error")``."""
    told = check.python("tools/check_host_reads.py", "--device", check.device, "--model", "tiny", *TOY)
    seen = " that Python shows: a CPU has no waits to refuse" if check.rehearse else ""
    return told.strip().splitlines()[-1] + seen


def ranks(check: Check) -> str:
    """Two ranks on one device over gloo, against one process."""
    layouts = {
        "TP 2": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
        "PP 2": ("--pipeline-model-parallel-size", "2"),
        "ring 2": ("--context-parallel-size", "2", "--context-parallel-algo", "ring"),
        "DP 2": ("--use-distributed-optimizer",),
    }
    alone, found = check.train_device(), []
    for name, flags in layouts.items():
        try:
            found.append(f"{name} {_near(check.train(name.replace(' ', '-'), *flags, ranks=2), alone, 1e-5)}")
        except CheckFailed as error:
            raise CheckFailed(f"{name}: {error}", error.log) from None
    return ", ".join(found)


def kernel_speed(check: Check) -> str:
    """The kernels' device time."""
    toy = ["--models", "tiny", "--dtypes", "float32", "--operators", "gate_residual", "--skip", "inductor",
           "--bucket-shapes", "2", "6", "4", *TOY]
    report = check.folder / "kernels.json"
    check.python("tools/bench_kernels.py", "--device", check.device, "--json", str(report),
                 *(toy if check.rehearse else ["--models", "1.3b", "--rounds", "3"]))
    found = json.loads(report.read_text())
    return f"{sum('ms' in row for row in found['rows'])} times, starts: {len(found['starts'])}"


def step_speed(check: Check) -> str:
    """A step of the 1.3b beside diffusers' with compiled blocks, and its parts beside their floors."""
    report = check.folder / "step.json"
    toy = ["--model", "tiny", *TOY, "--no-bf16", "--peer", "diffusers"]
    check.python("tools/bench_step.py", "--device", check.device, "--json", str(report),
                 *(toy if check.rehearse else ["--rounds", "3", "--peer", "diffusers-compiled"]))
    found = json.loads(report.read_text())
    told = ", ".join(f"{row['part']} {row['over_floor']:.2f}" for row in found["parts"] if row["over_floor"])
    return f"time over the peer's {found['ratio_to_peer']:.3f}, {found['launches']} launches; over the floor: {told}"


STEPS: dict[str, tuple[Callable[[Check], str], int]] = {
    "kernels": (kernels, 150), "cpu_losses": (cpu_losses, 60), "deterministic": (deterministic, 60),
    "resume": (resume, 45), "sampling": (sampling, 60), "host_reads": (host_reads, 45), "ranks": (ranks, 120),
    "kernel_speed": (kernel_speed, 180), "step_speed": (step_speed, 150),
}  # fmt: skip
"""Steps with their limits in seconds."""


def _near(found: Losses, wanted: Losses, limit: float) -> str:
    if len(found) != len(wanted):
        raise CheckFailed(f"{len(found)} iterations, not {len(wanted)}")
    pairs = [pair for rows in zip(found, wanted, strict=True) for pair in zip(*rows, strict=True)]
    return _within(max(abs(a - b) / abs(b) for a, b in pairs), limit)


def _within(error: float, limit: float) -> str:
    if not error <= limit:
        raise CheckFailed(f"differs by {error:.2g} where {limit:g} is allowed")
    return f"{error:.1g} (allowed: {limit:g})"


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
    return {"commit": commit, "device": device, "versions": versions, "date": time.strftime("%Y-%m-%d")}


def run_step(check: Check, name: str, limit: float) -> dict[str, Any]:
    """A step's row of the table."""
    step, _ = STEPS[name]
    start = time.monotonic()
    check.deadline = start + limit
    row: dict[str, Any] = {"step": name, "passed": False}
    try:
        row.update(found=step(check), passed=True)
    except CheckFailed as error:
        row.update(found=str(error), log=error.log)
    except (OSError, ValueError, KeyError) as error:  # of a file that is not as it should be
        row.update(found=f"{type(error).__name__}: {error}")
    return {**row, "seconds": time.monotonic() - start}


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
    report = {**conditions(options.rehearse), "steps": []}
    target = options.json.absolute()
    os.chdir(ROOT)
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ["PYTHONWARNINGS"] = "ignore"  # of what is imported; between the table's lines
    multiprocessing.set_forkserver_preload(PRELOADED)
    sys.stdout.write(f"{report['device']}, torch {report['versions']['torch']}, commit {report['commit']}\n")
    with tempfile.TemporaryDirectory() as folder:
        check = Check("cpu" if options.rehearse else "cuda", Path(folder), options.rehearse)
        for name in options.only:
            row = run_step(check, name, STEPS[name][1] * options.limit_factor)
            report["steps"].append(row)
            mark = "passed" if row["passed"] else "FAILED"
            sys.stdout.write(f"{name:14} {mark}  {row['seconds']:6.1f} s  {row['found']}\n")
            sys.stdout.flush()
        report.update((path.stem, json.loads(path.read_text())) for path in sorted(Path(folder).glob("*.json")))
    target.write_text(json.dumps(report, indent=1) + "\n")
    sys.stdout.write(f"report: {target}\n")
    return 0 if all(row["passed"] for row in report["steps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
