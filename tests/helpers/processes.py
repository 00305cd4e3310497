"""Launches under torchrun whose processes, of any depth, can be found again."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

MARK = "FLASHI2V_TEST_LAUNCH"


class Launch:
    """A running ``flashi2v train``, or one node's part of it.

    Args:
        world: processes.
        flags: of train.
        folder: for what the processes print.
        prelude: Python that every process runs first, and that defines ``OBSERVERS`` of the run.
        launcher: words that start it, before ``train``; torchrun on one node by default.
    """

    def __init__(
        self, world: int, flags: list[str], folder: Path, prelude: str | None = None,
        launcher: Sequence[str] | None = None,
    ) -> None:
        self.mark, self.log = secrets.token_hex(8), folder / "launch.log"
        script = ["-m", "megatron_flashi2v"]
        if prelude is not None:
            path = folder / "prelude.py"
            path.write_text(
                f"{prelude}\n\nif __name__ == '__main__':\n"
                "    import sys\n    from megatron_flashi2v import TrainConfig, train\n"
                "    from megatron_flashi2v.config.recipe import parse\n"
                "    train(parse(TrainConfig, sys.argv[2:], prog='train', description=''), OBSERVERS)\n"
            )
            script = [str(path)]
        if launcher is None:
            launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world), *script]
        command = [sys.executable, "-m", *launcher, "train", *flags]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, MARK: self.mark})

    def living(self) -> dict[int, dict[str, str]]:
        """Environments of the launch's living processes, by number."""
        found = {}
        for path in Path("/proc").iterdir():
            if not path.name.isdecimal():
                continue
            try:
                pairs = (path / "environ").read_bytes().decode(errors="replace").split("\0")
                state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            environ = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            if environ.get(MARK) == self.mark and state != "Z":
                found[int(path.name)] = environ
        return found

    def rank(self, number: int) -> int:
        """The process of a rank."""
        return next(pid for pid, environ in self.living().items() if environ.get("RANK") == str(number))

    def wait_for_rows(self, save: Path, rows: int, seconds: float = 240.0) -> None:
        """Until the run has done so many iterations."""
        metrics, end = save / "metrics.jsonl", time.monotonic() + seconds
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < rows:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < end, "the run does not get on"
            time.sleep(0.05)

    def wait(self, seconds: float) -> int:
        """The launcher's exit code; it must leave no process."""
        code = self.process.wait(seconds)
        end = time.monotonic() + 10
        while self.living() and time.monotonic() < end:
            time.sleep(0.1)
        assert not self.living()
        return code

    def errors(self) -> list[str]:
        """Lines that tell an error."""
        return [line for line in self.log.read_text().splitlines() if "error: " in line or " CRITICAL " in line]


@contextmanager
def launched(
    world: int, flags: list[str], folder: Path, prelude: str | None = None, launcher: Sequence[str] | None = None
) -> Iterator[Launch]:
    """A launch that is ended, whatever happens."""
    launch = Launch(world, flags, folder, prelude, launcher)
    try:
        yield launch
    finally:
        for pid in launch.living():
            os.kill(pid, signal.SIGKILL)
        launch.process.wait(30)
