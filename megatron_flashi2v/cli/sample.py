"""``flashi2v sample``: an image and a prompt to an mp4, or a file of them to many."""

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
        description="Sample a video that starts from an image and follows a prompt; or many, with --requests.",
    )
    if config.requests is None:
        from megatron_flashi2v.sampling.run import sample

        sample(config)
    else:
        from megatron_flashi2v.sampling.many import sample_requests

        sample_requests(config)
    return 0
