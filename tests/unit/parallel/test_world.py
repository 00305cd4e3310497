"""The way into a run and out of it: alone and among ranks, again and again, also after an exception."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed
from helpers.ranks import run_ranks
from megatron.core import parallel_state

from megatron_flashi2v.config.errors import PeerError
from megatron_flashi2v.config.train import ParallelArguments
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.world import single_process, world
from megatron_flashi2v.runtime.device import CpuDevice, resolve_device
from megatron_flashi2v.runtime.distributed import init_without_peers
from megatron_flashi2v.runtime.launch import LaunchEnvironment, detect_launch

TENSOR, PIPELINE = (
    ParallelArguments(tensor_model_parallel_size=2), ParallelArguments(pipeline_model_parallel_size=2)
)


class Recorder:
    """A watch that keeps what it saw."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bool, bool, bool]] = []

    def note(self, moment: str) -> None:
        """Whether there is a process group, a redirection, megatron-core's groups."""
        redirected = torch.cuda.current_device.__module__ != "torch.cuda"
        self.seen.append((
            moment, torch.distributed.is_initialized(), redirected, parallel_state.model_parallel_is_initialized()
        ))

    def __enter__(self) -> Recorder:
        self.note("enter")
        return self

    def __exit__(self, *error: object) -> None:
        self.note("exit")


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    place = torch.cuda.current_device
    yield
    assert torch.cuda.current_device is place
    assert not torch.distributed.is_initialized() and not parallel_state.model_parallel_is_initialized()


@pytest.mark.parametrize("fails", [False, True])
def test_the_order_of_the_way_in_and_out(fails: bool) -> None:
    watch = Recorder()
    try:
        with world(CpuDevice(), LaunchEnvironment(), ParallelArguments(), watch=watch):
            watch.note("inside")
            if fails:
                raise ValueError("planted")
    except ValueError:
        assert fails
    watch.note("after")
    assert watch.seen == [
        ("enter", True, False, False), ("inside", True, True, True), ("exit", True, False, False),
        ("after", False, False, False),
    ]


def test_one_process_enters_again_also_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "3")  # a launcher's variables are ignored
    for _ in range(2):
        with pytest.raises(RuntimeError, match="body"), single_process(resolve_device("cpu")) as groups:
            assert groups.tp.size() == groups.dp.size() == 1
            raise RuntimeError("body")
        assert not torch.distributed.is_initialized()
    with single_process(resolve_device("cpu")):
        assert torch.zeros(1, device="cuda").device.type == "cpu"


def test_groups_that_cannot_be_made_leave_nothing_behind() -> None:
    with pytest.raises(RuntimeError, match="world_size"), world(CpuDevice(), LaunchEnvironment(), TENSOR):
        pass


def test_a_rank_without_peers_enters_at_any_layout_also_after_an_exception() -> None:
    launch = LaunchEnvironment(rank=5, world_size=8, local_rank=5, local_world_size=8)
    with pytest.raises(ValueError), world(CpuDevice(), launch, TENSOR, start=init_without_peers):
        raise ValueError("planted")
    with world(CpuDevice(), launch, PIPELINE, start=init_without_peers) as groups:
        assert (groups.tp.size(), groups.pp.rank(), groups.dp.rank()) == (1, 1, 1)


def sum_over(group: torch.distributed.ProcessGroup) -> float:
    """Of the global ranks, each counted from 1."""
    value = torch.tensor([torch.distributed.get_rank() + 1.0])
    torch.distributed.all_reduce(value, group=group)
    return value.item()


def check(groups: Groups, layout: ParallelArguments) -> None:
    shared, alone = (groups.tp, groups.pp) if layout is TENSOR else (groups.pp, groups.tp)
    assert (sum_over(shared), sum_over(alone)) == (3.0, torch.distributed.get_rank() + 1.0)


def fail(launch: LaunchEnvironment) -> str:
    """Rank 1 fails while rank 0 waits for it; the error's name and words.

    Whoever holds the error holds the groups of the function that raised it, and with gloo the connections.
    """
    try:
        with world(CpuDevice(), launch, TENSOR, timeout_minutes=2) as groups:
            check(groups, TENSOR)
            if launch.rank == 1:
                raise ValueError("rank 1 fails")
            sum_over(groups.tp)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def enter_again(rank: int, port: int | None) -> None:
    """Two layouts, one in which rank 1 fails, and two again."""
    launch = detect_launch(os.environ)
    if port is not None:  # as under Slurm and msrun, rank 0 serves the store
        del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
        launch = dataclasses.replace(launch, master_port=port, launcher="slurm")
    for layout in (TENSOR, PIPELINE, None, PIPELINE, TENSOR):
        if layout is not None:
            with world(CpuDevice(), launch, layout, timeout_minutes=2) as groups:
                check(groups, layout)
            del groups
            continue
        began, error = time.monotonic(), fail(launch)
        assert time.monotonic() - began < 60
        assert error.startswith("ValueError" if rank else f"{PeerError.__name__}: rank 0 lost the other processes")


@pytest.mark.parametrize("served_by", ["agent", "rank 0"])
def test_ranks_enter_again_together_also_after_one_has_failed(served_by: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = None if served_by == "agent" else free.getsockname()[1]
    run_ranks(enter_again, 2, tmp_path, port)
