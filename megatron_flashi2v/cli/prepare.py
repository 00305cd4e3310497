"""``flashi2v prepare``: annotations and video files to filtered, encoded shards, alone or under torchrun."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from megatron_flashi2v.config.prepare import PrepareConfig, check_prepare
from megatron_flashi2v.config.recipe import parse
from megatron_flashi2v.runtime.launch import LaunchEnvironment, detect_launch

WEEK_MINUTES = 7 * 24 * 60.0
LOG_WIDTH = 160


def main(argv: Sequence[str]) -> int:
    """Prepare a data set; 0 when at least one sample was kept."""
    config = parse(
        PrepareConfig,
        argv,
        prog="flashi2v prepare",
        description="Turn annotated video files into shards of VAE latents and text rows.",
    )
    check_prepare(config)
    launch = detect_launch(os.environ)
    run(config, launch)
    return 0


def run(config: PrepareConfig, launch: LaunchEnvironment) -> None:
    """Share the work with the other processes, and show the summary on rank 0."""
    from rich.console import Console

    from megatron_flashi2v.data.preparation import Place, prepare
    from megatron_flashi2v.data.summary import require_samples, summary_table
    from megatron_flashi2v.runtime.device import resolve_device
    from megatron_flashi2v.runtime.logging import setup_logging

    console = Console(stderr=True)
    setup_logging(launch.rank, console=console)
    device = resolve_device(config.device, launch.local_rank)
    with _meeting(launch) as barrier:
        place = Place(rank=launch.rank, world_size=launch.world_size, barrier=barrier)
        summary = prepare(config, place=place, device=device.torch_device, console=console)
    if summary is not None:
        # A log file needs no narrow columns.
        Console(width=None if sys.stdout.isatty() else LOG_WIDTH).print(summary_table(summary, config.folder()))
        require_samples(summary)


@contextlib.contextmanager
def _meeting(launch: LaunchEnvironment) -> Iterator[Callable[[], None]]:
    """A barrier over all processes; over gloo, as some ranks may wait for hours until the others are done."""
    if launch.world_size == 1:
        yield lambda: None
        return
    import torch.distributed

    from megatron_flashi2v.runtime.device import resolve_device
    from megatron_flashi2v.runtime.distributed import process_group

    with process_group(launch, resolve_device("cpu", launch.local_rank), WEEK_MINUTES):
        yield torch.distributed.barrier
