"""``prepare(config)``: a data set prepared from Python, alone or as one of a launcher's processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from megatron_flashi2v.config.prepare import PrepareConfig, check_prepare
from megatron_flashi2v.runtime.launch import LaunchEnvironment, detect_launch

WEEK_MINUTES = 7 * 24 * 60.0


def prepare(
    config: PrepareConfig, on_summary: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any] | None:
    """Turn annotated video files into shards of VAE latents and text rows, or go on where it was interrupted.

    Every process that a launcher started calls it alike, and does its share. Progress is drawn on standard error.

    Args:
        config: such as ``PrepareConfig.from_flags(annotations="meta.json", output="data", ...)``.
        on_summary: called on rank 0 with what is returned, also where no clip was kept.

    Returns:
        On rank 0 the contents of ``summary.json``: ``entries``, ``kept``, ``dropped`` by reason, ``shards``, ``bytes``
        and ``seconds``; None on the others.

    Raises:
        UserError: a value is impossible, the annotations are malformed, the disk is full, or no clip was kept.
    """
    check_prepare(config)
    launch = detect_launch(os.environ)
    from rich.console import Console

    from megatron_flashi2v.data.preparation import Place
    from megatron_flashi2v.data.preparation import prepare as prepare_share
    from megatron_flashi2v.data.summary import require_samples
    from megatron_flashi2v.runtime.device import resolve_device
    from megatron_flashi2v.runtime.logging import logging_to_stderr

    console = Console(stderr=True)
    with logging_to_stderr(launch.rank, console=console):
        device = resolve_device(config.device, launch.local_rank)
        with _meeting(launch) as barrier:
            place = Place(rank=launch.rank, world_size=launch.world_size, barrier=barrier)
            summary = prepare_share(config, place=place, device=device.torch_device, console=console)
    if summary is not None:
        if on_summary is not None:
            on_summary(summary)
        require_samples(summary)
    return summary


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
