"""``convert(config)``: weights from one format to another, with a release folder's other parts, from Python."""

from __future__ import annotations

import contextlib
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_flashi2v.config.convert import ConvertConfig

if TYPE_CHECKING:
    from megatron_flashi2v.conversion.convert import Check, Converted, Finish, OnOpen
    from megatron_flashi2v.conversion.weights import Weights

_MB = 1_000_000

logger = logging.getLogger(__name__)


def convert(config: ConvertConfig) -> Converted:
    """Convert weights, with a progress bar on standard error.

    Args:
        config: such as ``ConvertConfig.from_flags(source=("megatron", "runs/a"), target=("diffusers", "release"))``.

    Returns:
        The model's dimensions, its size and a report on every tensor.

    Raises:
        UserError: a path or a flag is wrong, or a file is damaged; nothing is left under the target's name then.
    """
    import torch

    from megatron_flashi2v.conversion.convert import convert as convert_weights
    from megatron_flashi2v.conversion.convert import source_with_format
    from megatron_flashi2v.runtime.files import atomic_write_json, require_writable
    from megatron_flashi2v.runtime.logging import logging_to_stderr

    with logging_to_stderr():
        if config.report is not None:
            require_writable(config.report, "--report")
        source = source_with_format(*config.source)
        on_open, finish, extra_bytes = _release(config, source[0])
        with contextlib.ExitStack() as stack:
            bars = _Bars(stack)
            done = convert_weights(
                source,
                config.target,
                dtype=None if config.dtype == "keep" else getattr(torch, config.dtype),
                weights=config.weights,
                num_attention_heads=config.num_attention_heads,
                phi_order=config.phi_order,
                text_cleaning=config.text_cleaning,
                keep_non_finite=config.keep_non_finite,
                max_shard_bytes=config.max_shard_bytes,
                overwrite=config.overwrite,
                verify=config.verify,
                extra_bytes=extra_bytes,
                on_open=on_open,
                finish=finish,
                check=_check(config) if config.verify else None,
                on_start=bars.start,
                on_bytes=bars.advance,
            )
        for line in done.report.lines():
            logger.info("%s", line)
        if config.report is not None:
            atomic_write_json(config.report, done.report.to_json())
        logger.info("wrote %s: %s parameters, %.1f MB, %s", config.target[1], f"{done.parameters:,}",
                    done.bytes / _MB, done.config.conditioning)
    return done


def _release(config: ConvertConfig, source_format: str) -> tuple[OnOpen | None, Finish | None, int]:
    """What checks a release's parts and makes a folder of the format diffusers one, and the bytes that it copies."""
    if config.target[0] != "diffusers":
        return None, None, 0
    from megatron_flashi2v.release.components import find_component, require_fit
    from megatron_flashi2v.release.folder import finish_release
    from megatron_flashi2v.release.model_card import Origin
    from megatron_flashi2v.sampling.prompts import text_or_file

    negative = config.negative_prompt
    negative = None if negative is None else text_or_file(negative, "--negative-prompt")
    components = [find_component(name, place) for name, place in config.parts.items()]
    copied = config.components == "copy"
    nbytes = sum(component.nbytes() for component in components if copied and component.folder is not None)

    def finish(folder: Path, weights: Weights) -> None:
        finish_release(
            folder, weights, components, copied=copied, source_format=source_format,
            origin=Origin(license=config.license, base_model=config.base_model), negative_prompt=negative,
        )

    def on_open(weights: Weights) -> None:
        require_fit(components, weights.config)

    return on_open, finish, nbytes


def _check(config: ConvertConfig) -> Check:
    from megatron_flashi2v.release.forward_check import compare_forward

    return partial(compare_forward, target_format=config.target[0])


class _Bars:
    """One progress bar after the other, in megabytes."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        from megatron_flashi2v.runtime.progress import ProgressReport

        self._report, self._bytes = ProgressReport(), 0
        self._inner = contextlib.ExitStack()
        stack.callback(lambda: self._inner.close())

    def start(self, what: str, total: int) -> None:
        """Begin another bar."""
        from megatron_flashi2v.runtime.progress import progress

        self._inner.close()
        self._bytes = 0
        self._report = self._inner.enter_context(progress(what, max(1, total // _MB), unit="MB"))

    def advance(self, count: int) -> None:
        """Bytes that are done."""
        before, self._bytes = self._bytes, self._bytes + count
        self._report.advance(self._bytes // _MB - before // _MB)
