"""``flashi2v sample``: an image and a prompt to an mp4."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_flashi2v.config.recipe import parse
from megatron_flashi2v.config.sample import SampleConfig


def main(argv: Sequence[str]) -> int:
    """Parse the arguments after ``sample`` and run; returns the exit status.

    Raises:
        UserError: a file, a checkpoint or a setting is wrong.
    """
    config = parse(
        SampleConfig,
        argv,
        prog=SampleConfig.command,
        description="Sample a video that starts from an image and follows a prompt.",
    )
    from megatron_flashi2v.sampling.run import sample

    sample(config)
    return 0
