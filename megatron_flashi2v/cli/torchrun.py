"""``flashi2v torchrun``: a command on several processes, started and watched by torch's own launcher.

It takes torchrun's flags and differs in how it ends: what a rank has said is not repeated under a traceback of the
launcher, the exit code is the rank's, and signals that ask a run to save and leave are passed on and waited for.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from megatron_flashi2v.cli.errors import PATIENCE_S
from megatron_flashi2v.config.bounds import suggestion
from megatron_flashi2v.config.errors import ConfigError, PeerError
from megatron_flashi2v.config.help import show

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
USAGE = """usage: flashi2v torchrun [TORCHRUN-FLAGS] COMMAND [FLAGS]

Start a command on several devices or nodes, and end with the exit code of the rank that failed first.

Common flags of torchrun, all of which `torchrun --help` lists:
  --nproc-per-node INT        Processes on this node, one for each device.
  --nnodes INT                Nodes, on each of which the same line is started.
  --rdzv-backend c10d         How the nodes meet, with
  --rdzv-endpoint HOST:PORT   where: the first node, and a free port of it.
"""
LINGER_S = PATIENCE_S + 5
"""How long a node that has failed keeps the store of the rendezvous, which the other nodes' launchers still ask."""


def main(argv: Sequence[str]) -> int:
    """Start a command under torch's launcher; the exit code of the rank that failed first, or 0.

    Args:
        argv: torchrun's flags, the command and its flags.

    Raises:
        ConfigError: the command is unknown.
        PeerError: the other nodes' launchers cannot be reached.
    """
    if not argv or argv[0] in ("-h", "--help"):
        show(USAGE)
        return 0 if argv else 2
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import get_args_parser, run

    parser = get_args_parser()
    parser.prog = "flashi2v torchrun"
    arguments = parser.parse_args(list(argv))
    require_command(arguments.training_script)
    arguments.training_script_args.insert(0, arguments.training_script)
    arguments.module, arguments.training_script = True, "megatron_flashi2v"
    # By default the launcher gives its processes 30 s after a signal, and then loses their exit codes.
    arguments.signals_to_handle = "SIGQUIT"
    # It says that a process has failed and that it stops the others.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        with signals_passed_on():
            run(arguments)
    except ChildFailedError as error:
        code = exit_code_of(error)
        if arguments.nnodes != "1":
            time.sleep(LINGER_S)  # the error's frames hold the store
        return code
    except RendezvousError as error:
        raise PeerError(f"lost the launchers of the other nodes at {arguments.rdzv_endpoint} ({error})") from error
    except SignalException as error:  # torch before 2.8 handles all signals itself
        return 128 + int(error.sigval)
    return 0


def require_command(name: str) -> None:
    """Refuse what is none of our commands.

    Raises:
        ConfigError: with a suggestion.
    """
    from megatron_flashi2v.cli.main import COMMANDS

    known = [command for command in COMMANDS if command != "torchrun"]
    if name not in known:
        raise ConfigError(
            f"{name!r} is no command to start{suggestion(name, known)}; after torchrun's flags comes one of "
            f"{', '.join(known)}"
        )


def exit_code_of(error: ChildFailedError) -> int:
    """The code of the rank that failed first; says which one if a signal ended it, since it could not."""
    rank, failure = error.get_first_failure()
    if failure.exitcode >= 0:
        return failure.exitcode
    sys.stderr.write(f"flashi2v torchrun: error: rank {rank} (process {failure.pid}) was ended by "
                     f"{failure.signal_name()}\n")
    return 128 - failure.exitcode


@contextlib.contextmanager
def signals_passed_on() -> Iterator[None]:
    """Within the context, signals that ask to leave go to the processes that were started; without any, they end us."""
    import psutil

    def pass_on(number: int, frame: FrameType | None) -> None:
        children = psutil.Process().children()
        if not children:
            raise SystemExit(128 + number)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
