"""What is checked on a card, step by step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from check_gpu_runs import ITERATIONS, Check, CheckFailed

MODELS = Path(__file__).resolve().parents[1] / "examples" / "quickstart" / "models"
SAMPLE = (
    "--vae", str(MODELS / "vae"), "--text-encoder", str(MODELS / "text_encoder"), "--tokenizer",
    str(MODELS / "tokenizer"), "--prompt", "a red square", "--num-frames", "9", "--height", "48", "--width", "80",
    "--num-steps", "4", "--latents",
)  # fmt: skip
LATENTS = (16, 5, 12, 20)
REQUIRED_RATIO = 0.95
"""Of our step's time to that of diffusers' compiled model at equal recomputation."""
TOY = ("--latent-shape", "2", "4", "6", "--rounds", "1")



def kernels(check: Check) -> str:
    """The kernels' tests against the references in fp64, on the device."""
    attention = [f"attention_cuda.py::{name}" for name in ("test_log_sum_exp", "test_backward_of_blocks_adds_up")]
    only = ["-k", "reference or torchs or torch_cudnn"] if check.rehearse else []
    return _tests(check, ["modulation.py", "qk_norm_rope.py", *attention], *only)


def inductor(check: Check) -> str:
    """The same of the compiled references; the tests that compile for the device are long ones."""
    return _tests(check, ["inductor.py"], *(("-k", "aot_eager-gate_residual") if check.rehearse else ("-m", "")))


def _tests(check: Check, names: Sequence[str], *flags: str) -> str:
    files = [f"tests/unit/kernels/test_kernels_{name}" for name in names]
    told = check.python("-m", "pytest", "-q", "-p", "no:cacheprovider", *flags, *files,
                        FLASHI2V_TEST_DEVICE=check.device)
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
            raise type(error)(f"{name}: {error}", error.log) from None
    return ", ".join(found)


def ring(check: Check) -> str:
    """A ring of two ranks in bf16, on cuDNN's kernel where the card has it: its attention, and a run's losses."""
    import torch

    from flashi2v_kernels.attention import BLOCK_BACKWARD, LOG_SUM_EXP
    from flashi2v_kernels.registry import KernelUnavailable, resolve

    needs = {"features": (LOG_SUM_EXP, BLOCK_BACKWARD), "needs_gradient": True}
    try:
        kernel = resolve("attention", check.device, torch.bfloat16, "torch_cudnn", **needs)
    except KernelUnavailable:
        kernel = resolve("attention", check.device, torch.bfloat16, **needs)
    chosen = ("--attention-backend", kernel.spec.name)
    attention = check.python("tools/check_ring.py", "--device", check.device, *chosen, ranks=2).strip().splitlines()[-1]
    flags = ("--context-parallel-size", "2", "--context-parallel-algo", "ring", *chosen)
    alone, found = check.train("bf16", "--bf16"), check.train("ring-bf16", "--bf16", *flags, ranks=2)
    losses = _near([row[:1] for row in found], [row[:1] for row in alone], 2e-3)
    return f"{kernel.spec.name}: attention {attention}, losses {losses}"


def kernel_speed(check: Check) -> str:
    """Device time of the kernels at the widths of the 1.3b and the 14b, without what compiles."""
    return _kernel_times(check, "kernels", "--models", "1.3b", "14b", "--skip", "inductor")


def inductor_speed(check: Check) -> str:
    """Device time of compiled operators beside the hand-written at the width of the 1.3b, and what starting costs."""
    from flashi2v_kernels.registry import OPERATORS, specs_of

    compiled = [name for name in OPERATORS if any(spec.name == "inductor" for spec in specs_of(name))]
    return _kernel_times(check, "inductor", "--models", "1.3b", "--skip", "torch", "--operators", *compiled)


def _kernel_times(check: Check, name: str, *flags: str) -> str:
    toy = ["--models", "tiny", "--dtypes", "float32", "--operators", "gate_residual", "--skip", "inductor",
           "--bucket-shapes", "2", "6", "4", *TOY]
    report = check.folder / f"{name}.json"
    check.python("tools/bench_kernels.py", "--device", check.device, "--json", str(report),
                 *(toy if check.rehearse else [*flags, "--rounds", "3"]))
    found = json.loads(report.read_text())
    return f"{sum('ms' in row for row in found['rows'])} times, starts: {len(found['starts'])}"


def layers_that_fit(free_gib: float) -> int:
    """Blocks of the 1.3b without recomputation for which memory is free beside those of the compiled peer."""
    return 30 if free_gib >= 120 else 15


def step_none(check: Check) -> str:
    """A step of the 1.3b beside diffusers' with compiled blocks, neither recomputed; its parts beside their floors."""
    layers = [] if check.rehearse else ["--num-layers", str(layers_that_fit(check.free_gib))]
    found, told = _step(check, "step_none", *layers)
    parts = ", ".join(f"{row['part']} {row['over_floor']:.2f}" for row in found["parts"] if row["over_floor"])
    return f"{told}, {found['launches']} launches; over the floor: {parts}"


def step_full(check: Check) -> str:
    """The same with all blocks of both recomputed."""
    return _step(check, "step_full", "--recompute.recompute-granularity", "full", "--no-profile")[1]


def _step(check: Check, name: str, *flags: str) -> tuple[dict[str, Any], str]:
    report = check.folder / f"{name}.json"
    sizes = ["--model", "tiny", *TOY, "--no-bf16", "--peer", "diffusers"]
    if not check.rehearse:
        sizes = ["--model", "1.3b", "--rounds", "3", "--peer", "diffusers-compiled"]
    check.python("tools/bench_step.py", "--device", check.device, "--json", str(report), *sizes, *flags)
    found = json.loads(report.read_text())
    ratio, layers = found["ratio_to_peer"], found["model"]["num_layers"]
    return found, f"{ratio:.3f} of the peer's time (required: {REQUIRED_RATIO}) with {layers} layers"


STEPS: dict[str, tuple[Callable[[Check], str], int]] = {
    "step_none": (step_none, 150), "step_full": (step_full, 120), "kernels": (kernels, 120),
    "kernel_speed": (kernel_speed, 90), "ring": (ring, 60), "ranks": (ranks, 120), "cpu_losses": (cpu_losses, 60),
    "deterministic": (deterministic, 60), "host_reads": (host_reads, 45), "resume": (resume, 45),
    "sampling": (sampling, 60), "inductor": (inductor, 150), "inductor_speed": (inductor_speed, 180),
}  # fmt: skip
"""Steps with their limits in seconds, in the order of their worth: the time of all together may not reach the last."""


def _near(found: Sequence[Sequence[float]], wanted: Sequence[Sequence[float]], limit: float) -> str:
    if len(found) != len(wanted):
        raise CheckFailed(f"{len(found)} iterations, not {len(wanted)}")
    pairs = [pair for rows in zip(found, wanted, strict=True) for pair in zip(*rows, strict=True)]
    return _within(max(abs(a - b) / abs(b) for a, b in pairs), limit)


def _within(error: float, limit: float) -> str:
    if not error <= limit:
        raise CheckFailed(f"differs by {error:.2g} where {limit:g} is allowed")
    return f"{error:.1g} (allowed: {limit:g})"
