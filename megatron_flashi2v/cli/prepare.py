"""``flashi2v prepare``: annotations and video files to filtered, encoded shards, alone or under torchrun."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_flashi2v.config.prepare import PrepareConfig, check_prepare
from megatron_flashi2v.config.recipe import parse
from megatron_flashi2v.data.run import prepare

LOG_WIDTH = 160


def main(argv: Sequence[str]) -> int:
    """Prepare a data set; 0 when at least one sample was kept."""
    config = parse(
        PrepareConfig,
        argv,
        prog=PrepareConfig.command,
        description="Turn annotated video files into shards of VAE latents and text rows.",
    )
    check_prepare(config)
    prepare(config, on_summary=partial(show, config.folder()))
    return 0


def show(folder: Path, summary: dict[str, Any]) -> None:
    """Print the summary as a table on standard output."""
    from rich.console import Console

    from megatron_flashi2v.data.summary import summary_table

    # A log file needs no narrow columns.
    Console(width=None if sys.stdout.isatty() else LOG_WIDTH).print(summary_table(summary, folder))
