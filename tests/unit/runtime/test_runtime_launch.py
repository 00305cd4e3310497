"""Launcher environments as torchrun, msrun and Slurm leave them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.runtime.launch import LaunchEnvironment, detect_launch, first_host

TORCHRUN = {
    "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "node0", "MASTER_PORT": "29500",
}  # fmt: skip
MSRUN = {
    "MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "16", "MS_SCHED_HOST": "10.0.0.1", "MS_SCHED_PORT": "8118",
    "MS_NODE_ID": "9", "RANK_ID": "9", "RANK_SIZE": "16", "DEVICE_ID": "1",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "7", "SLURM_STEP_NUM_TASKS": "7", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[003,007]", "SLURM_JOB_NODELIST": "gpu[001-009]",
}  # fmt: skip


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def test_no_launcher_is_one_process() -> None:
    assert detect_launch({"PATH": "/bin", "MASTER_ADDR": "left-over"}) == LaunchEnvironment()
    assert LaunchEnvironment().world_size == 1


def test_torchrun() -> None:
    assert detect_launch(TORCHRUN) == LaunchEnvironment(
        rank=9, world_size=16, local_rank=1, local_world_size=8, master_addr="node0", master_port=29500,
        launcher="torchrun",
    )  # fmt: skip


def test_msrun_worker() -> None:
    assert detect_launch(MSRUN) == LaunchEnvironment(
        rank=9, world_size=16, local_rank=1, local_world_size=None, master_addr="10.0.0.1", master_port=8119,
        launcher="msrun",
    )  # fmt: skip


def test_msrun_that_also_exports_rank_is_not_torchrun() -> None:
    # Newer msrun versions export RANK counted within the host; RANK_ID is the global one.
    assert detect_launch({**MSRUN, "RANK": "1", "LOCAL_RANK": "1"}) == detect_launch(MSRUN)
    assert detect_launch({"MS_ROLE": "MS_SCHED", "RANK": "0", "RANK_ID": "0"}).is_scheduler


def test_msrun_scheduler_needs_nothing_else() -> None:
    launch = detect_launch({"MS_ROLE": "MS_SCHED", "RANK_ID": "0", "MS_WORKER_NUM": "2"})
    assert launch.is_scheduler and launch.launcher == "msrun"
    assert not detect_launch(MSRUN).is_scheduler


def test_msrun_worker_without_node_id_is_refused() -> None:
    with pytest.raises(ConfigError, match="MS_NODE_ID.*--node_rank"):
        detect_launch({**without(MSRUN, "MS_NODE_ID"), "RANK_ID": "0"})


def test_slurm() -> None:
    launch = detect_launch(SLURM)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.local_world_size) == (5, 7, 1, 3)
    assert (launch.master_addr, launch.launcher) == ("gpu003", "slurm")


def test_slurm_ports_agree_within_a_step_and_differ_between_steps() -> None:
    ports = [detect_launch({**SLURM, "SLURM_STEP_ID": step}).master_port for step in ("0", "0", "1")]
    assert ports[0] == ports[1] != ports[2]
    for job in ("1", "4294967295"):
        port = detect_launch({**SLURM, "SLURM_JOB_ID": job}).master_port
        assert port is not None and 10000 <= port < 32768


def test_slurm_honours_a_given_master() -> None:
    launch = detect_launch({**SLURM, "MASTER_ADDR": "ib0-gpu003", "MASTER_PORT": "1234", "WORLD_SIZE": "7"})
    assert (launch.master_addr, launch.master_port, launch.launcher) == ("ib0-gpu003", 1234, "slurm")


# What enroot's hook for PyTorch, and many wrappers, add to a task: no LOCAL_WORLD_SIZE.
HOOK = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "7", "MASTER_ADDR": "gpu003", "MASTER_PORT": "61711"}


def test_slurm_with_torchruns_names_on_top() -> None:
    launch = detect_launch({**SLURM, **HOOK})
    assert launch == dataclasses.replace(detect_launch(SLURM), master_port=61711)
    assert detect_launch({**SLURM, "RANK": "5"}) == detect_launch({**SLURM, "LOCAL_RANK": "1"}) == detect_launch(SLURM)


@pytest.mark.parametrize("shell", [{}, {"SLURM_PTY_PORT": "40000"}])
def test_slurms_only_task_with_torchruns_names_is_one_process(shell: dict[str, str]) -> None:
    alone = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    hook = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    assert detect_launch({**SLURM, **HOOK, **shell, **alone, **hook}) == LaunchEnvironment()


@pytest.mark.parametrize("name, slurm", [
    ("RANK", "SLURM_PROCID"), ("LOCAL_RANK", "SLURM_LOCALID"), ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"),
])
def test_torchruns_names_that_contradict_slurm_are_refused(name: str, slurm: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is '3', but srun started this process with {slurm}=.*unset RANK"):
        detect_launch({**SLURM, **HOOK, name: "3"})


@pytest.mark.parametrize("change", [
    {"SLURM_STEP_ID": "4294967291"}, {"SLURM_PTY_PORT": "40000"}, {"TORCHELASTIC_RUN_ID": "x"},
])
def test_half_a_torchrun_outside_slurms_tasks_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="^LOCAL_WORLD_SIZE is not set"):
        detect_launch({**SLURM, **HOOK, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_ID": "4294967291"},  # the batch script itself
        {"SLURM_STEP_ID": "4294967290"},  # an interactive allocation's shell
        {"SLURM_PTY_PORT": "40000"},  # srun --pty bash
    ],
)
def test_slurm_shells_are_one_process(change: dict[str, str]) -> None:
    assert detect_launch({**SLURM, **change}) == LaunchEnvironment()
    assert detect_launch(without(SLURM, "SLURM_STEP_ID")) == LaunchEnvironment()


def test_precedence() -> None:
    assert detect_launch({**SLURM, **MSRUN, **TORCHRUN}).launcher == "torchrun"
    assert detect_launch({**SLURM, **MSRUN}).launcher == "msrun"


@pytest.mark.parametrize("missing", sorted(TORCHRUN))
def test_half_a_torchrun_names_what_is_missing(missing: str) -> None:
    with pytest.raises(ConfigError, match=f"^{missing} is not set"):
        detect_launch({**without(TORCHRUN, missing), "TORCHELASTIC_RUN_ID": "none"})
    with pytest.raises(ConfigError, match=f"^{missing} is not set"):
        detect_launch(without(TORCHRUN, missing))


@pytest.mark.parametrize("missing", sorted(set(MSRUN) - {"MS_NODE_ID", "RANK_SIZE"}))
def test_half_an_msrun_names_what_is_missing(missing: str) -> None:
    with pytest.raises(ConfigError, match=f"^{missing} is not set"):
        detect_launch(without(MSRUN, missing))


def test_ascends_rank_table_variables_are_no_msrun() -> None:
    assert detect_launch({"RANK_ID": "0", "RANK_SIZE": "1", "DEVICE_ID": "3"}) == LaunchEnvironment()
    assert detect_launch({**SLURM, "MS_SCHED_PORT": "8118"}).launcher == "slurm"


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"])
def test_half_a_slurm_names_what_is_missing(missing: str) -> None:
    with pytest.raises(ConfigError, match=missing.replace("JOB_ID", "JOB") + ".* is not set"):
        detect_launch(without(SLURM, missing))


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({**TORCHRUN, "RANK": "first"}, "RANK is 'first'"),
        ({**TORCHRUN, "RANK": "16"}, "rank 16 of 16"),
        ({**TORCHRUN, "LOCAL_RANK": "8"}, "local rank 8 of 8"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "32"}, "more processes than the job"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "world size 0"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "port 70000"),
        ({**MSRUN, "MS_SCHED_PORT": "65535"}, r"port 65536.*MS_SCHED_PORT \+ 1"),
        ({**MSRUN, "MS_ROLE": "MS_PSERVER"}, "MS_ROLE is 'MS_PSERVER'"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "four"}, "SLURM_STEP_TASKS_PER_NODE is 'four'"),
        ({**SLURM, "SLURM_STEP_NODELIST": "gpu[1-"}, r"node list is 'gpu\[1-'"),
        (without(SLURM, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), "MASTER_ADDR"),
    ],
)
def test_wrong_values_are_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        detect_launch(environ)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu-[003-005,9],cpu1", "gpu-003"),
        ("gpu[7,3-5].cluster.org", "gpu7.cluster.org"),
        ("rack[2-3]n[01-16]", "rack2n01"),
    ],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_launch_does_not_import_torch() -> None:
    code = "import megatron_flashi2v.runtime.launch, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
