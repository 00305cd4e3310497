"""This process's place in the job, from the environment variables of torchrun, msrun and Slurm.

Imports no torch, so that msrun's scheduler process, which runs the same script once more, can leave at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_flashi2v.config.errors import ConfigError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MSRUN_WORKER = ("MS_ROLE", "MS_WORKER_NUM", "MS_SCHED_HOST", "MS_SCHED_PORT", "RANK_ID", "DEVICE_ID")
# RANK_ID and DEVICE_ID alone are common on Ascend, without msrun.
_MSRUN_ALONE = ("MS_ROLE", "MS_WORKER_NUM", "MS_SCHED_HOST", "MS_SCHED_PORT")

# Slurm numbers its own steps (batch script, interactive shell, external processes) from the top of 32 bits.
_FIRST_SPECIAL_SLURM_STEP = 0xFFFFFFF0


@dataclass(frozen=True, kw_only=True)
class LaunchEnvironment:
    """One process's place in the job.

    Attributes:
        rank: 0 .. world_size - 1, over all hosts.
        world_size: processes of the job.
        local_rank: the process's number on its host, which is also the number of its accelerator.
        local_world_size: processes on this host; None if the launcher does not say (msrun).
        master_addr: host of rank 0; None for a single process.
        master_port: TCP port at which the ranks meet; None for a single process.
        launcher: "none", "torchrun", "msrun" or "slurm".
        is_scheduler: whether this is msrun's scheduler, which runs the script too; it has no work and must exit with 0.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int | None = 1
    master_addr: str | None = None
    master_port: int | None = None
    launcher: str = "none"
    is_scheduler: bool = False

    def __post_init__(self) -> None:
        if self.is_scheduler:
            return
        if self.world_size < 1:
            raise ConfigError(f"{self.launcher} gives world size {self.world_size}; it must be at least 1")
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(
                f"{self.launcher} gives rank {self.rank} of {self.world_size} processes; it must be 0 to "
                f"{self.world_size - 1}"
            )
        local = self.world_size if self.local_world_size is None else self.local_world_size
        if not 0 <= self.local_rank < local <= self.world_size:
            raise ConfigError(
                f"{self.launcher} gives local rank {self.local_rank} of {local} processes on this host and "
                f"{self.world_size} in all; the local rank must be 0 to {local - 1}, and no host can have "
                "more processes than the job"
            )
        if self.master_port is not None and not 1 <= self.master_port <= 65535:
            raise ConfigError(
                f"{self.launcher} leads to port {self.master_port} for rank 0; it must be 1 to 65535"
                + (" (it is MS_SCHED_PORT + 1)" if self.launcher == "msrun" else "; set MASTER_PORT")
            )


def detect_launch(environ: Mapping[str, str]) -> LaunchEnvironment:
    """Read the launcher's variables; torchrun takes precedence over msrun, Slurm and a single process, in this order.

    Args:
        environ: usually ``os.environ``.

    Raises:
        ConfigError: some of a launcher's variables are missing, or one is not a number or out of range.
    """
    if _is_torchrun(environ):
        return _torchrun(environ)
    if any(name in environ for name in _MSRUN_ALONE) and ("MS_ROLE" in environ or not _is_slurm_step(environ)):
        return _msrun(environ)
    if _is_slurm_step(environ):
        return _slurm(environ)
    return LaunchEnvironment()


def _is_torchrun(environ: Mapping[str, str]) -> bool:
    if "TORCHELASTIC_RUN_ID" in environ or all(name in environ for name in _TORCHRUN):
        return True
    if "MS_ROLE" in environ:
        # Newer msrun versions export LOCAL_RANK, and a RANK that counts within the host.
        return False
    if "RANK" in environ or "LOCAL_RANK" in environ:
        return not _repeats_slurm(environ)
    # Slurm scripts often export WORLD_SIZE alone and leave the rank to SLURM_PROCID.
    return "WORLD_SIZE" in environ and not _is_slurm_step(environ)


def _torchrun(environ: Mapping[str, str]) -> LaunchEnvironment:
    cure = "start with torchrun, or unset RANK, WORLD_SIZE and LOCAL_RANK to run as one process"
    _require(environ, _TORCHRUN, "torchrun", cure)
    return LaunchEnvironment(
        rank=_integer(environ, "RANK"),
        world_size=_integer(environ, "WORLD_SIZE"),
        local_rank=_integer(environ, "LOCAL_RANK"),
        local_world_size=_integer(environ, "LOCAL_WORLD_SIZE"),
        master_addr=environ["MASTER_ADDR"],
        master_port=_integer(environ, "MASTER_PORT"),
        launcher="torchrun",
    )


def _msrun(environ: Mapping[str, str]) -> LaunchEnvironment:
    role = environ.get("MS_ROLE", "")
    if role == "MS_SCHED":
        return LaunchEnvironment(launcher="msrun", is_scheduler=True)
    if role not in ("MS_WORKER", ""):
        raise ConfigError(f"MS_ROLE is {role!r}; msrun sets it to MS_WORKER or MS_SCHED")
    cure = f"start with msrun, or unset {', '.join(_MSRUN_ALONE)} to run as one process"
    _require(environ, _MSRUN_WORKER, "msrun", cure)
    world_size = _integer(environ, "MS_WORKER_NUM")
    if world_size > 1 and "MS_NODE_ID" not in environ:
        raise ConfigError(
            f"MS_NODE_ID is not set for this worker of {world_size}: msrun over several hosts was started "
            "without --node_rank, so every worker believes that it is rank 0; pass --node_rank=0, 1, ... to "
            "the msrun of each host"
        )
    rank, local_rank = _integer(environ, "RANK_ID"), _integer(environ, "DEVICE_ID")
    return LaunchEnvironment(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=1 if world_size == 1 else None,
        master_addr=environ["MS_SCHED_HOST"],
        # The scheduler process itself listens on MS_SCHED_PORT.
        master_port=_integer(environ, "MS_SCHED_PORT") + 1,
        launcher="msrun",
    )


