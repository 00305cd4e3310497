"""Starts and ends torch.distributed."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch

from megatron_flashi2v.config.errors import ConfigError, PeerError, exit_code_of
from megatron_flashi2v.config.hccl import WORLD
from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.runtime.host_collectives import stage_through_host
from megatron_flashi2v.runtime.launch import LaunchEnvironment

DEFAULT_TIMEOUT_MINUTES = 10.0


def init_distributed(
    launch: LaunchEnvironment, device: Device, timeout_minutes: float = DEFAULT_TIMEOUT_MINUTES
) -> None:
    """Create the default process group; a single process without a launcher needs no port and no variables.

    Args:
        launch: this process's place, from :func:`~megatron_flashi2v.runtime.launch.detect_launch`.
        device: decides the backend (nccl, hccl or gloo). gloo copies an accelerator's tensors to host memory.
        timeout_minutes: limit for the ranks to meet, and for every collective.

    Raises:
        ConfigError: the ranks did not meet, or the timeout is not positive.
    """
    if timeout_minutes <= 0:
        raise ConfigError(f"the distributed timeout is {timeout_minutes} minutes; it must be more than 0")
    timeout = timedelta(minutes=timeout_minutes)
    if device.backend == "gloo" and device.name != "cpu":
        stage_through_host(device.name)
    try:
        torch.distributed.init_process_group(
            device.backend, store=_meeting_point(launch, timeout), rank=launch.rank, world_size=launch.world_size,
            timeout=timeout, pg_options=device.group_options(WORLD),
        )  # fmt: skip
    except torch.distributed.DistError as error:
        raise ConfigError(
            f"rank {launch.rank} of {launch.world_size} could not meet the others at "
            f"{launch.master_addr}:{launch.master_port} (from {launch.launcher}) within {timeout_minutes:g} minutes: "
            f"{error}; check that all processes were started, that the address is reachable and that the "
            "port is free (MASTER_ADDR, MASTER_PORT)"
        ) from error


def init_without_peers(
    launch: LaunchEnvironment, device: Device, timeout_minutes: float = DEFAULT_TIMEOUT_MINUTES
) -> None:
    """Create the default process group of one rank whose peers do not exist, to plan by; arguments as for
    :func:`init_distributed`.

    torch's fake backend knows every rank's place in every group; its collectives return at once and move nothing.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend; no run needs it

    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=launch.rank, world_size=launch.world_size,
        timeout=timedelta(minutes=timeout_minutes),
    )  # fmt: skip


@contextlib.contextmanager
def process_group(
    launch: LaunchEnvironment,
    device: Device,
    timeout_minutes: float = DEFAULT_TIMEOUT_MINUTES,
    *,
    start: Callable[[LaunchEnvironment, Device, float], None] = init_distributed,
) -> Iterator[None]:
    """The default process group, left at the end: together, or at once if this process has failed.

    The same processes can start it again afterwards, unless one has failed with HCCL (see :func:`shutdown`).

    Args:
        launch: this process's place.
        device: decides the backend.
        timeout_minutes: how long the ranks wait for one another, when meeting and in every collective.
        start: what creates the group, such as :func:`init_without_peers`.

    Raises:
        ConfigError: the ranks did not meet.
        PeerError: a collective failed because another process has left.
    """
    start(launch, device, timeout_minutes)
    try:
        yield
        shutdown()
    except BaseException as error:
        if launch.world_size == 1 or not _is_lost_connection(error):
            shutdown(failed=True, exit_code=exit_code_of(error))
            raise
        shutdown(failed=True, exit_code=PeerError.exit_code)
        what = (str(error).splitlines() or [""])[0]
        raise PeerError(
            f"rank {launch.rank} lost the other processes ({what}); the one that failed first says why"
        ) from error


def _meeting_point(launch: LaunchEnvironment, timeout: timedelta) -> torch.distributed.Store:
    """A store for one start of the process group, empty of what an earlier start in these processes left behind."""
    if launch.launcher == "none":
        return torch.distributed.HashStore()
    address = launch.master_addr or ""
    host = f"[{address}]" if ":" in address else address  # an IPv6 address inside a URL
    # tcp:// takes the ranks as arguments: msrun and Slurm set none of the variables that env:// reads.
    # Under torchrun it joins the agent's own store.
    store = _store(f"tcp://{host}:{launch.master_port}", launch.rank, launch.world_size, timeout)
    # torch uses the same keys each time: a rank that starts again would find its peers' old addresses.
    starts = store.add(f"starts_of_rank_{launch.rank}", 1)
    return torch.distributed.PrefixStore(f"default_pg_{starts}", store)


@functools.cache
def _store(url: str, rank: int, world_size: int, timeout: timedelta) -> torch.distributed.Store:
    """The job's store, kept while the process lives.

    Without an agent rank 0 serves it. If that ended with the process group, a rank that starts again could still reach
    the old server and lose it.
    """
    store, _, _ = next(torch.distributed.rendezvous(url, rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    return store


def shutdown(*, failed: bool = False, exit_code: int = 1) -> None:
    """Leave the process group; does nothing where there is none.

    Args:
        failed: this rank stops because of an error, without waiting for others. With gloo and NCCL it drops its
            connections, so that the other ranks' collectives fail at once instead of running into the timeout (with
            gloo, once nothing holds the groups any longer, such as the error's traceback). With HCCL it keeps the
            group, and the process will end without its other exit handlers; the launcher stops the others (srun if
            started with ``--kill-on-bad-exit=1``).
        exit_code: of the failing process, with HCCL.
    """
    if not torch.distributed.is_initialized():
        return
    backend, alone = torch.distributed.get_backend(), torch.distributed.get_world_size() == 1
    if not failed and not alone:
        # Rank 0 may hold the store: it must not leave while others still finish.
        torch.distributed.barrier()
    if failed and backend == "nccl":
        # Destroying would wait for the collectives that are queued on the device.
        torch.distributed.distributed_c10d._abort_process_group()
    elif not failed or alone or backend in ("gloo", "fake"):
        backends = _host_backends()
        torch.distributed.destroy_process_group()
        del backends
    else:
        # torch's abort does not reach HCCL: ProcessGroupHCCL has one of its own, with an argument (v2.7.1).
        atexit.register(_leave, exit_code)


def _host_backends() -> list[torch._C._distributed_c10d.Backend]:
    """The gloo backends of all groups; holding them while the groups are destroyed avoids a deadlock.

    torch 2.7 destroys a group with Python's lock held, and with it a backend without another reference, which waits for
    its threads. One of these may still be releasing a tensor, and wait for the lock. torch destroys a backend on its
    own without the lock.
    """
    host = torch.device("cpu")
    return [
        group._get_backend(host)
        for group in torch.distributed.distributed_c10d._world.pg_map
        if host in group._device_types
    ]


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another process has left."""
    # gloo and HCCL raise plain RuntimeErrors. The texts of the one begin with its source file; those of the other hold
    # CANN's codes for a rank that did not take part in time, and for one that could not be connected to.
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and bool(re.search(r"gloo/transport|\bEI000[26]\b", str(error)))
    )


def _leave(exit_code: int) -> None:
    """End this process without the exit handlers that were registered before.

    torch_npu's handler waits for the device's queue, such as a collective with ranks that will never come, until
    HCCL_EXEC_TIMEOUT; meanwhile the launcher could not tell that this rank has failed. The error is printed by now.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or a pipe without a reader
            stream.flush()
    os._exit(exit_code)
