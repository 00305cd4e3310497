"""The hang watch: when it gives up, what it writes, and whom it names."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_flashi2v.parallel.agreement import gather_json
from megatron_flashi2v.runtime import hang_watch
from megatron_flashi2v.runtime.device import CpuDevice
from megatron_flashi2v.runtime.distributed import init_distributed, shutdown
from megatron_flashi2v.runtime.hang_watch import HangWatch
from megatron_flashi2v.runtime.launch import LaunchEnvironment
from megatron_flashi2v.runtime.stacks import OwnStacks, Process, RankReport, main_thread_position, summary

LAUNCH = LaunchEnvironment()


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    init_distributed(LAUNCH, CpuDevice())
    yield
    shutdown()


class Watched:
    """A watch that notes when it would end the process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, timeout_s: float) -> None:
        self.gave_up: list[str] = []
        self.offset = 0.0
        monkeypatch.setattr(HangWatch, "_give_up", lambda _, phase: self.gave_up.append(phase.name))
        monkeypatch.setattr(hang_watch, "time", self)
        self.watch = HangWatch(timeout_s, None, LAUNCH, gather_json)

    def monotonic(self) -> float:
        return time.monotonic() + self.offset


def test_it_gives_up_when_a_phase_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, 0.4)
    with watched.watch as watch:
        for number in range(8):
            watch.enter(f"iteration {number}")
            time.sleep(0.2)
        assert not watched.gave_up
        time.sleep(0.8)
        assert watched.gave_up[0] == "iteration 7"


def test_slow_phases_and_what_follows_them_have_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, 0.3)
    with watched.watch as watch:
        time.sleep(0.8)  # the start
        watch.enter("iteration 1")
        time.sleep(0.8)
        assert not watched.gave_up
        watch.enter("iteration 2")
        time.sleep(0.8)
        assert watched.gave_up[0] == "iteration 2"


def test_time_in_which_the_process_did_not_run_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, 1.0)
    with watched.watch as watch:
        watch.enter("iteration 1")
        watch.enter("iteration 2")
        time.sleep(0.2)
        watched.offset += 100
        time.sleep(0.3)
        assert not watched.gave_up
        time.sleep(1.5)
        assert watched.gave_up


def test_nothing_is_watched_without_a_timeout() -> None:
    before = threading.active_count()
    with HangWatch(0.0, None, LAUNCH, gather_json) as watch:
        watch.enter("iteration 1")
        assert threading.active_count() == before


