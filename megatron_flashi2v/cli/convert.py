"""``flashi2v convert``: checkpoints to and from other formats."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_flashi2v.config.convert import ADAPTER_TARGETS, ENCODERS, ConvertConfig
from megatron_flashi2v.config.recipe import parse
from megatron_flashi2v.release.convert import convert


def main(argv: Sequence[str]) -> int:
    """Parse the arguments after ``convert`` and run; returns the exit status.

    Raises:
        UserError: a path or a flag is wrong, or a file is damaged.
    """
    config = parse(
        ConvertConfig,
        argv,
        prog=ConvertConfig.command,
        description="Convert weights between training checkpoints, diffusers, Wan and FlashI2V's releases.",
    )
    if config.target[0] == ENCODERS:
        from megatron_flashi2v.release.encoders import convert_encoders

        convert_encoders(config)
    elif config.target[0] in ADAPTER_TARGETS:
        from megatron_flashi2v.release.adapters import convert_adapter

        convert_adapter(config)
    elif config.low_noise is not None:
        from megatron_flashi2v.release.pairs import convert_pair

        convert_pair(config)
    else:
        convert(config)
    return 0
