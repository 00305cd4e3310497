"""Logging: rank 0 writes all lines to standard error, the other ranks only warnings and errors."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.logging import RichHandler

from megatron_flashi2v.runtime.quiet import hide_unhelpful_warnings
from megatron_flashi2v.runtime.text import ShownFormatter

AGREED = {"agreed": True}
"""``extra`` of a warning that all ranks log alike; only rank 0's is shown."""
ONCE = {"once": True}
"""``extra`` of a warning that many inputs cause; only the first is shown, after each :func:`setup_logging`."""

_PACKAGE = "megatron_flashi2v"
_NAME = "megatron_flashi2v console"


def setup_logging(rank: int = 0, verbose: bool = False, console: Console | None = None) -> None:
    """Send the project's log to standard error; a second call replaces the first.

    Args:
        rank: rank 0 logs from INFO on, the others from WARNING on with ``[rank N]`` before each line.
        verbose: log from DEBUG on, on every rank.
        console: a terminal that also shows a progress bar; log lines appear above the bar.

    Logs Python's warnings too, on rank 0 only unless ``verbose`` (the ranks' warnings are the same). Unless
    ``verbose``, hides those that :func:`~megatron_flashi2v.runtime.quiet.hide_unhelpful_warnings` names.
    """
    if not verbose:
        hide_unhelpful_warnings()
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if handler.get_name() == _NAME]:
        root.removeHandler(handler)
    root.addHandler(_handler(rank, console))
    level = logging.DEBUG if verbose else logging.INFO if rank == 0 else logging.WARNING
    logging.getLogger(_PACKAGE).setLevel(level)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.WARNING if verbose or rank == 0 else logging.ERROR)


@contextlib.contextmanager
def logging_to_stderr(rank: int = 0, *, console: Console | None = None) -> Iterator[None]:
    """:func:`setup_logging` within the context; afterwards handlers, levels and warnings are as they were."""
    root, package, python = (logging.getLogger(name) for name in (None, _PACKAGE, "py.warnings"))
    handlers, levels = list(root.handlers), (package.level, python.level)
    captured = getattr(warnings.showwarning, "__module__", None) == logging.__name__
    with warnings.catch_warnings():
        setup_logging(rank, console=console)
        try:
            yield
        finally:
            root.handlers[:] = handlers
            package.setLevel(levels[0])
            python.setLevel(levels[1])
            if not captured:
                logging.captureWarnings(False)


def _handler(rank: int, console: Console | None) -> logging.Handler:
    prefix = f"[rank {rank}] " if rank else ""
    handler: logging.Handler
    if console is not None and console.is_terminal:
        handler = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S")
        handler.setFormatter(ShownFormatter(f"{prefix}%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(ShownFormatter(f"%(asctime)s %(levelname)s {prefix}%(message)s", "%H:%M:%S"))
    if rank:
        handler.addFilter(lambda record: not getattr(record, "agreed", False))
    handler.addFilter(_first_of_each())
    handler.set_name(_NAME)
    return handler


def _first_of_each() -> Callable[[logging.LogRecord], bool]:
    """A filter that passes the first of the records of each message that are :data:`ONCE`."""
    seen: set[str] = set()

    def is_first(record: logging.LogRecord) -> bool:
        if not getattr(record, "once", False):
            return True
        known = str(record.msg) in seen
        seen.add(str(record.msg))
        return not known

    return is_first
