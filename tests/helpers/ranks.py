"""Ranks of a test: processes that are forked from one that has imported what they need, so that they start at once."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.multiprocessing.spawn import ProcessException

PRELOADED = ["megatron_flashi2v.training.trainer", "megatron_flashi2v.sampling.pipeline"]
"""Of the package alone: the process that forks is a plain Python, which does not find the tests."""


def run_ranks(
    function: Callable[..., None], world: int, folder: Path, *arguments: Any, timeout: float = 300.0
) -> None:
    """Call ``function(rank, *arguments)`` in ``world`` processes, with the environment that torchrun would give them.

    Args:
        function: of a module; what it raises fails the test with its traceback.
        world: processes.
        folder: for what they print, see :func:`log_of`.
        *arguments: picklable.
        timeout: seconds until they are killed.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    # As torchrun's agent does, the parent holds the store: no rank can leave with it, and no port is guessed.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = torch.multiprocessing.start_processes(
        _run, (function, world, store.port, folder, arguments), world, join=False, start_method="forkserver"
    )
    end = time.monotonic() + timeout
    try:
        while not context.join(max(0.0, end - time.monotonic()), grace_period=1.0):
            if time.monotonic() > end:
                raise AssertionError(f"{world} ranks were not done after {timeout:g} s\n{_printed(folder, world)}")
    except ProcessException as error:
        raise AssertionError(f"{error}\n{_printed(folder, world)}") from None
    finally:
        for process in context.processes:
            process.kill()


def _run(
    rank: int, function: Callable[..., None], world: int, port: int, folder: Path, arguments: tuple[Any, ...]
) -> None:
    with open(log_of(folder, world, rank), "ab", buffering=0) as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
    )
    torch.set_num_threads(1)
    function(rank, *arguments)


def log_of(folder: Path, world: int, rank: int) -> Path:
    """What a rank printed, in this launch and those before it."""
    return folder / f"world-{world}-rank-{rank}.log"


def _printed(folder: Path, world: int) -> str:
    logs = (log_of(folder, world, rank) for rank in range(world))
    return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-2000:]}" for log in logs if log.exists())