def _repeats_slurm(environ: Mapping[str, str]) -> bool:
    """Whether torchrun's variables repeat Slurm's: containers' hooks (enroot's for PyTorch) and wrappers export them
    for each task, without LOCAL_WORLD_SIZE.

    Raises:
        ConfigError: in a task of srun, they differ from Slurm's.
    """
    tasks = _slurm_tasks_name(environ)
    is_only_task = _is_ordinary_step(environ) and environ.get(tasks) == "1"  # also the shell of srun --pty
    if "SLURM_PROCID" not in environ or not (is_only_task or _is_slurm_step(environ)):
        return False
    slurms = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": tasks}
    for name, slurm in slurms.items():
        if name in environ and environ[name] != environ.get(slurm):
            raise ConfigError(
                f"{name} is {environ[name]!r}, but srun started this process with {slurm}={environ.get(slurm)}; unset "
                f"{', '.join(slurms)} to go by Slurm's, or start with torchrun, one task on each node"
            )
    return True


def _is_slurm_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of several tasks; a batch script or an interactive shell is none."""
    if not _is_ordinary_step(environ) or "SLURM_PTY_PORT" in environ:
        return False
    tasks = environ.get(_slurm_tasks_name(environ), "1")
    return not tasks.isdigit() or int(tasks) > 1


def _is_ordinary_step(environ: Mapping[str, str]) -> bool:
    step = environ.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < _FIRST_SPECIAL_SLURM_STEP


def _slurm_tasks_name(environ: Mapping[str, str]) -> str:
    return "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"


def _slurm(environ: Mapping[str, str]) -> LaunchEnvironment:
    cure = "start with srun, or with torchrun inside the allocation"
    _require(environ, ("SLURM_PROCID", "SLURM_LOCALID"), "Slurm", cure)
    return LaunchEnvironment(
        rank=_integer(environ, "SLURM_PROCID"),
        world_size=_integer(environ, _slurm_tasks_name(environ)),
        local_rank=_integer(environ, "SLURM_LOCALID"),
        local_world_size=_slurm_local_tasks(environ),
        master_addr=environ.get("MASTER_ADDR") or _slurm_first_host(environ, cure),
        master_port=_slurm_port(environ, cure),
        launcher="slurm",
    )


def _slurm_local_tasks(environ: Mapping[str, str]) -> int | None:
    """Tasks on this host, from a list such as ``4(x2),3`` (two hosts with four tasks, one with three)."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    if name not in environ:
        return _integer(environ, "SLURM_NTASKS_PER_NODE") if "SLURM_NTASKS_PER_NODE" in environ else None
    per_node: list[int] = []
    for part in environ[name].split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(f"{name} is {environ[name]!r}; expected a list such as '4(x2),3'")
        per_node += [int(match[1])] * int(match[2] or 1)
    node = _integer(environ, "SLURM_NODEID") if "SLURM_NODEID" in environ else 0
    return per_node[node] if node < len(per_node) else None


def _slurm_first_host(environ: Mapping[str, str], cure: str) -> str:
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    nodes = next((environ[name] for name in names if environ.get(name)), None)
    if nodes is None:
        raise ConfigError(
            f"SLURM_STEP_NODELIST is not set, so the host of rank 0 is unknown; {cure}, or set MASTER_ADDR"
        )
    return first_host(nodes)


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: ``gpu003`` of ``"gpu[003-005,9],cpu1"``.

    Raises:
        ConfigError: the list's brackets do not match, or it is empty.
    """
    match = re.match(r"(?:[^,\[\]]|\[[^\[\]]+\])+(?=,|$)", nodes)
    if match is None:
        raise ConfigError(f"the Slurm node list is {nodes!r}; expected one such as 'gpu[001-004],cpu1'")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", match[0])


def _slurm_port(environ: Mapping[str, str], cure: str) -> int:
    """MASTER_PORT, or a port that is the same for all tasks of a step and differs between concurrent steps."""
    if "MASTER_PORT" in environ:
        return _integer(environ, "MASTER_PORT")
    name = "SLURM_JOB_ID" if "SLURM_JOB_ID" in environ else "SLURM_JOBID"
    _require(environ, (name,), "Slurm", f"{cure}, or set MASTER_PORT")
    # Below 32768, where Linux begins to hand out ports to outgoing connections.
    return 12000 + (_integer(environ, name) * 16 + _integer(environ, "SLURM_STEP_ID")) % 20000


def _require(environ: Mapping[str, str], names: tuple[str, ...], launcher: str, cure: str) -> None:
    missing = [name for name in names if not environ.get(name)]
    if missing:
        present = ", ".join(f"{name}={environ[name]}" for name in names if environ.get(name))
        verb = "is" if len(missing) == 1 else "are"
        raise ConfigError(
            f"{', '.join(missing)} {verb} not set in the environment"
            + (f", though {launcher}'s {present} {'is' if ',' not in present else 'are'}" if present else "")
            + f"; {cure}"
        )


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ConfigError(f"{name} is {environ[name]!r} in the environment; it must be an integer") from None
