"""The adapter that a new run's pairs start from: an earlier run's, or a file of another program."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_flashi2v.checkpoint.adapter_record import AdapterRecord
from megatron_flashi2v.checkpoint.adapter_table import FACTORS, adapter_mappings
from megatron_flashi2v.checkpoint.key_table import Mapped, parameter_shapes
from megatron_flashi2v.checkpoint.peers import Peers
from megatron_flashi2v.config.adapter import LINEARS, AdapterConfig
from megatron_flashi2v.config.errors import CheckpointError, UserError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.conversion.adapters.adapter import Adapter
from megatron_flashi2v.conversion.adapters.reading import open_adapter
from megatron_flashi2v.conversion.sources import SourceTensor
from megatron_flashi2v.conversion.weights import listed
from megatron_flashi2v.models.weight_shards import WeightShard


@dataclass(frozen=True, kw_only=True)
class InitialAdapter:
    """What a run's trained tensors start from.

    Attributes:
        path: where it was found.
        tensors: by our name: A and B of each pair, and tensors that were trained whole.
        missing: linears whose pairs it lacks, which start as drawn.
    """

    path: Path
    tensors: Mapping[str, SourceTensor]
    missing: tuple[str, ...]

    @property
    def summary(self) -> str:
        """One line for the log."""
        missing = f"; {len(self.missing)} pairs start as drawn ({listed(self.missing)})" if self.missing else ""
        return f"adapters start from {self.path}{missing}"


def open_initial_adapter(path: Path, model: ModelConfig, record: AdapterRecord, peers: Peers) -> InitialAdapter:
    """Open an adapter, and read it once, to see that a run can start from it; collective.

    Args:
        path: as for :func:`conversion.adapters.reading.open_adapter`.
        model: the run's.
        record: what the run trains, beside which base.
        peers: all ranks.

    Raises:
        UserError: the same on all ranks: it is damaged, another one on some of them, or this run's adapters cannot
            start from it; says what to give instead.
    """
    doing, digest, error = "reading --load-adapter", "", None
    initial = InitialAdapter(path=path, tensors={}, missing=())
    try:
        initial, digest = _open(path, model, record)
    except (UserError, OSError) as caught:
        error = caught
    peers.agree(error, doing)
    if digest != peers.share(digest):
        error = CheckpointError(f"{path} holds another adapter here than on rank 0; give all nodes the same")
    peers.agree(error, doing)
    return initial


def load_initial_adapter(initial: InitialAdapter, shards: Iterable[WeightShard]) -> None:
    """Fill this rank's trained weights in place from those that the adapter has.

    Args:
        initial: from :func:`open_initial_adapter`.
        shards: this rank's.

    Raises:
        CheckpointError: a file is damaged.
    """
    for shard in shards:
        tensor = initial.tensors.get(shard.name)
        if tensor is not None and shard.data.numel():
            shard.data.copy_(shard.part_of(tensor.read(shard.box.slices).to(shard.data.dtype)))


def _open(path: Path, model: ModelConfig, record: AdapterRecord) -> tuple[InitialAdapter, str]:
    """The adapter, and a hash of its values."""
    assert record.adapter is not None, "by the rules of flags"
    found = open_adapter(path)
    if found.low_noise and found.pairs:
        raise CheckpointError(f"{path} is for a pair of experts; give the file of the one that is trained")
    if found.low_noise:  # one expert's own file
        found = dataclasses.replace(found, pairs=found.low_noise, low_noise={})
    if found.base_fingerprint and found.base_fingerprint != record.base_fingerprint:
        beside = dataclasses.replace(record, base=found.base, base_weights=found.base_weights)
        raise CheckpointError(
            f"{path} was trained beside {found.base}, and this run's base has other values; give {beside.base_flags}"
        )
    halves = _halves(model, record.adapter)
    layers = tuple(dict.fromkeys(map(_layer, halves)))
    _require_room(found, layers, model, record.adapter)
    tensors = _whole_tensors(found, model, record)
    for layer, pair in found.pairs.items():
        for factor, tensor in zip(FACTORS, pair.tensors, strict=True):
            entry = halves[f"{layer}.{factor}.weight"]
            _require_shape(path, tensor, entry.shape)
            tensors[entry.ours] = tensor
    missing = tuple(layer for layer in layers if layer not in found.pairs)
    return InitialAdapter(path=path, tensors=tensors, missing=missing), _hash_of_finite(path, tensors)


def _halves(model: ModelConfig, adapter: AdapterConfig) -> dict[str, Mapped]:
    """A and B of every pair, by Wan's name."""
    return {entry.external[0]: entry for entry in adapter_mappings(model, adapter, "wan")}


