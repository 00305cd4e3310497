"""Stacks of all threads of a job's processes, even of a process that cannot report itself.

A stopped process, or one whose interpreter other code holds, cannot write its stacks. ``faulthandler`` writes them on a
signal, without the interpreter; a stopped process does so once it is continued. Each process keeps an open file for
that, which has no name and leaves nothing behind; others on its host read it in ``/proc`` (Linux).
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

DUMP_SIGNAL = signal.SIGUSR2
_WAITS_IN = (os.path.join("torch", "distributed", ""), os.path.join("autograd", "graph.py"))
_OURS = os.path.join("megatron_flashi2v", "")


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process of a job, with what other processes on its host need to find it.

    Attributes:
        rank: its rank.
        host: its host's name.
        pid: its number there.
        started: start time in ``/proc``, since numbers are reused; empty without /proc.
        descriptor: its open file for stacks.
    """

    rank: int
    host: str
    pid: int
    started: str
    descriptor: int

    @property
    def is_alive(self) -> bool:
        """Whether it still runs on this host."""
        return bool(self.started) and _stat(self.pid)[1] == self.started

    @property
    def state(self) -> str:
        """Its state in words, from this host's ``/proc``."""
        if not self.started:
            return "cannot be inspected on this system"
        if not self.is_alive:
            return "has ended"
        words = {"T": "is stopped", "t": "is stopped by a debugger", "D": "waits for a device or a file system",
                 "Z": "has ended"}
        return words.get(_stat(self.pid)[0], "runs")

    def dump(self, seconds: float) -> str:
        """Make it write its stacks; continues it if it is stopped.

        Args:
            seconds: limit of the wait.

        Returns:
            The stacks, or the reason why there are none.
        """
        before = self.state
        try:
            if not self.is_alive:
                return f"(process {self.pid} {before})\n"
            place = Path(f"/proc/{self.pid}/fd/{self.descriptor}")
            known = place.stat().st_size
            os.kill(self.pid, DUMP_SIGNAL)
            os.kill(self.pid, signal.SIGCONT)
            size, end = known, time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(seconds / 20)
                last, size = size, place.stat().st_size
                if last == size > known:
                    break
            text = place.read_bytes()[known:].decode(errors="replace")
        except OSError as error:
            return f"(process {self.pid}, which {before}, cannot be signalled: {error.strerror})\n"
        return text or f"(process {self.pid}, which {before}, did not answer)\n"

    def kill(self) -> None:
        """Kill it."""
        with contextlib.suppress(OSError):
            if self.is_alive:
                os.kill(self.pid, signal.SIGKILL)


class OwnStacks:
    """Writes this process's stacks, on its own or at another one's :data:`DUMP_SIGNAL`."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (open until close)
        faulthandler.register(DUMP_SIGNAL, file=self._file, all_threads=True)

    def process(self, rank: int) -> Process:
        """This process, for others to find."""
        pid = os.getpid()
        return Process(rank=rank, host=socket.gethostname(), pid=pid, started=_stat(pid)[1],
                       descriptor=self._file.fileno())

    def dump(self) -> str:
        """Return the stacks of all threads."""
        known = self._file.seek(0, os.SEEK_END)
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        self._file.seek(known)
        return self._file.read().decode(errors="replace")

    def close(self) -> None:
        """Stop answering dump requests."""
        faulthandler.unregister(DUMP_SIGNAL)
        self._file.close()


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """Position of one rank when its job hangs: the first line of its file of stacks.

    Attributes:
        run: names the launch, to tell files of an earlier one apart.
        process: the rank's.
        point: number of phases that the rank has begun, the same on all ranks for the same phase; 0 if unknown.
        phase: the last of them.
        where: the main thread's innermost line in our code.
        waits: whether the main thread is in a collective.
        silent: why the rank did not report itself; None if it did.
    """

    run: str
    process: Process
    point: int = 0
    phase: str = ""
    where: str = ""
    waits: bool = False
    silent: str | None = None

    def to_text(self, stacks: str) -> str:
        """Content of the file: one line of JSON, then the stacks."""
        return json.dumps(asdict(self)) + "\n\n" + stacks

    @classmethod
    def read(cls, path: Path, run: str) -> RankReport | None:
        """Read a rank's report of this launch; None if there is none."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8").partition("\n")[0])
            report = cls(**{**fields, "process": Process(**fields["process"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return report if report.run == run else None


def main_thread_position() -> tuple[str, bool]:
    """Position of the main thread, in our code if possible, and whether it waits for other ranks."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    if not frames:
        return "", False
    waits = any(part in frame.f_code.co_filename for frame in frames[:4] for part in _WAITS_IN)
    ours = next((frame for frame in frames if _OURS in frame.f_code.co_filename), frames[0])
    return f"{Path(ours.f_code.co_filename).name}:{ours.f_lineno} in {ours.f_code.co_name}", waits


def summary(reports: dict[int, RankReport], world_size: int, limit: int = 8) -> str:
    """Name the ranks that keep the others waiting, in one line.

    Args:
        reports: by rank.
        world_size: ranks of the job.
        limit: number of ranks to name.
    """
    spoken = [report for report in reports.values() if report.silent is None]
    last = max((report.point for report in spoken), default=0)
    named = [f"rank {rank} did not report" for rank in range(world_size) if rank not in reports]
    for rank, report in sorted(reports.items()):
        who = f"rank {rank} (process {report.process.pid} on {report.process.host})"
        if report.silent is not None:
            named.append(f"{who} {report.silent}")
        elif report.point < last:
            named.append(f"{who} is still in {report.phase}, at {report.where}")
    if not named and any(report.waits for report in spoken):
        named = [f"rank {report.process.rank} (process {report.process.pid} on {report.process.host}) is busy at "
                 f"{report.where}" for report in spoken if not report.waits]
    more = f"; and {len(named) - limit} more" if len(named) > limit else ""
    waiting = sorted({report.where for report in spoken if report.point == last})
    rest = f"the others are at {', '.join(waiting[:3])}" if named else f"all ranks are at {', '.join(waiting[:3])}"
    return "; ".join([*named[:limit], rest]) + more


def _stat(pid: int) -> tuple[str, str]:
    """State letter and start time of a process of this host; empty if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "", ""
