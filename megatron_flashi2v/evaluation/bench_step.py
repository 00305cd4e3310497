"""A training step, with the model-defined FLOP count: beside diffusers' model if asked for, or over several ranks."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from flashi2v_kernels.registry import describe
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.layout import check_layout
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.evaluation import step_parts
from megatron_flashi2v.evaluation.bench_options import StepBenchmark
from megatron_flashi2v.evaluation.benchmark import (
    copy_ceiling,
    interleaved_seconds,
    machine,
    matmul_ceiling,
    median_ratio,
    table,
    write_json,
)
from megatron_flashi2v.evaluation.communication import Communication
from megatron_flashi2v.evaluation.step_ours import OurStep, agreed
from megatron_flashi2v.evaluation.step_peer import PeerStep
from megatron_flashi2v.models.flops import forward_flops, training_flops
from megatron_flashi2v.models.patches import token_grid
from megatron_flashi2v.models.presets import PRESETS
from megatron_flashi2v.parallel.world import single_process, world
from megatron_flashi2v.runtime.device import Device, resolve_device
from megatron_flashi2v.runtime.host_reads import HostReads
from megatron_flashi2v.runtime.launch import LaunchEnvironment, detect_launch
from megatron_flashi2v.runtime.peaks import peak_tflops

COLUMNS = ("implementation", "seconds", "tflops", "mfu", "of_matmul", "peak_gib", "forward_s", "backward_s",
           "optimizer_s")


def run(options: StepBenchmark, launch: LaunchEnvironment | None = None) -> str:
    """Measure, write the report if asked for, and return the tables; nothing on other ranks than the first.

    Args:
        options: what to measure.
        launch: this process's place; by default as the launcher's variables tell.

    Raises:
        ConfigError: an unknown preset, a layout that does not fit the ranks, a device or implementation that is not
            there, or a peer beside several ranks.
    """
    launch = launch or detect_launch(os.environ)
    if options.model not in PRESETS:
        raise ConfigError(f"--model {options.model}: choose one of {', '.join(PRESETS)}")
    config = dataclasses.replace(PRESETS[options.model], conditioning=options.conditioning)
    config = dataclasses.replace(config, num_layers=options.num_layers or config.num_layers)
    _check_ranks(options, config, launch.world_size)
    device = resolve_device(options.device, launch.local_rank, backend=options.parallel.distributed_backend)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    ceiling = matmul_ceiling(device, dtype) / 1e12
    with world(device, launch, options.parallel) as groups:
        ours = OurStep(options, config, groups, device)
        steps: dict[str, Callable[[], object]] = {"megatron_flashi2v": ours}
        configs = {"megatron_flashi2v": config}
        if options.peer != "none":
            configs[options.peer] = dataclasses.replace(config, conditioning="text_to_video")
            steps[options.peer] = PeerStep(
                configs[options.peer], ours.batch, dtype, device, options.recompute,
                compiled=options.peer == "diffusers-compiled",
            )
        peaks = {name: _peak(step, device) for name, step in steps.items()}
        seconds = interleaved_seconds(steps, device, options.rounds, agree=agreed(device))
        breakdown = ours.breakdown(device, options.rounds)
        profiled, exchanged = _profile(ours, device, ceiling * 1e12) if options.profile else ({}, None)
        kernels = describe(ours.spec.kernels.chosen)
    if launch.rank != 0:
        return ""
    sharers = groups.tp.size() * groups.cp.size()  # of one sample's work
    rows = []
    for name, values in seconds.items():
        flops = training_flops(configs[name], options.latent_shape, options.micro_batch_size) / sharers
        tflops = flops / statistics.median(values) / 1e12
        peak = peak_tflops(device, dtype)
        rows.append({
            "implementation": name, "seconds": statistics.median(values), "tflops": tflops,
            "mfu": tflops / peak if peak else None, "of_matmul": tflops / ceiling, "peak_gib": peaks[name] / 2**30,
            "flops": flops, "rounds": values, **(breakdown if name == "megatron_flashi2v" else {}),
        })
    report: dict[str, Any] = {
        "machine": machine(device), "model": config.to_json(), "latent_shape": options.latent_shape,
        "tokens": math.prod(token_grid(options.latent_shape, config.patch_size)), "dtype": str(dtype),
        "micro_batch_size": options.micro_batch_size, "recompute": dataclasses.asdict(options.recompute),
        "matmul_ceiling_tflops": ceiling, "peak_tflops": peak_tflops(device, dtype), "rows": rows,
        "forward_flops": forward_flops(config, options.latent_shape, options.micro_batch_size),
        "kernels": kernels, "world_size": launch.world_size, **profiled,
    }
    if launch.world_size > 1:
        report["parallel"] = dataclasses.asdict(options.parallel)
    if launch.world_size > 1 and exchanged is not None:
        report["communication"] = {**dataclasses.asdict(exchanged), "exposed_share": exchanged.exposed_share}
    if options.peer in seconds:
        report["ratio_to_peer"] = median_ratio(seconds["megatron_flashi2v"], seconds[options.peer])
    if options.json is not None:
        write_json(options.json, report)
    return _text(report)


def _profile(ours: OurStep, device: Device, flops_per_second: float) -> tuple[dict[str, Any], Communication]:
    """What one step of ours launches and exchanges; of one process also its host reads and its parts' floors."""
    options, copied = ours.options, copy_ceiling(device, ours.options.rounds)
    parts, exchanged = step_parts.profile_step(ours, device)
    least: dict[str, float] = {}
    reads: int | None = None
    if torch.distributed.get_world_size() == 1:
        least = step_parts.floors(
            ours.spec.config, options.latent_shape, options.micro_batch_size, ours.spec.dtype, ours.parameters,
            flops_per_second=flops_per_second, bytes_per_second=copied,
        )
        with HostReads(device, allowed=None) as watched:
            ours()
        reads = watched.count
    return {
        "copy_ceiling_gb_s": copied / 1e9, "parts": step_parts.part_rows(parts, least), "host_reads": reads,
        "launches": sum(launches for launches, _ in parts.values()),
    }, exchanged


