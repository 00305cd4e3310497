"""Runs that train a part of the weights: which part, of which base, and the same again when they resume."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from megatron_flashi2v.checkpoint.adapter_record import AdapterRecord, read_adapter_record
from megatron_flashi2v.checkpoint.key_table import mappings
from megatron_flashi2v.config.adapter import AdapterConfig
from megatron_flashi2v.config.errors import CheckpointError, ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.conversion.base_fingerprint import base_fingerprint
from megatron_flashi2v.conversion.initial_weights import InitialWeights
from megatron_flashi2v.models.placement import ADAPTER
from megatron_flashi2v.models.spec import ModelSpec
from megatron_flashi2v.models.transformer import DiffusionTransformer

logger = logging.getLogger(__name__)


def adapter_record(config: TrainConfig, spec: ModelSpec, initial: InitialWeights) -> AdapterRecord:
    """What a run trains of its model, and of which base.

    Tensors that the base does not give whole are trained whole: frozen, they would stay as they were drawn.

    Args:
        config: flags and recipe, checked.
        spec: of the stages, with their adapters.
        initial: the base.

    Raises:
        UserError: --train-only finds no tensor, or a part of a fused one; or the base cannot be read.
    """
    source = config.checkpoint.load_weights_source
    assert source is not None
    given, picked = initial.given_whole, picked_tensors(config.adapter.train_only, spec.config)
    # A run's folder may hold newer weights by the time that they are looked for again.
    name, path = source[0], initial.weights.source if source[0] == "megatron" else source[1]
    record = AdapterRecord(
        adapter=spec.adapter,
        trained=tuple(row.ours for row in mappings(spec.config, "wan") if row.ours in picked or row.ours not in given),
        base=f"{name}:{path.resolve()}",
        base_weights=config.checkpoint.load_weights_kind,
        base_fingerprint=base_fingerprint(initial.weights),
    )
    logger.info("training %s; the rest of %s stays frozen (fingerprint %s...)", _described(record), record.base,
                record.base_fingerprint[:16])
    return record


def picked_tensors(pattern: str | None, model: ModelConfig) -> frozenset[str]:
    """Our names of the tensors in whose name, ours or Wan's, a regular expression is found.

    Raises:
        ConfigError: it finds none, or a part of a fused one.
    """
    if pattern is None:
        return frozenset()
    picked = set()
    for row in mappings(model, "wan"):
        found = [name for name in row.external if re.search(pattern, name)]
        if re.search(pattern, row.ours) or len(found) == len(row.external):
            picked.add(row.ours)
        elif found:
            raise ConfigError(
                f"--train-only {pattern!r} finds {', '.join(found)}, which is one tensor with "
                f"{', '.join(name for name in row.external if name not in found)} here ({row.ours}); let it find all "
                "of them, or none"
            )
    if not picked:
        raise ConfigError(
            f"--train-only {pattern!r} is found in no tensor's name; names are ours, such as "
            "blocks.0.norm_cross.weight, or Wan's, such as blocks.0.norm3.weight"
        )
    return frozenset(picked)


def freeze(stages: Iterable[DiffusionTransformer], trained: Collection[str]) -> None:
    """Let gradients flow to these tensors and the adapters alone."""
    for stage in stages:
        for name, parameter in stage.named_parameters():
            parameter.requires_grad_(name in trained or ADAPTER.fullmatch(name) is not None)


def require_same_part(folder: Path, now: AdapterRecord | None) -> None:
    """Refuse to go on from a checkpoint of other weights than this run trains, or beside another base.

    Args:
        folder: the checkpoint.
        now: of this run; None if it trains all weights.

    Raises:
        CheckpointError: says what to give instead.
    """
    there = read_adapter_record(folder)
    if now is None and there is None:
        return
    if there is None:
        raise CheckpointError(
            f"{folder} is of a run that trained all weights; to train a part of them, start a new run with "
            f"--load-weights megatron:{folder} and another --save"
        )
    if now is None:
        raise CheckpointError(
            f"{folder} is of a run that trained a part of the weights of {there.base}; give {_flags(there)}"
        )
    if (there.adapter, there.trained) != (now.adapter, now.trained):
        raise CheckpointError(
            f"{folder} was trained with {_described(there)}, and this run has {_described(now)}; go on as it was "
            "trained, or choose another --save"
        )
    if there.base_fingerprint != now.base_fingerprint:
        raise CheckpointError(
            f"{folder} was trained beside other weights than --load-weights {now.base}: their fingerprint is "
            f"{there.base_fingerprint[:16]}..., this one's {now.base_fingerprint[:16]}...; give those of {there.base}"
        )


def _flags(record: AdapterRecord) -> str:
    """What a run that goes on must be given."""
    flags = [f"--load-weights {record.base}"]
    if record.adapter is not None:
        flags.insert(0, f"{_lora_flags(record.adapter)}")
    if record.trained:
        flags.append("--train-only as at its start")
    return " ".join(flags)


def _lora_flags(adapter: AdapterConfig) -> str:
    targets = " ".join(adapter.targets)
    return f"--lora-rank {adapter.rank} --lora-alpha {adapter.alpha:g} --lora-targets {targets}"


def _described(record: AdapterRecord) -> str:
    parts = [] if record.adapter is None else [_lora_flags(record.adapter)]
    if record.trained:
        few = ", ".join(record.trained[:3]) + (", ..." if len(record.trained) > 3 else "")
        parts.append(f"{len(record.trained)} tensors trained whole ({few})")
    return " and ".join(parts)
