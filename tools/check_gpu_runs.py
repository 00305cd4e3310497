"""Processes of the check of a card: forked with what they import, with output to files, killed at a deadline."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

ITERATIONS = 4
TRAIN = (
    "--config", "examples/recipes/tiny.yaml", "--mock-data", "--micro-batch-size", "1", "--global-batch-size", "2",
    "--train-iters", str(ITERATIONS), "--lr-warmup-iters", "1", "--save-interval", "2", "--log-interval", "1",
)  # fmt: skip
Losses = list[tuple[float, float]]


class CheckFailed(Exception):
    """What was found, in a line.

    Attributes:
        log: the end of what the failed process printed.
    """

    def __init__(self, found: str, log: str = "") -> None:
        super().__init__(found)
        self.log = log[-4000:]


class OutOfTime(CheckFailed):
    """The deadline came first."""


@dataclass
class Check:
    """A step under way.

    Attributes:
        device: the device that is checked.
        folder: for what steps write.
        rehearse: toy sizes, on the CPU.
        free_gib: the device's free memory before anything ran.
        deadline: of the step, by ``time.monotonic``.
        losses: of each run of :meth:`train`, by its name.
    """

    device: str
    folder: Path
    rehearse: bool
    free_gib: float = 0.0
    deadline: float = 0.0
    losses: dict[str, Losses] = field(default_factory=dict)

    def python(self, *words: str, ranks: int = 1, **environment: str) -> str:
        """What ``python WORDS`` prints, or the first of some ranks; all are killed at the step's deadline.

        Raises:
            CheckFailed: it failed or took too long.
        """
        logs = [self.folder / f"rank-{rank}.log" for rank in range(ranks)]
        environments = [environment]
        if ranks > 1:
            import torch.distributed as dist

            # As torchrun's agent does, the parent holds the store. All ranks take the one card.
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            shared = {
                "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "LOCAL_RANK": "0",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            environments = [{**environment, **shared, "RANK": str(rank)} for rank in range(ranks)]
        context = multiprocessing.get_context("forkserver")
        processes = [
            context.Process(target=_python, args=(words, *of_rank)) for of_rank in zip(environments, logs, strict=True)
        ]
        try:
            for process in processes:
                process.start()
            self._wait(processes, logs)
        finally:
            for process in processes:
                _kill(process)
        return logs[0].read_text(errors="replace")

    def _wait(self, processes: list[BaseProcess], logs: list[Path]) -> None:
        running = dict(zip(processes, logs, strict=True))
        while running:
            multiprocessing.connection.wait(
                [process.sentinel for process in running], max(self.deadline - time.monotonic(), 0.0)
            )
            for process in [process for process in running if process.exitcode is not None]:
                told = running.pop(process).read_text(errors="replace").strip()
                if process.exitcode:
                    line = (told.splitlines() or ["printed nothing"])[-1]
                    raise CheckFailed(f"exit code {process.exitcode}: {line[:200]}", told)
            if running and time.monotonic() >= self.deadline:
                log = next(iter(running.values()))
                raise OutOfTime("took longer than its limit", log.read_text(errors="replace"))

    def train(self, name: str, *flags: str, ranks: int = 1, device: str = "") -> Losses:
        """Loss and gradient norm of each iteration of a tiny run into ``folder / name``, which is made once."""
        if name not in self.losses:
            save = self.folder / name
            gloo = ("--distributed-backend", "gloo") if ranks > 1 else ()
            self.python("-m", "megatron_flashi2v", "train", *TRAIN, "--save", str(save), "--device",
                        device or self.device, *gloo, *flags, ranks=ranks)
            rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
            self.losses[name] = [(row["loss"], row["grad_norm"]) for row in rows]
        return self.losses[name]

    def train_device(self) -> Losses:
        """The run in fp32 on the device that others are compared with; its checkpoints are written beside it."""
        return self.train("device", "--async-save")


def _python(words: tuple[str, ...], environment: dict[str, str], log: Path) -> None:
    """Become ``python WORDS``, whose output goes to a file."""
    os.setsid()  # so that whatever it starts is killed with it
    with open(log, "wb", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    torch = sys.modules.get("torch")
    # A library, such as Transformer Engine, took the card when it was imported: no fork can have it.
    if torch is not None and torch.cuda._is_in_bad_fork():
        os.execv(sys.executable, [sys.executable, *words])
    if words[0] == "-m":
        sys.argv = ["", *words[2:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")


def _kill(process: BaseProcess) -> None:
    if process.pid is None or process.exitcode is not None:
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # before it has a group of its own
        process.kill()
    process.join()