ALONE = """
import sys, time
from pathlib import Path
from megatron_flashi2v.parallel.agreement import gather_json
from megatron_flashi2v.runtime.device import CpuDevice
from megatron_flashi2v.runtime.distributed import init_distributed
from megatron_flashi2v.runtime.hang_watch import HangWatch
from megatron_flashi2v.runtime.launch import LaunchEnvironment
from megatron_flashi2v.runtime.logging import setup_logging

setup_logging()
launch = LaunchEnvironment()
init_distributed(launch, CpuDevice())
save = None if sys.argv[1] == "-" else Path(sys.argv[1])
with HangWatch(1.0, save, launch, gather_json) as watch:
    watch.enter("iteration 1")
    watch.enter("iteration 2")
    print(time.monotonic(), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("where", ["save", "no save", "refused"])
def test_it_ends_the_process_whatever_else_fails(tmp_path: Path, where: str) -> None:
    save = tmp_path / "save"
    if where == "refused":
        save.touch()
    done = subprocess.run(
        [sys.executable, "-c", ALONE, "-" if where == "no save" else str(save)], capture_output=True, text=True,
        timeout=60, check=False, env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 124
    assert time.monotonic() - float(done.stdout) < 10
    assert "no progress in iteration 2 for 1 s" in done.stderr
    if where == "refused":
        assert "the stacks cannot be written" in done.stderr and "<module>" in done.stderr
        return
    (path,) = tmp_path.rglob("rank_00000.txt")
    assert f"all stacks are in {path.parent}" in done.stderr and "<module>" in path.read_text()


PAIR = ALONE.replace("launch = LaunchEnvironment()", """
import os
from megatron_flashi2v.runtime.launch import detect_launch
launch = detect_launch(os.environ)
""")


def test_a_stopped_process_is_ended_also_where_no_launcher_does(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost",
             "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PAIR, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **slurm, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            assert process.stdout is not None and process.stdout.readline()
        ranks[0].send_signal(signal.SIGSTOP)  # rank 0 also holds the store
        _, error = ranks[1].communicate(timeout=60)
        assert ranks[1].returncode == 124 and ranks[0].wait(10) == -signal.SIGKILL
    finally:
        for process in ranks:
            process.kill()
    assert f"rank 0 (process {ranks[0].pid} on " in error and "did not answer, and is stopped" in error
    assert "time.sleep(60)" not in error and "<module>" in (tmp_path / "stacks" / "rank_00000.txt").read_text()


def report(rank: int, **changed: object) -> RankReport:
    process = Process(rank=rank, host="node", pid=100 + rank, started="1", descriptor=3)
    base = RankReport(run="r", process=process, point=7, phase="iteration 3", where="step.py:1 in f", waits=True)
    return dataclasses.replace(base, **changed)


@pytest.mark.parametrize(("changed", "words", "silent_about"), [
    ({1: {"silent": "did not answer, and is stopped", "point": 0}}, ["rank 1 (process 101 on node) did not answer"],
     ["rank 0 (", "rank 2 ("]),
    ({0: {"point": 6, "phase": "saving iteration 2", "where": "storage.py:9 in w"}},
     ["rank 0 (process 100 on node) is still in saving iteration 2, at storage.py:9 in w"], ["rank 1 (", "rank 2 ("]),
    ({2: {"waits": False, "where": "batch.py:5 in load"}},
     ["rank 2 (process 102 on node) is busy at batch.py:5 in load", "the others are at"], ["rank 0 (", "rank 1 ("]),
    ({}, ["all ranks are at step.py:1 in f"], ["rank 0 (", "rank 1 (", "rank 2 ("]),
    ({1: None}, ["rank 1 did not report"], ["rank 0 (", "rank 2 ("]),
])
def test_the_summary_names_the_ranks_that_are_late(changed: dict, words: list[str], silent_about: list[str]) -> None:
    kinds = {rank: changed.get(rank, {}) for rank in range(3)}
    reports = {rank: report(rank, **kind) for rank, kind in kinds.items() if kind is not None}
    text = summary(reports, 3)
    assert all(part in text for part in words) and not any(part in text for part in silent_about), text
    assert "\n" not in text


def test_many_late_ranks_are_counted() -> None:
    text = summary({0: report(0)}, 100)
    assert "rank 8 did not report" in text and "rank 9 did" not in text and "and 91 more" in text


def test_reports_of_another_launch_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "rank_00000.txt"
    path.write_text(report(0).to_text("stacks\n"))
    assert RankReport.read(path, "r") == report(0) and RankReport.read(path, "another") is None
    for text in ("", "{", "[]", json.dumps({"run": "r"}), "\ufffd"):
        path.write_text(text)
        assert RankReport.read(path, "r") is None
    assert RankReport.read(tmp_path / "absent", "r") is None


def test_a_process_that_has_ended_is_not_signalled() -> None:
    child = subprocess.Popen(["sleep", "60"])
    started = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
    process = Process(rank=1, host="node", pid=child.pid, started=started, descriptor=0)
    assert process.is_alive and process.state in ("runs", "waits for a device or a file system")
    another = dataclasses.replace(process, started="5")  # the number was used again
    assert not another.is_alive and "has ended" in another.dump(0.1)
    another.kill()
    assert child.poll() is None
    process.kill()
    assert child.wait(10) != 0 and not process.is_alive and process.state == "has ended"


def test_own_stacks_are_the_newest() -> None:
    stacks = OwnStacks()
    try:
        assert "test_own_stacks_are_the_newest" in stacks.dump()
        assert stacks.dump().count("test_own_stacks_are_the_newest") == 1
        asked = stacks.process(3).dump(2.0)
        assert asked.count("test_own_stacks_are_the_newest") == 1
    finally:
        stacks.close()


def test_the_position_is_the_innermost_line_of_ours() -> None:
    where, waits = main_thread_position()
    assert "in main_thread_position" in where and where.startswith("stacks.py:") and not waits
