"""How much of a step's communication nothing hides, from a profile of one rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.profiler import profile

Interval = tuple[float, float]
"""Start and end in seconds."""

COMMUNICATION = ("nccl", "hcom", "gloo:")
"""How kernels of NCCL and HCCL, and gloo's work on the host, begin their names."""


@dataclass(frozen=True)
class Communication:
    """What one rank exchanged in a profiled step.

    Attributes:
        step_s: seconds of the step.
        total_s: those of them in which anything was exchanged, waiting for slower ranks included.
        exposed_s: those of these in which the device computed nothing.
    """

    step_s: float
    total_s: float
    exposed_s: float

    @property
    def exposed_share(self) -> float:
        """Part of the step that only communicates."""
        return self.exposed_s / self.step_s


def communication(recorded: profile, step_s: float) -> Communication:
    """Measure a profiled step: of an accelerator its kernels, of a CPU its operators and gloo's threads.

    Args:
        recorded: of one rank.
        step_s: seconds of the step.
    """
    events = list(recorded.events() or ())
    kernels = [event for event in events if not str(event.device_type).endswith("CPU")]
    if kernels:
        return exposed(step_s, *_parted(kernels))
    carrying = {event.thread for event in events if event.name.startswith("gloo:")}  # they copy, on gloo's behalf
    operators = (
        event for event in events
        if event.name.startswith("gloo:") or (event.name.startswith("aten::") and event.thread not in carrying)
    )
    return exposed(step_s, *_parted(operators))


def exposed(step_s: float, communicating: list[Interval], computing: list[Interval]) -> Communication:
    """Measure intervals, which may overlap one another.

    Args:
        step_s: seconds of the step that they lie in.
        communicating: when something was exchanged.
        computing: when the device computed.
    """
    both = _length([*communicating, *computing])
    return Communication(step_s=step_s, total_s=_length(communicating), exposed_s=both - _length(computing))


def _parted(events: Iterable[Any]) -> tuple[list[Interval], list[Interval]]:
    communicating: list[Interval] = []
    computing: list[Interval] = []
    for event in events:
        kind = communicating if event.name.lower().startswith(COMMUNICATION) else computing
        kind.append((event.time_range.start * 1e-6, event.time_range.end * 1e-6))
    return communicating, computing


def _length(intervals: list[Interval]) -> float:
    """Seconds that at least one interval covers."""
    total, covered = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return total