def _whole_tensors(found: Adapter, model: ModelConfig, record: AdapterRecord) -> dict[str, SourceTensor]:
    """What was trained whole, by our name; refuses what the run would lose."""
    shapes = parameter_shapes(model)
    for name, tensor in found.whole.items():
        if name not in shapes:
            kind = found.config.conditioning if found.config else "another"
            raise CheckpointError(f"{found.path} is of a {kind} model and trained {name}, which this run has not")
        if name not in record.trained:
            raise CheckpointError(
                f"{found.path} trained {name} whole, and this run leaves it frozen; let --train-only find it"
            )
        _require_shape(found.path, tensor, shapes[name])
    return dict(found.whole)


def _hash_of_finite(path: Path, tensors: Mapping[str, SourceTensor]) -> str:
    """A hash of all values, none of which is NaN or infinite."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.read().float().contiguous()
        if not bool(values.isfinite().all()):
            raise CheckpointError(
                f"{path}: tensor {tensor.name} holds values that are NaN or infinite; use another copy"
            )
        digest.update(name.encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _layer(half: str) -> str:
    return half.rpartition(".lora_")[0]


def _require_room(found: Adapter, layers: tuple[str, ...], model: ModelConfig, adapter: AdapterConfig) -> None:
    """Refuse pairs of other linears, ranks or alphas than the run's: they would be lost, or count otherwise."""
    outside = [layer for layer in found.pairs if layer not in layers]
    if outside:
        possible = set(map(_layer, _halves(model, dataclasses.replace(adapter, targets=LINEARS))))
        targets = {*adapter.targets, *(layer.split(".", 2)[-1] for layer in outside)}
        step = (
            f"give --lora-targets {' '.join(name for name in LINEARS if name in targets)}" if possible >= {*outside}
            else "it is for another model, or must be merged into its base (flashi2v convert --adapter --merge)"
        )
        raise CheckpointError(
            f"{found.path} has pairs of {listed(outside)}, which this run's adapters have not; {step}"
        )
    sizes = sorted({(pair.rank, pair.alpha) for pair in found.pairs.values()})
    if len(sizes) > 1 or any(alpha <= 0 for _, alpha in sizes):
        shown = ", ".join(f"{rank} and {alpha:g}" for rank, alpha in sizes[:4])
        raise CheckpointError(
            f"{found.path} has pairs of these ranks and alphas: {shown}; a run has one of each, above 0: merge it into "
            "its base (flashi2v convert --adapter --merge), and train beside that"
        )
    if sizes and sizes != [(adapter.rank, adapter.alpha)]:
        rank, alpha = sizes[0]
        raise CheckpointError(
            f"{found.path} has rank {rank} and alpha {alpha:g}, this run's adapters have {adapter.rank} and "
            f"{adapter.alpha:g}; give --lora-rank {rank} --lora-alpha {alpha!r}"
        )


def _require_shape(path: Path, tensor: SourceTensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise CheckpointError(
            f"{path} is for another model: tensor {tensor.name} has shape {list(tensor.shape)}, and this run's has "
            f"{list(shape)}"
        )
