"""``convert(config)``: weights from one format to another, with a release folder's other parts, from Python."""

from __future__ import annotations

import contextlib
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_flashi2v.config.convert import ADAPTER_TARGETS, ENCODERS, ConvertConfig
from megatron_flashi2v.config.errors import ConfigError

if TYPE_CHECKING:
    from megatron_flashi2v.conversion.adapters.adapter import Adapter
    from megatron_flashi2v.conversion.convert import Check, Converted, Finish, OnOpen
    from megatron_flashi2v.conversion.weights import ReadOptions, Weights

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
    from megatron_flashi2v.conversion.adapters.reading import is_checkpoint, open_adapter
    from megatron_flashi2v.conversion.convert import convert as convert_weights
    from megatron_flashi2v.conversion.convert import source_with_format
    from megatron_flashi2v.runtime.files import atomic_write_json, require_writable
    from megatron_flashi2v.runtime.logging import logging_to_stderr

    other = next((name for holds, name in (
        (config.low_noise is not None, "release.pairs.convert_pair"),
        (config.target[0] == ENCODERS, "release.encoders.convert_encoders"),
        (config.target[0] in ADAPTER_TARGETS, "release.adapters.convert_adapter"),
    ) if holds), None)  # fmt: skip
    if other is not None:
        raise ConfigError(f"this is no conversion of one model; from Python, call megatron_flashi2v.{other}")
    with logging_to_stderr():
        if config.report is not None:
            require_writable(config.report, "--report")
        source = source_with_format(*config.source)
        on_open, finish, extra_bytes = release_of(config, source[0])
        adapter = None
        if config.adapter is not None:
            weights = config.weights if is_checkpoint(config.adapter) else "model"
            adapter = open_adapter(config.adapter, weights=weights)
        options = read_options(config, adapter)
        with Bars() as bars:
            done = convert_weights(
                source,
                config.target,
                dtype=options.dtype,
                weights=options.weights,
                num_attention_heads=options.num_attention_heads,
                phi_order=options.phi_order,
                text_cleaning=config.text_cleaning,
                keep_non_finite=options.keep_non_finite,
                max_shard_bytes=config.max_shard_bytes,
                overwrite=config.overwrite,
                verify=config.verify,
                extra_bytes=extra_bytes,
                adapter=adapter,
                adapter_scale=config.adapter_scale,
                on_open=on_open,
                finish=finish,
                check=forward_check(config),
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


def read_options(config: ConvertConfig, adapter: Adapter | None) -> ReadOptions:
    """How the flags have a source opened; the base of a checkpoint of an adapter as training opened it."""
    import torch

    from megatron_flashi2v.conversion.weights import ReadOptions

    return ReadOptions(
        dtype=None if config.dtype == "keep" else getattr(torch, config.dtype),
        weights=(adapter.base_weights if adapter else "") or config.weights,
        num_attention_heads=config.num_attention_heads,
        phi_order=config.phi_order,
        keep_non_finite=config.keep_non_finite,
        assume=adapter.config if adapter else None,
    )


def release_of(
    config: ConvertConfig, source_format: str, boundary_ratio: float | None = None
) -> tuple[OnOpen | None, Finish | None, int]:
    """What checks a release's parts and makes a folder of the format diffusers one, and the bytes that it copies."""
    if config.target[0] != "diffusers":
        return None, None, 0
    from megatron_flashi2v.conversion.weights import NEGATIVE_PROMPT
    from megatron_flashi2v.release.components import find_components, require_fit
    from megatron_flashi2v.release.folder import finish_release
    from megatron_flashi2v.release.model_card import Origin
    from megatron_flashi2v.sampling.prompts import require_prompt, text_or_file

    negative = config.negative_prompt
    negative = None if negative is None else text_or_file(negative, "--negative-prompt")
    components = find_components(config.parts)
    copied = config.components == "copy"
    nbytes = sum(component.nbytes() for component in components if copied and component.folder is not None)

    def finish(folder: Path, weights: Weights) -> None:
        finish_release(
            folder, weights, components, copied=copied, source_format=source_format,
            origin=Origin(license=config.license, base_model=config.base_model, boundary_ratio=boundary_ratio),
            negative_prompt=negative,
        )

    def on_open(weights: Weights) -> None:
        require_fit(components, weights.config)
        published = weights.facts.get(NEGATIVE_PROMPT) if negative is None else negative
        if published is not None:
            cleaning = config.text_cleaning or weights.config.text_cleaning
            require_prompt(published, cleaning, "negative prompt")

    return on_open, finish, nbytes


def forward_check(config: ConvertConfig) -> Check | None:
    """What ``--verify`` runs after it has compared tensors."""
    if not config.verify:
        return None
    from megatron_flashi2v.release.forward_check import compare_forward

    return partial(compare_forward, target_format=config.target[0])


class Bars:
    """One progress bar after the other, in megabytes; a context.

    Args:
        of: what is converted, before each bar's name.
    """

    def __init__(self, of: str = "") -> None:
        from megatron_flashi2v.runtime.progress import ProgressReport

        self._of, self._report, self._bytes = of, ProgressReport(), 0
        self._inner = contextlib.ExitStack()

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *exception: object) -> None:
        self._inner.close()

    def start(self, what: str, total: int) -> None:
        """Begin another bar."""
        from megatron_flashi2v.runtime.progress import progress

        self._inner.close()
        self._bytes = 0
        named = f"{self._of} {what}".strip()
        self._report = self._inner.enter_context(progress(named, max(1, total // _MB), unit="MB"))

    def advance(self, count: int) -> None:
        """Bytes that are done."""
        before, self._bytes = self._bytes, self._bytes + count
        self._report.advance(self._bytes // _MB - before // _MB)
