"""Every implementation of every operator that runs here, at the shapes of the models that we train.

On CUDA the time is that of the kernels alone: the host takes longer to launch a short one than the device to run it.
What compiles is timed at its start too, over the shapes of several buckets, with the caches that the disk has.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashi2v_kernels.attention import BLOCK_BACKWARD, LOG_SUM_EXP
from flashi2v_kernels.qk_norm_rope.tables import rope_tables
from flashi2v_kernels.registry import OPERATORS, Kernel, KernelUnavailable, resolve, specs_of
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.evaluation.bench_options import KernelBenchmark
from megatron_flashi2v.evaluation.benchmark import (
    copy_ceiling,
    interleaved_seconds,
    kernel_seconds,
    machine,
    matmul_ceiling,
    median_ratio,
    table,
    write_json,
)
from megatron_flashi2v.models.patches import token_grid
from megatron_flashi2v.models.presets import PRESETS
from megatron_flashi2v.models.spec import ELEMENTWISE
from megatron_flashi2v.runtime.device import Device, resolve_device

COLUMNS = ("model", "operator", "implementation", "dtype", "direction", "ms", "rate", "unit", "of_ceiling",
           "of_eager", "why_not")
START_COLUMNS = ("model", "operator", "implementation", "dtype", "first_s", "other_shapes", "others_s", "compilations")
EAGER = {"attention": "torch_sdpa", "fourier_highpass": "torch_fft"}
"""What counts as eager torch; elsewhere the reference, which is a line or two of it."""
SLOW_DEFINITIONS = ("attention", "fourier_highpass")
"""Operators whose reference is not for use: a whole score matrix, and a loop over bins."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operator's inputs and what they cost.

    Attributes:
        call: an implementation on the inputs.
        leaves: what to differentiate by; empty for operators without gradient.
        work: bytes that must be moved, or FLOPs that are defined, in forward and in backward.
        unit: GB/s or TFLOP/s.
    """

    call: Callable[[Callable[..., Any]], Tensor | tuple[Tensor, ...]]
    leaves: tuple[Tensor, ...]
    work: tuple[int, int]
    unit: str = "GB/s"


def run(options: KernelBenchmark) -> str:
    """Measure, write the report if asked for, and return the table.

    Raises:
        ConfigError: the device is not there.
    """
    device = resolve_device(options.device)
    rows: list[dict[str, Any]] = []
    starts: list[dict[str, Any]] = []
    ceilings: dict[str, float] = {"GB/s": copy_ceiling(device, options.rounds) / 1e9}
    for dtype_name in options.dtypes:
        dtype = getattr(torch, dtype_name)
        ceilings["TFLOP/s"] = ceilings[dtype_name] = matmul_ceiling(device, dtype, options.rounds) / 1e12
        for model in options.models:
            for operator in options.operators or OPERATORS:
                if operator in ELEMENTWISE:  # before anything else compiles them
                    starts += [{"model": model, "operator": operator, "dtype": dtype_name, **row}
                               for row in start_up(operator, PRESETS[model], dtype, device, options)]
                case = make_case(operator, PRESETS[model], options.latent_shape, dtype, device)
                for row in measure(
                    operator, PRESETS[model], case, dtype, device, options.rounds, ceilings[case.unit], options.skip
                ):
                    rows.append({"model": model, "operator": operator, "dtype": dtype_name, **row})
                del case
                device.empty_cache()
    report = {"machine": machine(device), "latent_shape": options.latent_shape, "ceilings": ceilings, "rows": rows,
              "bucket_shapes": options.bucket_shapes, "starts": starts}
    if options.json is not None:
        write_json(options.json, report)
    reached = ", ".join(f"{value:.4g} {name}" for name, value in ceilings.items() if name != "TFLOP/s")
    told = f"{report['machine']}\nceilings (copy in GB/s, matrix product in TFLOP/s): {reached}\n{table(rows, COLUMNS)}"
    return f"{told}\nfirst calls, forward and backward\n{table(starts, START_COLUMNS)}" if starts else told


def measure(
    operator: str, config: ModelConfig, case: Case, dtype: torch.dtype, device: Device, rounds: int, ceiling: float,
    skip: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """Rows of one operator: forward and backward of what runs here, and the reason for what does not.

    What compiles does so anew for this shape alone, as in a run of one shape.
    """
    torch.compiler.reset()
    functions, reasons = _implementations(operator, config, dtype, device, bool(case.leaves), skip)
    yield from ({"implementation": name, "why_not": reason} for name, reason in reasons.items())
    directions: dict[str, dict[str, Callable[[], object]]] = {
        "forward": {name: _forward(case, function) for name, function in functions.items()}
    }
    if case.leaves:
        directions["backward"] = {name: _backward(case, function) for name, function in functions.items()}
    # On an NVIDIA card the profiler tells the device's own time.
    measure = None if device.compute_capability() is None else kernel_seconds
    if operator == "attention":
        directions["ring block"] = _ring_blocks(case, config, dtype, device, skip)
    for (direction, timed), work in zip(directions.items(), (*case.work, sum(case.work)), strict=False):
        seconds = interleaved_seconds(timed, device, rounds, measure=measure)
        eager = seconds.get(EAGER.get(operator, "reference"))
        for name, values in seconds.items():
            rate = work / statistics.median(values) / (1e12 if case.unit == "TFLOP/s" else 1e9)
            yield {"implementation": name, "direction": direction, "ms": 1e3 * statistics.median(values),
                   "rate": rate, "unit": case.unit, "of_ceiling": rate / ceiling,
                   "of_eager": median_ratio(values, eager) if eager else None, "seconds": values}


def _ring_blocks(
    case: Case, config: ModelConfig, dtype: torch.dtype, device: Device, skip: Sequence[str]
) -> dict[str, Callable[[], object]]:
    """What a ring does with a block of keys: forward with the log-sum-exp, then the implementation's own backward."""
    query, key, value = (leaf.detach() for leaf in case.leaves)

    def block(kernel: Kernel) -> object:
        output, log_sum_exp = kernel.function(query, key, value, return_log_sum_exp=True)
        assert kernel.backward is not None  # a feature that was asked for
        return kernel.backward(query, query, key, value, output, log_sum_exp)  # any gradient takes as long

    blocks: dict[str, Callable[[], object]] = {}
    for name in [spec.name for spec in specs_of("attention") if spec.name not in (*skip, "reference")]:
        with contextlib.suppress(KernelUnavailable):
            kernel = resolve("attention", device.name, dtype, name, head_dim=config.head_dim,
                             features=(LOG_SUM_EXP, BLOCK_BACKWARD))
            blocks[name] = partial(block, kernel)
    return blocks


