"""Names replicas that are slower than the others.

Replicas wait for one another where their gradients are reduced, so that each iteration takes as long as the slowest
one. What tells them apart is the time that each takes to get there: forward and backward over its microbatches, with
its waits for data. Inside a replica, ranks wait for one another in every layer: a slow one makes its whole replica
slow, and it is the replica, with its hosts, that is named.
"""

from __future__ import annotations

import logging
import socket
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_flashi2v.parallel.agreement import gather_json
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.runtime.logging import AGREED
from megatron_flashi2v.training.watching.observer import Observer, Row
from megatron_flashi2v.training.watching.throughput import MICROSECONDS, PerReplica

if TYPE_CHECKING:
    from megatron_flashi2v.training.state import TrainState

SLOW = 1.3
"""Times the median of all replicas, from which on one counts as slow."""
PATIENCE = 10
"""Iterations in a row that it must be; it is named again after twice as many, four times as many ..."""

logger = logging.getLogger(__name__)


class ReplicaClock:
    """Measures this replica's time from an iteration's start to where replicas meet."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._start = self._met = device.time_mark()

    def start(self) -> None:
        """An iteration begins."""
        self._start = self._met = self._device.time_mark()

    def meet(self) -> None:
        """This replica's gradients are about to be reduced with the others'."""
        self._met = self._device.time_mark()

    def seconds(self) -> float:
        """The last iteration's; the device must have done its work."""
        return self._device.seconds_between(self._start, self._met)


class StragglerWatch(Observer):
    """Compares the replicas' times, which travel with the loss of the next iteration, and warns of slow ones.

    Args:
        groups: this rank's.
        device: what it runs on.
        clock: this replica's.
    """

    def __init__(self, groups: Groups, device: Device, clock: ReplicaClock) -> None:
        self._clock, self._own = clock, PerReplica(groups)
        self._seconds = 0.0
        self._slow_for = [0] * groups.dp.size()
        self._hosts: list[dict[str, None]] = [{} for _ in self._slow_for]
        for replica, host in gather_json([groups.dp.rank(), socket.gethostname()]):
            self._hosts[replica][host] = None

    def before_iteration(self, state: TrainState) -> None:
        """Start the clock."""
        self._clock.start()

    def counts(self) -> dict[str, tuple[int, ...]]:
        """The last iteration's time, in microseconds, in this replica's place."""
        return {"times": self._own.counts(round(self._seconds * MICROSECONDS))}

    def gradients_ready(self, state: TrainState, totals: Mapping[str, Sequence[int]]) -> None:
        """Warn of each replica that has been slow for long enough."""
        for words in self.compare(totals["times"]):
            logger.warning("%s", words, extra=AGREED)

    def after_iteration(self, row: Row) -> None:
        """Read the clock: the device has done the iteration's work."""
        self._seconds = self._clock.seconds()

    def compare(self, totals: Sequence[int]) -> list[str]:
        """Take in the replicas' times; a sentence on each that has been slow for long enough."""
        usual, found = statistics.median(totals), []
        for replica, time in enumerate(totals):
            self._slow_for[replica] = self._slow_for[replica] + 1 if time > SLOW * usual else 0
            long, rest = divmod(self._slow_for[replica], PATIENCE)
            if long and not rest and long & (long - 1) == 0:
                found.append(
                    f"replica {replica} (on {', '.join(self._hosts[replica])}) has been slow for "
                    f"{self._slow_for[replica]} iterations: the last took it {time / MICROSECONDS:.3g} s to its "
                    f"gradients, data included, and the median of {len(totals)} replicas {usual / MICROSECONDS:.3g} s"
                )
        return found
