"""Ranks that hang: all stacks are written and the job ends, within twice the time that is allowed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from helpers.processes import launched
from helpers.synthetic_data import write_synthetic
from helpers.train_command import FLAGS, LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH

TIMEOUT_S = 8.0

# Rank 1 computes for ever, in Python, in the fourth iteration.
BUSY = """
import os
from megatron_flashi2v import Observer

class Busy(Observer):
    def before_iteration(self, state):
        if os.environ["RANK"] == "1" and state.iteration == 3:
            self.spin()

    def spin(self):
        while True:
            pass

OBSERVERS = [Busy()]
"""

# Saving takes longer than the timeout, on rank 0 even after the others have gone on.
SLOW_SAVE = """
import os, time
from megatron_flashi2v import Observer

class SlowSave(Observer):
    def between_iterations(self, state):
        if os.environ["RANK"] == "0" and state.iteration and state.iteration % 3 == 0:
            time.sleep(12)

OBSERVERS = [SlowSave()]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("data") / "set", 6, LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, seed=3)


def flags(data: Path, save: Path, **changed: object) -> list[str]:
    values = {**FLAGS, "data-path": data, "save": save, "hang-timeout-s": TIMEOUT_S, "train-iters": 100_000,
              "micro-batch-size": 1, "global-batch-size": 6, **changed}
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def wait_for_summary(save: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not (save / "stacks" / "summary.txt").exists():
        assert time.monotonic() < end, "the hang was not noticed in time"
        time.sleep(0.05)


def stacks(save: Path) -> list[tuple[dict, str]]:
    """Header and stacks of every rank."""
    texts = [path.read_text().partition("\n") for path in sorted((save / "stacks").glob("rank_*.txt"))]
    return [(json.loads(header), rest) for header, _, rest in texts]


def test_a_stopped_rank(data: Path, tmp_path: Path) -> None:
    world, save = 3, tmp_path / "run"
    with launched(world, flags(data, save), tmp_path) as launch:
        launch.wait_for_rows(save, 3)
        victim = random.Random(int.from_bytes(os.urandom(4), "little")).randrange(world)
        time.sleep(random.uniform(0, 0.5))
        number = launch.rank(victim)
        os.kill(number, signal.SIGSTOP)
        wait_for_summary(save, 2 * TIMEOUT_S)
        assert launch.wait(60) != 0
        (error,) = launch.errors()
    assert f"rank {victim} (process {number} on " in error and "did not answer, and is stopped" in error
    assert "--hang-timeout-s 8" in error and str(save / "stacks") in error
    found = stacks(save)
    assert [header["process"]["rank"] for header, _ in found] == list(range(world))
    for rank, (header, text) in enumerate(found):
        assert "in run_iteration" in text, text
        assert (header["silent"] is not None) == (rank == victim)
        assert ("iteration" in header["phase"]) != (rank == victim)


def test_a_busy_rank(data: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    # Whole batches of one microbatch: the third iteration is the one that does not end.
    # And a busy rank, whose threads wait for Python's lock, has a quarter of the timeout for its answer.
    values = flags(data, save, **{"global-batch-size": 2, "hang-timeout-s": 12.0})
    with launched(2, values, tmp_path, BUSY) as launch:
        launch.wait_for_rows(save, 3)
        wait_for_summary(save, 4 * 2 * 12.0)
        assert launch.wait(60) != 0
        (error,) = launch.errors()
    assert "no progress in iteration 4 for 12 s" in error
    assert "rank 1 (process " in error and "is busy at " in error and "rank 0 (process " not in error
    (waiting, _), (busy, text) = stacks(save)
    assert waiting["waits"] and not busy["waits"] and busy["silent"] is None and "in spin" in text


@pytest.mark.long
def test_a_slow_save_and_a_suspended_job_are_no_hang(data: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    values = flags(data, save, **{"train-iters": 6, "save-interval": 3})
    with launched(2, values, tmp_path, SLOW_SAVE) as launch:
        launch.wait_for_rows(save, 2)
        ranks = [launch.rank(number) for number in range(2)]
        for number in ranks:
            os.kill(number, signal.SIGSTOP)
        time.sleep(1.5 * TIMEOUT_S)
        for number in ranks:
            os.kill(number, signal.SIGCONT)
        assert launch.wait(240) == 0, launch.log.read_text()[-4000:]
    assert not (save / "stacks").exists() and (save / "iter_0000006").exists()
