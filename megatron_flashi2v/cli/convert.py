"""``flashi2v convert``: checkpoints to and from other formats."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from megatron_flashi2v.config.convert import ConvertConfig
from megatron_flashi2v.config.flags import parse_flags

_MB = 1_000_000

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Parse the arguments after ``convert`` and run; returns the exit status.

    Raises:
        UserError: a path or a flag is wrong, or a file is damaged.
    """
    config = parse_flags(
        ConvertConfig,
        argv,
        prog="flashi2v convert",
        description="Convert weights between training checkpoints and diffusers folders.",
    )
    run(config)
    return 0


def run(config: ConvertConfig) -> None:
    """Convert, with a progress bar.

    Raises:
        UserError: as for :func:`main`.
    """
    import contextlib

    import torch

    from megatron_flashi2v.checkpoint.convert import convert
    from megatron_flashi2v.runtime.logging import setup_logging
    from megatron_flashi2v.runtime.progress import ProgressReport, progress

    setup_logging()
    dtype = None if config.dtype == "keep" else getattr(torch, config.dtype)
    with contextlib.ExitStack() as stack:
        report = ProgressReport()
        written = 0

        def on_start(total: int) -> None:
            nonlocal report
            report = stack.enter_context(progress("convert", max(1, total // _MB), unit="MB"))

        def on_bytes(count: int) -> None:
            nonlocal written
            before, written = written, written + count
            report.advance(written // _MB - before // _MB)

        done = convert(
            config.source,
            config.target,
            dtype=dtype,
            max_shard_bytes=config.max_shard_bytes,
            overwrite=config.overwrite,
            on_start=on_start,
            on_bytes=on_bytes,
        )
    logger.info(
        "wrote %s: %s parameters, %.1f MB, %s",
        config.target[1],
        f"{done.parameters:,}",
        done.bytes / _MB,
        done.config.conditioning,
    )
