"""Starts and ends torch.distributed."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
from datetime import timedelta

import torch

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.hccl import WORLD
from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.runtime.host_collectives import stage_through_host
from megatron_flashi2v.runtime.launch import LaunchEnvironment


def init_distributed(launch: LaunchEnvironment, device: Device, timeout_minutes: float = 10.0) -> None:
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
    timeout, options = timedelta(minutes=timeout_minutes), device.group_options(WORLD)
    if device.backend == "gloo" and device.name != "cpu":
        stage_through_host(device.name)
    if launch.launcher == "none":
        torch.distributed.init_process_group(
            device.backend, store=torch.distributed.HashStore(), rank=0, world_size=1, timeout=timeout,
            pg_options=options,
        )  # fmt: skip
        return
    address = launch.master_addr or ""
    host = f"[{address}]" if ":" in address else address  # an IPv6 address inside a URL
    try:
        # tcp:// takes the ranks as arguments: msrun and Slurm set none of the variables that env:// reads.
        # Under torchrun it joins the agent's own store.
        torch.distributed.init_process_group(
            device.backend,
            init_method=f"tcp://{host}:{launch.master_port}",
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
            pg_options=options,
        )
    except torch.distributed.DistError as error:
        raise ConfigError(
            f"rank {launch.rank} of {launch.world_size} could not meet the others at "
            f"{address}:{launch.master_port} (from {launch.launcher}) within {timeout_minutes:g} minutes: "
            f"{error}; check that all processes were started, that the address is reachable and that the "
            "port is free (MASTER_ADDR, MASTER_PORT)"
        ) from error


def shutdown(*, failed: bool = False, exit_code: int = 1) -> None:
    """Leave the process group; does nothing where there is none.

    Args:
        failed: this rank stops because of an error, without waiting for others. With gloo and NCCL it drops its
            connections, so that the other ranks' collectives fail at once instead of running into the timeout. With
            HCCL it keeps the group, and the process will end without its other exit handlers; the launcher stops the
            others (srun if started with ``--kill-on-bad-exit=1``).
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
    elif not failed or alone or backend == "gloo":
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
