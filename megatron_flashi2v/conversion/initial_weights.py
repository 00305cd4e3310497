"""Initial weights of a new run, in any format: each rank reads its own parts of the tensors."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path

import torch

from megatron_flashi2v.checkpoint.adapter_record import AdapterRecord
from megatron_flashi2v.checkpoint.folders import require_same_model
from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.checkpoint.peers import Peers
from megatron_flashi2v.conditioning.build import BASE, paradigm_fields, paradigm_of
from megatron_flashi2v.config.errors import CheckpointError, UserError
from megatron_flashi2v.config.model import FREE_OF_WEIGHTS, ModelConfig
from megatron_flashi2v.conversion.base_fingerprint import base_fingerprint
from megatron_flashi2v.conversion.convert import open_weights
from megatron_flashi2v.conversion.recognition import find_pair
from megatron_flashi2v.conversion.weights import ReadOptions, Weights
from megatron_flashi2v.models.weight_shards import WeightShard

PATCH_WEIGHT = "patch_embedding.weight"

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """Initial weights, and which tensors of the run's model they cover.

    Attributes:
        weights: opened, not read.
        model: the run's.
        missing: tensors of the run's model without a counterpart, which stay as initialised.
        unexpected: tensors without a counterpart in the run's model, which are left out.
    """

    weights: Weights
    model: ModelConfig
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def given_whole(self) -> frozenset[str]:
        """Tensors of the run's model whose every value they have; of the others some or all stay as initialised."""
        have, want = parameter_shapes(self.weights.config), parameter_shapes(self.model)
        return frozenset(name for name, shape in want.items() if have.get(name) == shape)

    @property
    def summary(self) -> str:
        """One line for the log."""
        parts = [f"starting from the weights of {self.weights.source} ({self.weights.config.conditioning})"]
        if self.missing:
            missing = ", ".join(self.missing)
            parts.append(f"{len(self.missing)} tensors are missing and start as initialised ({missing})")
        if self.unexpected:
            unexpected = ", ".join(self.unexpected)
            parts.append(f"{len(self.unexpected)} are unexpected and left out ({unexpected})")
        return "; ".join((*parts, *self.weights.notes))


def open_initial_weights(
    source: tuple[str, Path], model: ModelConfig, weights: str = "model", peers: Peers | None = None,
    flag: str = "--load-weights",
) -> InitialWeights:
    """Open initial weights and compare them with the run's model.

    Weights of the run's own paradigm suit it, and those of others from which its class can start.

    Args:
        source: format and path.
        model: the run's; it gives the heads and phi's order where the source does not state them.
        weights: ``model`` or ``ema``.
        peers: ranks that open them together; None for this process alone.
        flag: that named the source, for messages.

    Raises:
        UserError: the source is missing or damaged, of another paradigm or other widths, or a folder of two models.
    """
    pair = find_pair(source[1])
    if pair is not None:
        raise CheckpointError(
            f"{source[1]} holds two models, the experts for high and for low noise; give one of them: {flag} "
            f"{pair.form}:{pair.high} or {flag} {pair.form}:{pair.low}"
        )
    opened = open_weights(*source, ReadOptions(weights=weights, assume=model, peers=peers))
    found = opened.config
    paradigm, run = paradigm_of(found), paradigm_of(model)
    meaningful: tuple[str, ...] = ()
    conditioning, compared = model.conditioning, found
    if paradigm is run:
        meaningful = run.meaningful_fields(found)
    else:  # only the backbone's weights are taken over
        conditioning = BASE.name
        if run.starts_from(paradigm, found):
            compared = dataclasses.replace(found, conditioning=BASE.name)
            meaningful = tuple(set(run.meaningful_fields(model)) & set(paradigm.meaningful_fields(found)))
    # Fields that shape no weight that is taken over may differ.
    free = (*FREE_OF_WEIGHTS, *(field for field in paradigm_fields() if field not in meaningful))
    wanted = {name: getattr(compared, name) for name in free}
    require_same_model(compared, dataclasses.replace(model, conditioning=conditioning, **wanted), source[1])
    have, want = parameter_shapes(found), parameter_shapes(model)
    return InitialWeights(
        weights=opened,
        model=model,
        missing=tuple(name for name in want if name not in have),
        unexpected=tuple(name for name in have if name not in want),
    )


def find_base(
    folder: Path, record: AdapterRecord, source: tuple[str, Path] | None = None, flag: str = "--base"
) -> tuple[str, Path]:
    """Format and path of the weights beside which a checkpoint was trained; they are there.

    Args:
        folder: the checkpoint, for messages.
        record: of what it holds.
        source: format and path of the base; by default where it was in training.
        flag: that names the base, for messages.

    Raises:
        CheckpointError: they are not.
    """
    if source is None:
        name, _, path = record.base.partition(":")
        source = name, Path(path)
    if not source[1].exists():
        raise CheckpointError(
            f"{folder} was trained beside {record.base}, and {source[1]} does not exist; give these weights as {flag} "
            "FORMAT:PATH"
        )
    return source


def open_base(
    folder: Path, record: AdapterRecord, model: ModelConfig, source: tuple[str, Path] | None = None,
    flag: str = "--base",
) -> InitialWeights:
    """Open the weights beside which a checkpoint was trained.

    Args:
        folder: the checkpoint, for messages.
        record: of what it holds.
        model: of the checkpoint.
        source: as for :func:`find_base`. Averaged weights may have been converted: then they are another place's own.
        flag: likewise.

    Raises:
        UserError: the base is missing or damaged, or other weights are found.
    """
    name, place = find_base(folder, record, source, flag)
    found = ""
    for kind in dict.fromkeys((record.base_weights if source is None else "model", record.base_weights)):
        try:
            base = open_initial_weights((name, place), model, kind, flag=flag)
        except UserError:
            if kind == "model":
                raise
            break
        found = base_fingerprint(base.weights)
        if found == record.base_fingerprint:
            return base
    raise CheckpointError(
        f"{folder} was trained beside other weights than {name}:{place}: their fingerprint is "
        f"{record.base_fingerprint[:16]}..., this one's {found[:16]}...; give those of {record.base} as {flag} "
        "FORMAT:PATH"
    )


def load_initial_weights(initial: InitialWeights, shards: Iterable[WeightShard]) -> None:
    """Fill this rank's weights in place from those that cover them; it holds one more tensor at a time.

    Leaves the patch embedding's columns for channels that the run's paradigm adds.

    Args:
        initial: from :func:`open_initial_weights`.
        shards: this rank's.

    Raises:
        CheckpointError: a file is damaged.
    """
    shapes = parameter_shapes(initial.weights.config)
    for shard in shards:
        name, box = shard.name, shard.box
        if name not in shapes or shard.data.numel() == 0:
            continue
        if name == PATCH_WEIGHT and box.global_shape != shapes[name]:
            columns = shapes[name][1]
            covered = torch.zeros(box.shape, dtype=torch.bool)
            covered[:, :columns] = True
            values = torch.zeros(box.shape, dtype=shard.data.dtype)
            values[:, :columns] = initial.weights.read(name, (box.slices[0], slice(0, columns)), shard.data.dtype)
            device = shard.data.device
            chosen, given = shard.part_of(covered).to(device), shard.part_of(values).to(device)
            shard.data.copy_(torch.where(chosen, given, shard.data))
        else:
            shard.data.copy_(shard.part_of(initial.weights.read(name, box.slices, shard.data.dtype)))
