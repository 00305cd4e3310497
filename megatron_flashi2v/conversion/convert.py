"""Converts weights from one format to another, one tensor at a time; publishes the result when it is whole."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_flashi2v.checkpoint.key_table import parameter_count
from megatron_flashi2v.config.errors import CheckpointError, ConfigError, UserError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.conversion.adapters.adapter import Adapter
from megatron_flashi2v.conversion.adapters.merging import MergedWeights
from megatron_flashi2v.conversion.comparison import require_equal_weights
from megatron_flashi2v.conversion.formats import comfyui, diffusers, megatron, torch_dist
from megatron_flashi2v.conversion.formats.original import FLASHI2V_GPU, FLASHI2V_NPU, WAN
from megatron_flashi2v.conversion.recognition import AUTO, find_pair, recognise_format, require_format
from megatron_flashi2v.conversion.report import ConversionReport, make_report
from megatron_flashi2v.conversion.training_folders import newest_iteration
from megatron_flashi2v.conversion.weights import OnBytes, ReadOptions, Weights
from megatron_flashi2v.runtime.files import require_space
from megatron_flashi2v.runtime.publishing import staged_folder

# More than headers, indices and configurations take.
_OVERHEAD_BYTES = 16_000_000


def _no_caveats(config: ModelConfig) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Format:
    """Functions that read and write one format.

    Attributes:
        open: opens the weights at a path.
        write: fills an empty folder with weights, in files of at most so many bytes.
        is_ours: whether a folder holds what ``write`` wrote and nothing else, so that it may be replaced.
        names: gives the format's names of each of our tensors.
        column: the key table's column of its names; "" for our own names. Formats that share one read each other.
        caveats: lists what other software gets wrong about such a model in this format.
        one_file: whether its readers take one file, of one dtype.
        require: refuses a model that its readers would compute wrongly.
    """

    open: Callable[[Path, ReadOptions], Weights]
    write: Callable[[Path, Weights, int, OnBytes | None], None]
    is_ours: Callable[[Path], bool]
    names: Callable[[ModelConfig], Mapping[str, tuple[str, ...]]]
    column: str
    caveats: Callable[[ModelConfig], tuple[str, ...]] = _no_caveats
    one_file: bool = False
    require: Callable[[ModelConfig], None] | None = None


FORMATS: Mapping[str, Format] = {
    "megatron": Format(
        open=megatron.open_weights, write=megatron.write_weights, is_ours=megatron.is_ours, names=megatron.names,
        column="",
    ),
    "diffusers": Format(
        open=diffusers.open_weights, write=diffusers.write_weights, is_ours=diffusers.is_ours, names=diffusers.names,
        column="diffusers",
    ),
    **{
        original.name: Format(
            open=original.open, write=original.write, is_ours=original.is_ours, names=original.names,
            column=original.column, caveats=original.caveats, one_file=original is not WAN,
        )
        for original in (WAN, FLASHI2V_NPU, FLASHI2V_GPU)
    },
    "comfyui": Format(
        open=comfyui.open_weights, write=comfyui.write_weights, is_ours=comfyui.is_ours, names=comfyui.names,
        column="wan", caveats=comfyui.caveats, one_file=True, require=comfyui.require_runnable,
    ),
    "torch-dist": Format(
        open=torch_dist.open_weights, write=torch_dist.write_weights, is_ours=torch_dist.is_ours,
        names=torch_dist.names, column="",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Converted:
    """Result of a conversion."""

    config: ModelConfig
    parameters: int
    bytes: int
    report: ConversionReport


Finish = Callable[[Path, Weights], None]
"""Adds files to a written folder before it is published; takes the folder and the weights in it."""

OnOpen = Callable[[Weights], None]
"""Checks the opened source before anything is written; raises."""

Check = Callable[[Weights, Weights, Path], str]
"""Compares the source, the written weights, opened anew, and their folder; returns a line for the report, or raises."""


def convert(
    source: tuple[str, Path],
    target: tuple[str, Path],
    *,
    opened: Weights | None = None,
    dtype: torch.dtype | None = None,
    weights: str = "model",
    num_attention_heads: int | None = None,
    phi_order: str | None = None,
    text_cleaning: str | None = None,
    keep_non_finite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    verify: bool = False,
    extra_bytes: int = 0,
    adapter: Adapter | None = None,
    adapter_scale: float = 1.0,
    on_open: OnOpen | None = None,
    finish: Finish | None = None,
    check: Check | None = None,
    on_start: Callable[[str, int], None] | None = None,
    on_bytes: OnBytes | None = None,
) -> Converted:
    """Convert the weights of a model.

    Args:
        source: format and path to read.
        target: format and path of the folder to write.
        opened: the source, if it is open already; the next five belong to opening it.
        dtype: of all tensors written; None keeps each tensor's own.
        weights: ``model`` or ``ema``.
        num_attention_heads: for sources that do not state it.
        phi_order: likewise.
        text_cleaning: to record with the model; None keeps what the source records.
        keep_non_finite: convert values that are NaN or infinite like others, in place of refusing them.
        max_shard_bytes: largest file, in bytes of tensors; formats of one file ignore it.
        overwrite: replace an earlier output of the target's format.
        verify: before publishing, read both sides again and compare every tensor.
        extra_bytes: bytes that ``finish`` will add.
        adapter: to merge into the source's weights.
        adapter_scale: factor of its pairs.
        on_open: called with the opened source before anything is written.
        finish: called with the written folder before it is published.
        check: called after the comparison, if ``verify``.
        on_start: called with the name of a phase and its number of bytes, when it begins.
        on_bytes: called with the number of bytes written or compared, after each tensor.

    Raises:
        UserError: the source is missing or damaged, the target exists, the disk is full or too small, or verifying
            found a difference. Then nothing stands under the target's name, and an earlier output there is unchanged.
    """
    source = source_with_format(*source)
    write = format_named(target[0])
    for read in (source[1], *(() if adapter is None else (adapter.path,))):
        require_apart(read, target[1])
    _check_target(target[1], write, overwrite)
    if opened is None:
        options = ReadOptions(
            dtype=dtype, weights=weights, num_attention_heads=num_attention_heads, phi_order=phi_order,
            keep_non_finite=keep_non_finite, assume=adapter.config if adapter else None,
        )
        opened = open_weights(*source, options) if adapter is None else _open_base(source, options, adapter)
    if adapter is not None:
        opened = MergedWeights(opened, adapter, adapter_scale)
    if text_cleaning is not None:
        opened.config = dataclasses.replace(opened.config, text_cleaning=text_cleaning)
    if write.require is not None:
        write.require(opened.config)
    if on_open is not None:
        on_open(opened)
    if write.one_file:
        max_shard_bytes = sys.maxsize
        _use_one_dtype(opened)
    total = opened.total_bytes()
    require_space(target[1], total + extra_bytes + _OVERHEAD_BYTES, "the conversion")
    if on_start is not None:
        on_start("convert", total)
    digests: Mapping[str, str] = {}
    forward = ""
    with staged_folder(target[1], overwrite=overwrite) as folder:
        write.write(folder, opened, max_shard_bytes, on_bytes)
        if finish is not None:
            finish(folder, opened)
        if verify:
            if on_start is not None:
                on_start("verify", total)
            # Both sides are read anew, from the files alone.
            written = write.open(folder, ReadOptions(keep_non_finite=opened.options.keep_non_finite))
            digests = require_equal_weights(opened, written, on_bytes)
            forward = check(opened, written, folder) if check is not None else ""
    report = make_report(
        source, target, opened, write.names(opened.config), write.caveats(opened.config), digests, forward
    )
    return Converted(
        config=opened.config, parameters=parameter_count(opened.config), bytes=total, report=report
    )


def open_weights(format_name: str, path: Path, options: ReadOptions) -> Weights:
    """Open the weights at a path, in any format.

    Args:
        format_name: a format's, or ``auto`` for the one that is recognised.
        path: file or folder.
        options: what to read, and what the files may leave open.

    Raises:
        UserError: as the format's own ``open``; or names the right format, where the path is in another one.
    """
    format_name, path = source_with_format(format_name, path)
    opened = format_named(format_name)
    try:
        weights = opened.open(path, options)
        if format_name == "megatron":
            weights.origin = format_name, weights.source
        else:
            weights.origin = format_name, newest_iteration(path) if path.is_dir() else path
        return weights
    except UserError as error:
        found = recognise_format(path)
        if found is None or found == format_name or FORMATS[found].column == opened.column != "":
            raise
        raise CheckpointError(
            f"{path} is in the format {found}, not {format_name}; give {found} in its place, or {AUTO}"
        ) from error


def _open_base(source: tuple[str, Path], options: ReadOptions, adapter: Adapter) -> Weights:
    try:
        return open_weights(*source, options)
    except CheckpointError:
        if not adapter.base_fingerprint or options.weights == "model":
            raise
        # An export of averaged weights holds no other set; the fingerprint tells whether it is the base.
        return open_weights(*source, dataclasses.replace(options, weights="model"))


def source_with_format(format_name: str, path: Path) -> tuple[str, Path]:
    """A source whose format is named: the one that is recognised in place of ``auto``.

    Raises:
        UserError: none is recognised, or the source is a folder of two models.
    """
    pair = find_pair(path)
    if pair is not None:
        raise CheckpointError(
            f"{path} holds two models, the experts for high and for low noise; give both, --from {pair.form} "
            f"{pair.high} --low-noise {pair.low}, or one of them: {pair.high} or {pair.low}"
        )
    return (require_format(path) if format_name == AUTO else format_name), path


def format_named(name: str) -> Format:
    """Find a format by its name on the command line.

    Raises:
        ConfigError: no format has that name.
    """
    if name not in FORMATS:
        raise ConfigError(f"format {name!r} is not available; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def _use_one_dtype(weights: Weights) -> None:
    """Have weights of mixed precision, such as a bf16 run's, read as fp32, which holds all of their values."""
    if len({weights.dtype(name) for name in weights.names}) > 1:
        weights.options = dataclasses.replace(weights.options, dtype=torch.float32)
        weights.notes += ("the format's readers take one dtype: wrote float32 (--dtype bfloat16 halves the file)",)


def require_apart(source: Path, target: Path) -> None:
    """Refuse a target that is, holds or lies in the source, or that names a file.

    Raises:
        ConfigError: names both.
    """
    inner, outer = source.resolve(), target.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise ConfigError(f"source {source} and target {target}: neither may lie in the other; choose another target")
    if target.suffix in (".pt", ".pth", ".safetensors"):
        raise ConfigError(f"{target} must be a folder, of safetensors and JSON files; leave out {target.suffix}")


def _check_target(target: Path, write: Format, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{target} exists; choose another path, or give --overwrite")
    if not (target.is_dir() and write.is_ours(target)):
        # A mistyped path must not cost a training run or a home folder.
        raise CheckpointError(f"{target} is not an earlier conversion to this format; choose another path")
