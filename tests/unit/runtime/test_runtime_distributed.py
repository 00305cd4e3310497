"""Meeting, and parting without leaving anyone waiting."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks

from megatron_flashi2v.config.errors import ConfigError, DataError, PeerError
from megatron_flashi2v.runtime import distributed
from megatron_flashi2v.runtime.device import CpuDevice
from megatron_flashi2v.runtime.distributed import init_distributed, process_group, shutdown
from megatron_flashi2v.runtime.launch import LaunchEnvironment

# The ranks meet and add; then rank 1 fails while rank 0 waits for it in the next collective.
WORKER = """
import os
import torch
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.runtime.distributed import init_distributed, shutdown
from megatron_flashi2v.runtime.launch import detect_launch

launch = detect_launch(os.environ)
init_distributed(launch, resolve_device("cpu", launch.local_rank), timeout_minutes=5)
try:
    total = torch.tensor([launch.rank + 1.0])
    torch.distributed.all_reduce(total)
    assert total.item() == 3
    if launch.rank == 1:
        raise ValueError("rank 1 fails")
    torch.distributed.all_reduce(total)
except BaseException:
    shutdown(failed=True)
    raise
"""


LOST = "[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:34470."
# https://github.com/vllm-project/vllm-ascend/issues/486
LOST_HCCL = """InnerRunOpApi:OpParamMaker.cpp:281 OPS function error: HcclAllreduce, error code is 6
[ERROR] (PID:1, Device:1, RankID:1) ERR01100 OPS call acl api failed.
EI0006: [PID: 1] Getting socket times out. Reason: Remote Rank did not send the data in time."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_failing_rank_leaves_nobody_waiting() -> None:
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env={
                **os.environ,
                "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "MASTER_PORT": port,
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    began = time.monotonic()
    errors = [rank.communicate(timeout=200)[1] for rank in ranks]
    # Both end at once, although the timeout is five minutes, and each says its own reason.
    assert all(rank.returncode not in (0, None) for rank in ranks), errors
    assert time.monotonic() - began < 150
    assert "rank 1 fails" in errors[1] and "rank 1 fails" not in errors[0]


def test_one_process_needs_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    init_distributed(LaunchEnvironment(), CpuDevice())
    try:
        value = torch.ones(1)
        torch.distributed.all_reduce(value)
        assert value.item() == 1 and torch.distributed.get_world_size() == 1
        group = torch.distributed.new_group([0])
        torch.distributed.barrier(group)
    finally:
        shutdown()
    shutdown()  # nothing left: does nothing


def meet_and_part(rank: int, folder: Path) -> None:
    """Many times; just before, each rank drops tensors that gloo's threads may still hold."""
    for index in range(100):
        store = dist.FileStore(str(folder / f"store-{index}"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        dist.all_gather_object([None, None], rank)
        works = [dist.all_reduce(torch.ones(4), async_op=True) for _ in range(3)]
        for work in works:
            work.wait()
        del work, works
        shutdown()


def test_parting_never_waits_for_a_thread_that_waits_for_us(tmp_path: Path) -> None:
    """torch 2.7's destroy_process_group does in most of such runs."""
    run_ranks(meet_and_part, 2, tmp_path, tmp_path, timeout=120)


@pytest.mark.parametrize("launch", [
    LaunchEnvironment(),
    LaunchEnvironment(world_size=2, local_world_size=2, master_addr="a", master_port=1, launcher="torchrun"),
])
def test_the_group_of_all_ranks_has_the_devices_options(
    launch: LaunchEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, object] = {}
    monkeypatch.setattr(distributed, "_store", lambda *_: dist.HashStore())
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **settings: given.update(settings))
    device = CpuDevice()
    monkeypatch.setattr(device, "group_options", lambda description: f"options of {description}")
    init_distributed(launch, device)
    assert given["pg_options"] == "options of default_pg"


def test_the_store_that_rank_0_serves_outlives_the_group() -> None:
    """Else a rank that starts again soon could meet the others at a server that is about to end."""
    port = free_port()
    launch = LaunchEnvironment(master_addr="127.0.0.1", master_port=port, launcher="slurm")
    for _ in range(2):
        with process_group(launch, CpuDevice()):
            assert torch.distributed.get_world_size() == 1
        socket.create_connection(("127.0.0.1", port)).close()


def test_ranks_that_never_meet_say_so() -> None:
    launch = LaunchEnvironment(
        rank=1, world_size=2, local_rank=1, local_world_size=2, master_addr="127.0.0.1",
        master_port=free_port(), launcher="torchrun",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"rank 1 of 2 could not meet .* 127.0.0.1:\d+ \(from torchrun\)"):
        init_distributed(launch, CpuDevice(), timeout_minutes=0.02)
    with pytest.raises(ConfigError, match="timeout is 0 minutes"):
        init_distributed(launch, CpuDevice(), timeout_minutes=0)


@pytest.mark.parametrize("world_size, error, raised", [
    (2, RuntimeError(LOST), PeerError),
    (2, RuntimeError(LOST_HCCL), PeerError),
    (2, RuntimeError("EI0003: Invalid_Argument_Collective_Communication_Operator"), RuntimeError),
    (1, RuntimeError(LOST), RuntimeError),
    (2, RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError),
    (2, DataError("shard"), DataError),
    (2, KeyboardInterrupt(), KeyboardInterrupt),
])
def test_a_lost_connection_points_to_the_process_that_failed(
    world_size: int, error: BaseException, raised: type[BaseException]
) -> None:
    launch = LaunchEnvironment(rank=world_size - 1, world_size=world_size, local_rank=world_size - 1,
                               local_world_size=world_size)
    with pytest.raises(BaseException) as caught, process_group(launch, CpuDevice(), start=lambda *_: None):
        raise error
    assert type(caught.value) is raised
    if raised is PeerError:
        assert "rank 1 lost the other processes" in str(caught.value)
        assert str(error).splitlines()[0] in str(caught.value)
