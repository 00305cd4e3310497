"""How a job says what is wrong: in one line, by one of its processes, with a true exit code."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import NoReturn

from megatron_flashi2v.config.errors import ConfigError, PeerError, UserError
from megatron_flashi2v.runtime.launch import LaunchEnvironment, detect_launch

PATIENCE_S = 10.0
"""How long other ranks than 0 leave the word to rank 0, whose error is most often the same as theirs."""
PEER_PATIENCE_S = 30.0
"""How long a process that stops because of another one leaves the word to that one."""
INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 and the signal's number."""


def tell_error(command: str, error: UserError, environ: Mapping[str, str] = os.environ) -> int:
    """Write the error as one line on standard error, unless the launcher stops this process first.

    Launchers stop all processes as soon as one has failed. So the process that knows best speaks at once and leaves,
    and the others wait to be stopped; what only one of them knows is still said, a little later.

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
    sys.stderr.write(f"flashi2v {command}: error: {who}{' '.join(str(error).splitlines())}\n")
    return error.exit_code


def tell_interrupt(command: str, environ: Mapping[str, str] = os.environ) -> int:
    """Say once that Ctrl-C ended the command; returns the exit code."""
    if _place(environ)[0] == 0:
        sys.stderr.write(f"flashi2v {command}: interrupted\n")
    return INTERRUPTED


@contextlib.contextmanager
def leaving_group(launch: LaunchEnvironment) -> Iterator[None]:
    """Leave torch.distributed's group at the end: together, or at once where this process has failed.

    Args:
        launch: this process's place.

    Raises:
        PeerError: a collective failed because another process has left.
    """
    from megatron_flashi2v.runtime.distributed import shutdown

    try:
        yield
        shutdown()
    except BaseException as error:
        if launch.world_size == 1 or not _is_lost_connection(error):
            shutdown(failed=True, exit_code=_exit_code(error))
            raise
        shutdown(failed=True, exit_code=PeerError.exit_code)
        what = (str(error).splitlines() or [""])[0]
        raise PeerError(
            f"rank {launch.rank} lost the other processes ({what}); the one that failed first says why"
        ) from error


def _exit_code(error: BaseException) -> int:
    """The exit code of a process that this error ends."""
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        return error.code or 0
    return 1


def _is_lost_connection(error: BaseException) -> bool:
    import torch.distributed

    # gloo and HCCL raise plain RuntimeErrors. The texts of the one begin with its source file; those of the other hold
    # CANN's codes for a rank that did not take part in time, and for one that could not be connected to.
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and bool(re.search(r"gloo/transport|\bEI000[26]\b", str(error)))
    )


def _place(environ: Mapping[str, str]) -> tuple[int, int]:
    """Rank and world size."""
    try:
        launch = detect_launch(environ)
    except ConfigError:  # the launcher's variables are wrong, which is the very error to be told
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
