"""Reports an error in one line, from one process of a job, with a true exit code."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from types import FrameType
from typing import NoReturn

from megatron_flashi2v.config.errors import INTERRUPTED, ConfigError, PeerError, UserError
from megatron_flashi2v.runtime.launch import detect_launch
from megatron_flashi2v.runtime.text import shown

PATIENCE_S = 10.0
"""Seconds that ranks other than 0 wait for rank 0 to report, whose error is most often the same."""
PEER_PATIENCE_S = 30.0
"""Seconds that a process which lost another one waits for that one to report."""


def tell_error(command: str, error: UserError, environ: Mapping[str, str] = os.environ) -> int:
    """Write the error as one line on standard error, unless the launcher stops this process first.

    Launchers stop all processes as soon as one has failed. So the process that knows best reports at once and leaves,
    and the others wait to be stopped; an error of theirs alone is still reported, a little later.

    Args:
        command: as in ``flashi2v COMMAND``.
        error: what is wrong.
        environ: tells this process's rank.

    Returns:
        The exit code.
    """
    rank, world_size = _place(environ)
    if world_size > 1 and (rank or isinstance(error, PeerError)):
        _wait_to_be_stopped(PEER_PATIENCE_S if isinstance(error, PeerError) else PATIENCE_S, error.exit_code)
    who = f"[rank {rank}] " if rank else ""
    sys.stderr.write(f"flashi2v {command}: error: {who}{shown(' '.join(str(error).splitlines()))}\n")
    return error.exit_code


def tell_interrupt(command: str, environ: Mapping[str, str] = os.environ) -> int:
    """Say once that Ctrl-C ended the command; returns the exit code."""
    if _place(environ)[0] == 0:
        sys.stderr.write(f"flashi2v {command}: interrupted\n")
    return INTERRUPTED


def _place(environ: Mapping[str, str]) -> tuple[int, int]:
    """Rank and world size."""
    try:
        launch = detect_launch(environ)
    except ConfigError:  # the launcher's variables are wrong, which is the error to report
        return 0, 1
    return launch.rank, launch.world_size


def _wait_to_be_stopped(seconds: float, exit_code: int) -> None:
    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(exit_code)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        time.sleep(seconds)
    finally:
        signal.signal(signal.SIGTERM, before)
