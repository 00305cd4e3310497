"""Runs that train a part of the weights: which part, of which base, and the same again when they resume."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from megatron_flashi2v.checkpoint.adapter_record import AdapterRecord, read_adapter_record
from megatron_flashi2v.checkpoint.adapter_table import adapter_shapes
from megatron_flashi2v.checkpoint.key_table import mappings, parameter_count
from megatron_flashi2v.checkpoint.peers import Peers
from megatron_flashi2v.config.adapter import AdapterConfig
from megatron_flashi2v.config.errors import CheckpointError, ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.conversion.base_fingerprint import common_fingerprint
from megatron_flashi2v.conversion.initial_weights import InitialWeights
from megatron_flashi2v.models.placement import ADAPTER
from megatron_flashi2v.models.spec import ModelSpec
from megatron_flashi2v.models.transformer import DiffusionTransformer


def adapter_record(config: TrainConfig, spec: ModelSpec, initial: InitialWeights, peers: Peers) -> AdapterRecord:
    """What a run trains of its model, and of which base; collective.

    Tensors that the base does not give whole are trained whole: frozen, they would stay as they were drawn.

    Args:
        config: flags and recipe, checked.
        spec: of the stages, with their adapters.
        initial: the base.
        peers: all ranks.

    Raises:
        UserError: --train-only finds no tensor, all, or a part of a fused one; or the base cannot be read, or is not
            the same on all ranks.
    """
    given, picked = initial.given_whole, picked_tensors(config.adapter.train_only, spec.config)
    # A run's folder may hold newer weights by the time that they are looked for again. Links stay: in a cache of the
    # Hub the file behind one has neither its name nor its configuration beside it.
    name, path = initial.weights.origin
    return AdapterRecord(
        adapter=spec.adapter,
        trained=tuple(row.ours for row in mappings(spec.config, "wan") if row.ours in picked or row.ours not in given),
        base=f"{name}:{path.absolute()}",
        base_weights=config.checkpoint.load_weights_kind,
        base_fingerprint=common_fingerprint(initial.weights, peers),
        train_only=config.adapter.train_only,
    )


def picked_tensors(pattern: str | None, model: ModelConfig) -> frozenset[str]:
    """Our names of the tensors in whose name, ours or Wan's, a regular expression is found.

    Raises:
        ConfigError: it finds none, all, or a part of a fused one.
    """
    if pattern is None:
        return frozenset()
    picked, rows = set(), list(mappings(model, "wan"))
    for row in rows:
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
    if len(picked) == len(rows):
        raise ConfigError(
            f"--train-only {pattern!r} is found in all {len(rows)} tensors' names and leaves nothing frozen; name a "
            "part, or leave it out, with --lora-rank, to train the whole model"
        )
    return frozenset(picked)


def training_of(record: AdapterRecord, model: ModelConfig) -> str:
    """One line on what a run trains."""
    trained, pairs = sum(map(math.prod, record.shapes(model).values())), adapter_shapes(model, record.adapter)
    total = parameter_count(model) + sum(map(math.prod, pairs.values()))
    parts = []
    if record.adapter is not None:
        adapter = record.adapter
        parts.append(f"rank {adapter.rank}, alpha {adapter.alpha:g}, targets {', '.join(adapter.targets)}")
    if record.trained:
        parts.append(f"whole: {_listed(record.trained)}")
    return f"training {trained:,} of {total:,} values: {'; '.join(parts)}"


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
            f"{folder} was trained beside other weights than {now.base_flags}: their fingerprint is "
            f"{there.base_fingerprint[:16]}..., this one's {now.base_fingerprint[:16]}...; give {there.base_flags}"
        )


def _flags(record: AdapterRecord) -> str:
    """What a run that goes on must be given."""
    flags = [] if record.adapter is None else [_lora_flags(record.adapter)]
    if record.train_only is not None:
        flags.append(f"--train-only {shlex.quote(record.train_only)}")
    return " ".join((*flags, record.base_flags))


def _lora_flags(adapter: AdapterConfig) -> str:
    targets = " ".join(adapter.targets)
    return f"--lora-rank {adapter.rank} --lora-alpha {adapter.alpha!r} --lora-targets {targets}"


def _described(record: AdapterRecord) -> str:
    parts = [] if record.adapter is None else [_lora_flags(record.adapter)]
    if record.trained:
        parts.append(f"{_listed(record.trained)} trained whole")
    return " and ".join(parts)


def _listed(names: Sequence[str]) -> str:
    few = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} tensors ({few})"