def _implementations(
    operator: str, config: ModelConfig, dtype: torch.dtype, device: Device, needs_gradient: bool, skip: Sequence[str]
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """What runs here, and why the rest does not."""
    functions: dict[str, Callable[..., Any]] = {}
    reasons: dict[str, str] = {}
    for name in [spec.name for spec in specs_of(operator)]:
        if name in skip or (name == "reference" and operator in SLOW_DEFINITIONS):
            continue
        try:
            functions[name] = resolve(
                operator, device.name, torch.float32 if operator == "fourier_highpass" else dtype, name,
                head_dim=config.head_dim, needs_gradient=needs_gradient,
            ).function
        except KernelUnavailable as error:
            reasons[name] = str(error).partition("cannot run here: ")[2].partition("; available")[0]
    return functions, reasons


def start_up(
    operator: str, config: ModelConfig, dtype: torch.dtype, device: Device, options: KernelBenchmark
) -> Iterator[dict[str, Any]]:
    """Rows of what the first calls cost, in one shape and then in others, and how often torch compiled for them."""
    functions, _ = _implementations(operator, config, dtype, device, True, options.skip)
    torch.compiler.reset()
    for name, function in functions.items():
        before, seconds = compiled_graphs(), list[float]()
        for shape in (options.latent_shape, *options.bucket_shapes):
            case = make_case(operator, config, shape, dtype, device)
            device.synchronize()
            start = time.perf_counter()
            _backward(case, function)()
            device.synchronize()
            seconds.append(time.perf_counter() - start)
        yield {"implementation": name, "first_s": seconds[0], "other_shapes": len(seconds) - 1,
               "others_s": sum(seconds[1:]), "compilations": compiled_graphs() - before, "seconds": seconds}


def compiled_graphs() -> int:
    """Graphs that ``torch.compile`` has compiled in this process; a graph is compiled with its backward."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _forward(case: Case, function: Callable[..., Any]) -> Callable[[], object]:
    return lambda: case.call(function)


def _backward(case: Case, function: Callable[..., Any]) -> Callable[[], object]:
    with torch._functorch.config.patch(donated_buffer=False):  # a compiled backward would run once only
        results = case.call(function)
    outputs = (results,) if isinstance(results, Tensor) else results
    gradients = [torch.randn(output.shape, device=output.device).to(output.dtype) for output in outputs]
    return lambda: torch.autograd.grad(outputs, case.leaves, gradients, retain_graph=True)


def make_case(
    operator: str, config: ModelConfig, latent_shape: Sequence[int], dtype: torch.dtype, device: Device
) -> Case:
    """Inputs of one sample at a model's width, and the least that must be moved or computed."""
    frames, height, width = latent_shape
    grid = token_grid((frames, height, width), config.patch_size)
    tokens, d, heads = grid[0] * grid[1] * grid[2], config.hidden_size, config.num_attention_heads

    def draw(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device.torch_device).to(to).requires_grad_()

    moved = tokens * d * dtype.itemsize
    if operator == "attention":
        qkv = tuple(draw(1, tokens, heads, config.head_dim) for _ in range(3))
        flops = 4 * tokens**2 * d
        return Case(call=lambda f: f(*qkv), leaves=qkv, work=(flops, 2 * flops), unit="TFLOP/s")
    if operator == "fourier_highpass":
        images = draw(1, config.latent_channels, height, width, to=torch.float32).detach()
        ratio = torch.full((1,), 0.1, device=device.torch_device)
        return Case(call=lambda f: f(images, ratio), leaves=(), work=(2 * images.numel() * 4, 0))
    if operator == "bias_gelu_tanh":
        inner = (draw(tokens, 1, config.ffn_hidden_size), draw(config.ffn_hidden_size))
        moved = inner[0].numel() * dtype.itemsize
        return Case(call=lambda f: f(*inner), leaves=inner, work=(2 * moved, 3 * moved))
    if operator in ("ada_layer_norm", "residual_norm", "gate_residual"):
        hidden, rows = draw(tokens, 1, d), tuple(draw(1, d, to=torch.float32) for _ in range(3))
        if operator == "ada_layer_norm":
            return Case(call=lambda f: f(hidden, *rows[:2], config.norm_eps, dtype=dtype), leaves=(hidden, *rows[:2]),
                        work=(2 * moved, 3 * moved))
        update = draw(tokens, 1, d)
        if operator == "residual_norm":
            return Case(call=lambda f: f(hidden, update, *rows, config.norm_eps, dtype=dtype),
                        leaves=(hidden, update, *rows), work=(4 * moved, 6 * moved))
        return Case(call=lambda f: f(hidden, update, rows[0]), leaves=(hidden, update, rows[0]),
                    work=(3 * moved, 3 * moved))
    query = draw(tokens, 1, heads, 3, config.head_dim).detach()[:, :, :, 0].requires_grad_()
    weight = draw(d, to=torch.float32)
    cos, sin = (part.to(device.torch_device) for part in rope_tables(grid, config.head_dim))
    if operator == "rms_norm":
        return Case(call=lambda f: f(query, weight, config.norm_eps), leaves=(query, weight),
                    work=(2 * moved, 3 * moved))
    assert operator == "qk_norm_rope", f"no benchmark for {operator}"
    return Case(call=lambda f: f(query, weight, cos, sin, config.norm_eps), leaves=(query, weight),
                work=(2 * moved, 3 * moved))