def host_reads(options: StepBenchmark) -> int:
    """How often the host reads the device in our step: once, for the loss, the norm and all counts together.

    Raises:
        RuntimeError: where a second read happens.
    """
    device = resolve_device(options.device)
    config = dataclasses.replace(PRESETS[options.model], conditioning=options.conditioning)
    with single_process(device) as groups:
        step = OurStep(options, config, groups, device)
        step()  # what is made once: the optimizer's state, compiled kernels
        with HostReads(device, allowed=1) as reads:
            step()
    return reads.count


def _check_ranks(options: StepBenchmark, config: ModelConfig, world_size: int) -> None:
    """Refuse what several ranks cannot measure."""
    check_layout(options.parallel, config, world_size)
    if options.parallel.pipeline_model_parallel_size > 1:
        raise ConfigError(
            f"--pipeline-model-parallel-size {options.parallel.pipeline_model_parallel_size}: a step of one microbatch "
            "is no pipeline's; measure with tensor, context and data parallelism"
        )
    if options.peer != "none" and world_size > 1:
        raise ConfigError(f"--peer {options.peer} runs in one process, and {world_size} were started; start one")


def _peak(step: Callable[[], object], device: Device) -> int:
    """Bytes held at most during a step, optimizer state included; on the CPU since the process began."""
    step()  # the optimizer makes its state here
    device.reset_max_memory_allocated()
    step()
    device.synchronize()
    return device.max_memory_allocated()


def _text(report: Mapping[str, Any]) -> str:
    layers = report["model"]["num_layers"]
    ranks = f"{report['world_size']} ranks, figures of the first; " if report["world_size"] > 1 else ""
    lines = [
        f"{report['machine']}\n{ranks}{report['tokens']} tokens, {report['dtype']}, {layers} layers; "
        f"measured matrix product {report['matmul_ceiling_tflops']:.4g} TFLOP/s\n",
        table(report["rows"], COLUMNS),
    ]
    if "ratio_to_peer" in report:
        lines.append(f"\ntime over the peer's, median of rounds: {report['ratio_to_peer']:.3f}\n")
    if "communication" in report:
        lines.append(
            "\n{total_s:.4g} s of {step_s:.4g} s communicate; {exposed_s:.4g} s, {exposed_share:.1%} of the step, "
            "beside no computation\n".format(**report["communication"])
        )
    if "parts" in report:
        lines.append(
            f"\none step: {report['launches']} launches (on CPUs calls of operators), reads by the host: "
            f"{report['host_reads']}; measured copy {report['copy_ceiling_gb_s']:.4g} GB/s; "
            "floors without recomputation\n"
        )
        lines.append(table(report["parts"], step_parts.COLUMNS))
    rows = [dict(zip(("operator", "implementation", "why_not"), row, strict=True)) for row in report["kernels"]]
    lines.append("\n" + table(rows, ("operator", "implementation", "why_not")))
    return "".join(lines)
