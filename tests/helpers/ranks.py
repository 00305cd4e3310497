"""Ranks of a test: processes that are forked from one that has imported what they need, so that they start at once.

They differ from a launcher's in what they inherit: one seed of Python's hashes for all. What a run must not depend on
that for is tested in processes of their own (``tests/distributed/test_command_line.py``).
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

from megatron_flashi2v.sampling import pipeline
from megatron_flashi2v.training import assembly

LIBRARIES = [
    "diffusers.models.autoencoders.autoencoder_kl_wan", "transformers.models.umt5.modeling_umt5",
    "transformers.models.auto.tokenization_auto",
]
"""What sampling imports when it loads its models: seconds for each rank."""
PRELOADED = [*(module.__name__ for module in (assembly, pipeline)), *LIBRARIES]
"""Nothing of the tests: the process that forks is a plain Python, which does not find them."""


def run_ranks(
    function: Callable[..., None], world: int, folder: Path, *arguments: Any, timeout: float = 300.0,
    kill_when: Callable[[], bool] | None = None,
) -> None:  # fmt: skip
    """Call ``function(rank, *arguments)`` in ``world`` processes, with the environment that torchrun would give them.

    Args:
        function: of a module; what it raises fails the test.
        world: processes.
        folder: for what they print, see :func:`log_of`.
        *arguments: picklable.
        timeout: seconds until they are killed.
        kill_when: asked again and again; once it is true, all ranks are killed, and the call returns.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    # As torchrun's agent does, the parent holds the store: no rank can leave with it, and no port is guessed.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    context = torch.multiprocessing.start_processes(
        _run, (function, environment, folder, arguments), world, join=False, start_method="forkserver"
    )
    end = time.monotonic() + timeout
    try:
        while not context.join(0.01 if kill_when else max(0.0, end - time.monotonic()), grace_period=1.0):
            if kill_when is not None and kill_when():
                break
            assert time.monotonic() < end, f"{world} ranks were not done after {timeout:g} s"
    except BaseException:  # a time limit of the test's, too
        for rank in range(world):
            log = log_of(folder, world, rank)
            if log.exists():
                sys.stderr.write(f"{log.name}: {log.read_text(errors='replace')[-4000:]}\n")
        raise
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def log_of(folder: Path, world: int, rank: int) -> Path:
    """What a rank printed, in this launch and those before it."""
    return folder / f"world-{world}-rank-{rank}.log"


def _run(
    rank: int, function: Callable[..., None], environment: dict[str, str], folder: Path, arguments: tuple[Any, ...]
) -> None:
    with open(log_of(folder, int(environment["WORLD_SIZE"]), rank), "ab", buffering=0) as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    threading.Thread(target=_end_with_the_test, daemon=True).start()
    np.random.seed()  # else all ranks would have inherited one state
    torch.set_num_threads(1)
    try:
        function(rank, *arguments)
    except BaseException as error:
        # Only the first rank to end is told of by what started it, and neither an interrupt nor an exit with 0.
        traceback.print_exc()
        raise RuntimeError(f"rank {rank} failed") from error


def _end_with_the_test() -> None:
    """The process that forked this one outlives a test run that is killed; ranks do not."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
