"""``convert --low-noise``: the two experts of a model like Wan2.2's, one for high noise and one for low.

diffusers' rule: ``transformer`` takes the timesteps of at least boundary_ratio * 1000, ``transformer_2`` those below.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from functools import partial
from pathlib import Path

from megatron_flashi2v.config.convert import ConvertConfig
from megatron_flashi2v.config.errors import CheckpointError, ConfigError
from megatron_flashi2v.conversion.adapters.adapter import Adapter
from megatron_flashi2v.conversion.adapters.merging import MergedWeights
from megatron_flashi2v.conversion.adapters.reading import open_adapter
from megatron_flashi2v.conversion.containers import EXPERTS
from megatron_flashi2v.conversion.convert import (
    Converted,
    convert,
    format_named,
    open_weights,
    require_apart,
    source_with_format,
)
from megatron_flashi2v.conversion.experts import require_places, trained_range
from megatron_flashi2v.conversion.formats.diffusers import (
    BOUNDARY,
    CONDITIONING,
    PIPELINE_NAME,
    RELEASE_PARTS,
    SCHEDULER,
    SECOND_CONDITIONING,
    SECOND_TRANSFORMER,
    TRANSFORMER,
    WEIGHTS_STEM,
    stated_boundary,
)
from megatron_flashi2v.conversion.weights import Weights
from megatron_flashi2v.release.convert import Bars, forward_check, read_options, release_of
from megatron_flashi2v.runtime.files import atomic_write_json, read_json_object, require_space, require_writable
from megatron_flashi2v.runtime.logging import logging_to_stderr
from megatron_flashi2v.runtime.publishing import require_replaceable, staged_folder

_DIFFUSERS = "diffusers"

logger = logging.getLogger(__name__)


def convert_pair(config: ConvertConfig) -> tuple[Converted, Converted]:
    """Convert both experts: to one release folder of diffusers' layout, or to a folder for each.

    Args:
        config: its source is the expert for high noise, ``low_noise`` the other, in the same format.

    Returns:
        The results, that for high noise first.

    Raises:
        UserError: as of a conversion; or the two are of unlike settings, or nothing tells their boundary. Nothing is
            left under the target's name then.
    """
    assert config.low_noise is not None
    form, target = config.target
    with logging_to_stderr():
        if config.report is not None:
            require_writable(config.report, "--report")
        sources = [source_with_format(config.source[0], path) for path in (config.source[1], config.low_noise)]
        for path in (*(path for _, path in sources), *(() if config.adapter is None else (config.adapter,))):
            require_apart(path, target)
        require_replaceable(target, config.overwrite, partial(_is_ours, form))
        adapters = _adapters(config)
        options = [read_options(config, adapter) for adapter in adapters]
        bases = [open_weights(*source, option) for source, option in zip(sources, options, strict=True)]
        opened = [
            base if adapter is None else MergedWeights(base, adapter, config.adapter_scale)
            for base, adapter in zip(bases, adapters, strict=True)
        ]
        _require_pair(*opened)
        boundary = _boundary(config, *opened)
        check_parts, finish, extra = release_of(config, sources[0][0], boundary)
        if check_parts is not None:
            check_parts(opened[0])
        require_space(target, sum(weights.total_bytes() for weights in opened) + extra, "the conversion")
        done = []
        with staged_folder(target, overwrite=config.overwrite) as folder:
            for expert, source, weights in zip(EXPERTS, sources, opened, strict=True):
                with Bars(expert) as bars:
                    done.append(convert(
                        source, (form, folder / expert), opened=weights, text_cleaning=config.text_cleaning,
                        max_shard_bytes=config.max_shard_bytes, verify=config.verify, check=forward_check(config),
                        on_start=bars.start, on_bytes=bars.advance,
                    ))  # fmt: skip
            if form == _DIFFUSERS:
                _join(folder, boundary)
            if finish is not None:
                finish(folder, opened[0])
        for expert, result in zip(EXPERTS, done, strict=True):
            for line in result.report.lines():
                logger.info("%s: %s", expert, line)
        if config.report is not None:
            atomic_write_json(
                config.report, {name: result.report.to_json() for name, result in zip(EXPERTS, done, strict=True)}
            )
        logger.info("wrote %s: two experts of %s parameters, %.1f MB, %s%s", target, f"{done[0].parameters:,}",
                    sum(result.bytes for result in done) / 1e6, done[0].config.conditioning,
                    "" if boundary is None else f", boundary_ratio {boundary:g}")  # fmt: skip
    return done[0], done[1]


def _boundary(config: ConvertConfig, high: Weights, low: Weights) -> float | None:
    """The boundary that is given, that diffusers' folder of both states, or that divided the experts' training.

    None where the target has no place for it and nothing tells it.

    Raises:
        ConfigError: a release needs it, and nothing tells it.
        CheckpointError: the experts' training says that they are in each other's place.
    """
    assert config.low_noise is not None
    (high_from, _), (_, low_to) = ranges = trained_range(high.facts), trained_range(low.facts)
    require_places(config.source[1], config.low_noise, ranges, ("--from", "--low-noise"))
    ratio = config.boundary_ratio
    if ratio is not None:
        if config.target[0] != _DIFFUSERS:
            raise ConfigError(
                f"--boundary-ratio {ratio:g}: the format {config.target[0]} has no place for it; leave it out"
            )
        if high_from > ratio or low_to < ratio:
            logger.warning(
                "the boundary ratio is %g, but the experts were trained on noise levels from %g and up to %g",
                ratio, high_from, low_to,
            )
        return ratio
    stated = stated_boundary(config.source[1], config.low_noise)
    if stated is not None:
        return stated
    if high_from == low_to:
        return high_from
    if config.target[0] == _DIFFUSERS:
        raise ConfigError(
            f"nothing beside {config.source[1]} or in its training tells where the two experts meet; give "
            "--boundary-ratio (0.9 for Wan2.2's I2V-A14B, 0.875 for its T2V-A14B)"
        )
    return None


def _adapters(config: ConvertConfig) -> tuple[Adapter | None, Adapter | None]:
    """What is merged into each expert."""
    if config.adapter is None:
        return None, None
    adapter = open_adapter(config.adapter)
    if not adapter.low_noise:
        raise CheckpointError(
            f"{adapter.path} is for one model, and --low-noise makes a pair; merge it into the expert that it is for, "
            "by itself, before both are joined"
        )
    return (
        dataclasses.replace(adapter, low_noise={}),
        dataclasses.replace(adapter, pairs=adapter.low_noise, low_noise={}),
    )


def _require_pair(high: Weights, low: Weights) -> None:
    first, second = high.config.to_json(), low.config.to_json()
    unlike = [f"{key} {first.get(key)} and {second.get(key)}" for key in {**first, **second}
              if first.get(key) != second.get(key)]  # fmt: skip
    if unlike:
        raise CheckpointError(f"{high.source} and {low.source} are no pair of experts: they have {', '.join(unlike)}")


def _is_ours(form: str, folder: Path) -> bool:
    """Whether a folder holds what this module writes, and nothing else."""
    found = {path.name for path in folder.iterdir()}
    if form != _DIFFUSERS:
        return found == set(EXPERTS) and all(format_named(form).is_ours(folder / name) for name in EXPERTS)
    required = {TRANSFORMER, SECOND_TRANSFORMER, CONDITIONING, SCHEDULER, PIPELINE_NAME}
    return required <= found <= required | {SECOND_CONDITIONING, *RELEASE_PARTS}


def _join(folder: Path, boundary: float | None) -> None:
    """Make one pipeline's folder of two."""
    high, low = (folder / name for name in EXPERTS)
    index = read_json_object(high / PIPELINE_NAME, error=CheckpointError)
    index |= {SECOND_TRANSFORMER: index[TRANSFORMER], BOUNDARY: boundary}
    (low / TRANSFORMER).rename(folder / SECOND_TRANSFORMER)
    if any((low / CONDITIONING).glob(f"{WEIGHTS_STEM}*")):  # else one folder of settings serves both
        (low / CONDITIONING).rename(folder / SECOND_CONDITIONING)
        index[SECOND_CONDITIONING] = index[CONDITIONING]
    for path in high.iterdir():
        path.rename(folder / path.name)
    atomic_write_json(folder / PIPELINE_NAME, index)
    high.rmdir()
    shutil.rmtree(low)
