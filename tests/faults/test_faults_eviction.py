"""One node of three is evicted: the run saves, every node leaves with the chosen code, and the same command goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from helpers.layouts import metrics
from helpers.processes import launched
from helpers.synthetic_data import write_synthetic
from helpers.train_command import FLAGS, LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH

from megatron_flashi2v.checkpoint.folders import find_checkpoint

NODES, UNFINISHED, GRACE_S = 3, 77, 60.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_nodes(folder: Path, flags: list[str], evicted: int | None) -> list[int]:
    """Exit codes of three nodes' launchers, one of which gets SIGTERM after three iterations."""
    port, save = free_port(), folder / "run"
    words = ["megatron_flashi2v", "torchrun", "--nnodes", str(NODES), "--nproc-per-node", "1", "--rdzv-backend", "c10d",
             "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "run"]
    with contextlib.ExitStack() as stack:
        nodes = []
        for number in range(NODES):
            home = folder / f"node{number}-{port}"
            home.mkdir()
            nodes.append(stack.enter_context(launched(1, flags, home, launcher=words)))
            if number == 0:  # it serves the rendezvous, as the first pod of a job does
                wait_for_listener(port)
        if evicted is not None:
            nodes[evicted].wait_for_rows(save, 3)
            os.kill(nodes[evicted].process.pid, signal.SIGTERM)
        codes = [node.wait(GRACE_S if evicted is not None else 300) for node in nodes]
        told = [error for node in nodes for error in node.errors()]
        traces = [node.log for node in nodes if "Traceback" in node.log.read_text()]
    assert not told and not traces, (told, traces)
    return codes


def wait_for_listener(port: int) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise AssertionError("the first node's launcher does not listen")


@pytest.mark.long
@pytest.mark.parametrize("evicted", [0, 2], ids=["the node of the rendezvous", "another node"])
def test_a_node_is_evicted(tmp_path: Path, evicted: int) -> None:
    data = write_synthetic(tmp_path / "set", 6, LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, seed=3)
    save = tmp_path / "run"
    values = {**FLAGS, "data-path": data, "save": save, "train-iters": 100_000, "global-batch-size": 3,
              "micro-batch-size": 1, "exit-code-when-unfinished": UNFINISHED, "lr-decay-iters": 10}
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    assert run_nodes(tmp_path, flags, evicted) == [UNFINISHED] * NODES
    done = len(metrics(save))
    assert find_checkpoint(save) == save / f"iter_{done:07d}"
    # The job's next pods, with the same command; here the run has an end.
    end = ["--train-iters", str(done + 2), "--override-opt-param-scheduler"]
    assert run_nodes(tmp_path, [*flags, *end], None) == [0] * NODES
    assert [row["iteration"] for row in metrics(save)] == list(range(1, done + 3))
