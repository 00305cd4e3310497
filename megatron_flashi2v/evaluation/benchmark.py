"""Timing that can be compared: interleaved rounds, medians, and what the machine itself reaches."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, supported_activities

from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.runtime.files import atomic_write_text

SHORTEST_S = 5e-3
"""Shorter calls are repeated within one measurement until they take this long: launches and clocks blur them."""


def interleaved_seconds(
    functions: Mapping[str, Callable[[], object]],
    device: Device,
    rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
    measure: Callable[[Callable[[], object], Device, int], float] | None = None,
    agree: Callable[[float], float] = float,
) -> dict[str, list[float]]:
    """Seconds of one call, by name and round; every round runs all of them once.

    What else the machine does then hits all of them alike. Each is called twice beforehand: the first time for what
    happens once (compilation, allocation), the second to see how often it fits into a measurement.

    Args:
        functions: what to time, on the device's queue.
        device: waited for before and after each measurement.
        rounds: measurements of each.
        clock: seconds; ``time.process_time`` leaves out what other processes take, for one thread on a busy CPU.
        measure: seconds of a call from the function, the device and a number of calls; by ``clock`` when None.
        agree: makes this process's seconds of a call the same on all ranks, where functions are collective.
    """
    calls: dict[str, int] = {}
    for name, function in functions.items():
        function()
        calls[name] = min(max(math.ceil(SHORTEST_S / agree(_seconds(function, device, 1, clock))), 1), 200)
    rows: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            if measure is None:
                rows[name].append(_seconds(function, device, calls[name], clock))
            else:
                rows[name].append(measure(function, device, calls[name]))
    return rows


def _seconds(function: Callable[[], object], device: Device, calls: int, clock: Callable[[], float]) -> float:
    device.synchronize()
    start = clock()
    for _ in range(calls):
        function()
    device.synchronize()
    return (clock() - start) / calls


def kernel_seconds(function: Callable[[], object], device: Device, calls: int) -> float:
    """Seconds that the device works on one call, by the profiler: neither launches nor the gaps between kernels."""
    with profile(activities=list(supported_activities())) as recorded:
        for _ in range(calls):
            function()
        device.synchronize()
    return sum(time for _, time, _ in device_events(recorded, device)) / calls


def device_events(recorded: profile, device: Device) -> Iterator[tuple[str, float, int]]:
    """(name, seconds, launches) of a profile's kernels.

    On CPUs of its operators, without those that they call: the name has those that called it behind it, and a launch is
    one that computes and calls none that does.
    """
    if device.name != "cpu":
        # Only kernels count: operators repeat the time of the kernels that they launch.
        for average in recorded.key_averages():
            if not str(average.device_type).endswith("CPU"):
                yield average.key, average.self_device_time_total * 1e-6, average.count
        return
    for event in recorded.events() or ():
        names, caller = [event.name], event.cpu_parent
        while caller is not None:
            names.append(caller.name)
            caller = caller.cpu_parent
        yield " < ".join(names), event.self_cpu_time_total * 1e-6, int(_computes(event.name) and not _calls_more(event))


def _calls_more(event: Any) -> bool:
    """Whether an operator leaves the computation to others."""
    return any(_computes(child.name) or _calls_more(child) for child in event.cpu_children)


@functools.cache
def _computes(name: str) -> bool:
    """Whether an event is of an operator of torch that makes neither a view nor empty memory."""
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None) if name.startswith("aten::") else None
    if packet is None or "empty" in name or name in ("aten::resize_", "aten::result_type"):
        return False
    return not any(getattr(packet, overload).is_view for overload in packet.overloads())


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over rounds of ours / theirs, which a slow round of the machine does not move."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def matmul_ceiling(device: Device, dtype: torch.dtype, rounds: int = 5) -> float:
    """FLOP/s of a large square matrix product: what a step's products could reach here."""
    size = 1024 if device.name == "cpu" else 8192
    left, right = torch.randn((2, size, size), device=device.torch_device).to(dtype)
    seconds = interleaved_seconds({"matmul": lambda: left @ right}, device, rounds)["matmul"]
    return 2 * size**3 / min(seconds)


def copy_ceiling(device: Device, rounds: int = 5) -> float:
    """Bytes read and written a second by a copy that no cache holds."""
    source = torch.empty((1 if device.name == "cpu" else 8) << 27, dtype=torch.uint8, device=device.torch_device)
    source.fill_(1)
    target = torch.empty_like(source)
    seconds = interleaved_seconds({"copy": lambda: target.copy_(source)}, device, rounds)["copy"]
    return 2 * source.numel() / min(seconds)


def machine(device: Device) -> dict[str, Any]:
    """Conditions of a figure: hardware, versions, threads and the machine's load."""
    versions = {}
    for package in ("torch", "triton", "megatron-core", "transformer-engine", "flash-attn", "diffusers", "torch_npu"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": device.describe(),
        "threads": torch.get_num_threads() if device.name == "cpu" else None,
        "load": os.getloadavg()[0],
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned text; floats with four significant digits, None as a dash."""
    cells = [list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]]) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """The whole report, floats in full precision."""
    atomic_write_text(path, json.dumps(report, indent=1) + "\n")
