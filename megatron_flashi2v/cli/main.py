"""``flashi2v COMMAND ...``: hands over to one thin file per command, importing nothing heavy before it must."""

from __future__ import annotations

import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence

from megatron_flashi2v.cli.errors import tell_error, tell_interrupt
from megatron_flashi2v.config.bounds import suggestion
from megatron_flashi2v.config.errors import UserError
from megatron_flashi2v.config.help import show
from megatron_flashi2v.runtime.launch import detect_launch
from megatron_flashi2v.runtime.quiet import hide_unhelpful_warnings
from megatron_flashi2v.version import __version__

COMMANDS = {
    "prepare": "annotations and video files to filtered, encoded shards",
    "train": "pretraining, alone or under torchrun, msrun or srun",
    "sample": "an image and a prompt to a video",
    "convert": "checkpoints to and from other formats",
    "evaluate": "sampled videos and references to measures and a report",
    "torchrun": "one of these on several devices or nodes: torchrun's flags, COMMAND, its flags",
}


def usage() -> str:
    """The text of ``flashi2v --help``."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    return (
        "usage: flashi2v COMMAND [FLAGS]\n\n"
        "Train FlashI2V image-to-video diffusion transformers on megatron-core.\n\n"
        f"commands:\n{commands}\n\n"
        "`flashi2v COMMAND --help` lists a command's flags.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the process's exit code.

    A :class:`~megatron_flashi2v.config.errors.UserError` is printed in one line; anything else is a bug and keeps its
    traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        show(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        show(f"megatron-flashi2v {__version__}\n")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        close = suggestion(command, COMMANDS)
        sys.stderr.write(f"flashi2v: error: unknown command {command!r}{close} (see flashi2v --help)\n")
        return 2
    return run_command(command, rest)


def run_command(command: str, argv: Sequence[str]) -> int:
    """Run one command's ``main`` and turn a user's error, or Ctrl-C, into a line and an exit code.

    msrun starts the script once more as its scheduler; that process leaves here, before its flags are read.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name that the terminal has no letters for stops no command
            stream.reconfigure(errors="backslashreplace")
    # torch would import torch_npu by itself, and fail with a traceback where CANN is missing; runtime/device.py imports
    # it when an NPU is asked for, and says what is missing.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    try:
        if "MS_ROLE" in os.environ and detect_launch(os.environ).is_scheduler:
            return 0
        with warnings.catch_warnings():
            hide_unhelpful_warnings()
            return importlib.import_module(f"megatron_flashi2v.cli.{command}").main(list(argv))
    except UserError as error:
        return tell_error(command, error)
    except KeyboardInterrupt:
        return tell_interrupt(command)
