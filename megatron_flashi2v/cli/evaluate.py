"""``flashi2v evaluate``: sampled videos against real ones, measured and reported."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_flashi2v.config.evaluate import EvaluateConfig
from megatron_flashi2v.config.recipe import parse


def main(argv: Sequence[str]) -> int:
    """Parse the arguments after ``evaluate`` and run; returns the exit status.

    Raises:
        UserError: a file, a folder or a setting is wrong.
    """
    config = parse(
        EvaluateConfig,
        argv,
        prog=EvaluateConfig.command,
        description="Measure sampled videos against real ones: chunk-wise Frechet distance, fidelity to the condition "
        "image, motion and diversity.",
    )
    from megatron_flashi2v.evaluation.evaluate import evaluate
    from megatron_flashi2v.runtime.logging import logging_to_stderr

    with logging_to_stderr():
        evaluate(config)
    return 0
