"""The adapter that a new run's pairs start from: an earlier run's, or a file of another program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_flashi2v.checkpoint.adapter_record import AdapterRecord
from megatron_flashi2v.checkpoint.adapter_table import FACTORS, adapter_mappings
from megatron_flashi2v.checkpoint.key_table import Mapped, parameter_shapes
from megatron_flashi2v.config.adapter import LINEARS, AdapterConfig
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.conversion.adapters.adapter import Adapter, require_finite
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


def open_initial_adapter(path: Path, model: ModelConfig, record: AdapterRecord) -> InitialAdapter:
    """Open an adapter, and read it once, to see that a run can start from it.

    Args:
        path: as for :func:`conversion.adapters.reading.open_adapter`.
        model: the run's.
        record: what the run trains, beside which base.

    Raises:
        CheckpointError: it is damaged, or this run's adapters cannot start from it; says what to give instead.
    """
    adapter = record.adapter
    assert adapter is not None, "by the rules of flags"
    found = open_adapter(path)
    if found.low_noise:
        raise CheckpointError(
            f"--load-adapter {path} is for a pair of experts; give the file of the one that is trained"
        )
    if found.base_fingerprint and found.base_fingerprint != record.base_fingerprint:
        raise CheckpointError(
            f"--load-adapter {path} was trained beside {found.base}, and this run's base has other values; give that "
            "as --load-weights"
        )
    halves = {entry.external[0]: entry for entry in adapter_mappings(model, adapter, "wan")}
    layers = tuple(dict.fromkeys(map(_layer, halves)))
    _require_room(found, layers, adapter)
    shapes, tensors = parameter_shapes(model), dict[str, SourceTensor]()
    for name, tensor in found.whole.items():
        if name not in record.trained:
            raise CheckpointError(
                f"--load-adapter {path} trained {name} whole, and this run leaves it frozen; let --train-only find it"
            )
        _require_shape(path, tensor, shapes[name])
        tensors[name] = tensor
    for layer, pair in found.pairs.items():
        for factor, tensor in zip(FACTORS, pair.tensors, strict=True):
            entry: Mapped = halves[f"{layer}.{factor}.weight"]
            _require_shape(path, tensor, entry.shape)
            tensors[entry.ours] = tensor
    require_finite(found)
    return InitialAdapter(
        path=path, tensors=tensors, missing=tuple(layer for layer in layers if layer not in found.pairs)
    )


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


def _layer(half: str) -> str:
    return half.rpartition(".lora_")[0]


def _require_room(found: Adapter, layers: tuple[str, ...], adapter: AdapterConfig) -> None:
    """Refuse pairs of other linears, ranks or alphas than the run's: they would be lost, or count otherwise."""
    outside = [layer for layer in found.pairs if layer not in layers]
    if outside:
        targets = {layer.split(".", 2)[-1] for layer in outside}
        if not targets.isdisjoint(adapter.targets):
            step = "it is for a deeper model"
        elif targets <= {*LINEARS}:
            step = f"give --lora-targets {' '.join(name for name in LINEARS if name in {*targets, *adapter.targets})}"
        else:
            step = "merge it into its base (flashi2v convert --adapter --merge), and train beside that"
        raise CheckpointError(
            f"--load-adapter {found.path} has pairs of {listed(outside)}, which this run's adapters have not; {step}"
        )
    sizes = sorted({(pair.rank, pair.alpha) for pair in found.pairs.values()})
    if len(sizes) > 1:
        shown = ", ".join(f"{rank} and {alpha:g}" for rank, alpha in sizes[:4])
        raise CheckpointError(
            f"--load-adapter {found.path} has pairs of several ranks and alphas ({shown}), and a run has one of each; "
            "merge it into its base (flashi2v convert --adapter --merge), and train beside that"
        )
    if sizes and sizes != [(adapter.rank, adapter.alpha)]:
        rank, alpha = sizes[0]
        raise CheckpointError(
            f"--load-adapter {found.path} has rank {rank} and alpha {alpha:g}, this run's have {adapter.rank} and "
            f"{adapter.alpha:g}; give --lora-rank {rank} --lora-alpha {alpha!r}"
        )


def _require_shape(path: Path, tensor: SourceTensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise CheckpointError(
            f"--load-adapter {path} is for another model: tensor {tensor.name} has shape {list(tensor.shape)}, and "
            f"this run's has {list(shape)}"
        )
