"""A base model and an adapter as one model: W + s (alpha / r) B A for each pair, in fp32."""

from __future__ import annotations

import dataclasses
import math

import torch

from megatron_flashi2v.checkpoint.arrangements import Box
from megatron_flashi2v.checkpoint.key_table import Mapped, mappings, parameter_shapes
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.conversion.adapters.adapter import Adapter, require_finite
from megatron_flashi2v.conversion.base_fingerprint import base_fingerprint
from megatron_flashi2v.conversion.sources import box_shape, whole_box
from megatron_flashi2v.conversion.weights import Weights, listed


class MergedWeights(Weights):
    """The weights of a base with an adapter: its pairs added, its whole tensors in place of the base's.

    Args:
        base: opened, in any format.
        adapter: of this model alone; pairs of an expert for low noise without any other are this model's.
        scale: factor of every pair.

    Raises:
        CheckpointError: the adapter is for another base, or for a pair of experts, or holds NaN.
    """

    def __init__(self, base: Weights, adapter: Adapter, scale: float = 1.0) -> None:
        notes = base.notes
        if adapter.low_noise and not adapter.pairs:  # that expert's own file
            adapter = dataclasses.replace(adapter, pairs=adapter.low_noise, low_noise={})
            notes += (f"{adapter.path} is for the expert for low noise alone; took {base.source} for that expert",)
        self.config = adapter.config or base.config
        self.source, self.options, self.non_finite = base.source, base.options, base.non_finite
        self.facts = adapter.facts or base.facts
        self._base, self._adapter, self._scale = base, adapter, scale
        layers = {
            _layer(name): entry
            for entry in mappings(self.config, "wan") if entry.ours.endswith(".weight") for name in entry.external
        }  # fmt: skip
        _require_fit(adapter, base, layers)
        require_finite(adapter)
        self._changed = {layers[layer].ours: layers[layer] for layer in adapter.pairs}
        self.names = {
            name: (adapter.whole[name].name,) if name in adapter.whole else base.names[name]
            for name in parameter_shapes(self.config)
        }
        used = {external for name in self.names if name not in adapter.whole for external in base.names[name]}
        dropped = (external for externals in base.names.values() for external in externals if external not in used)
        self.left_out = (*base.left_out, *dropped)
        what = f"{len(adapter.pairs)} pairs and {len(adapter.whole)} whole tensors"
        self.notes = (*notes, f"merged {what} of {adapter.path}, pairs at scale {scale:g}")

    def stored_dtypes(self, name: str) -> tuple[torch.dtype, ...]:
        whole = self._adapter.whole.get(name)
        return self._base.stored_dtypes(name) if whole is None else (whole.stored_dtype,)

    def own_dtype(self, name: str) -> torch.dtype:
        whole = self._adapter.whole.get(name)
        return self._base.own_dtype(name) if whole is None else whole.stored_dtype

    def read(self, name: str, box: Box | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        dtype = dtype or self.dtype(name)
        whole, entry = self._adapter.whole.get(name), self._changed.get(name)
        if whole is None and entry is None:
            return self._base.read(name, box, dtype)
        values = whole.read(box) if whole else self._base.read(name, box, torch.float32)
        if entry is not None:
            values = values.float().add_(self._difference(entry, whole_box(entry.shape) if box is None else box))
        return self.converted(name, f"{self.source} with {self._adapter.path}: tensor {name}", values, dtype)

    def _difference(self, entry: Mapped, box: Box) -> torch.Tensor:
        """What the pairs add to a box of one of our tensors, fp32."""

        def read(name: str, part: Box) -> torch.Tensor:
            pair = self._adapter.pairs.get(_layer(name))
            if pair is None:
                return torch.zeros(box_shape(part))
            columns = (slice(None), *part[1:])
            return pair.product(part[0]).unflatten(1, entry.external_shape[1:])[columns]

        return entry.read(read, box).mul_(self._scale)


def _layer(weight: str) -> str:
    return weight.removesuffix(".weight")


def _require_fit(adapter: Adapter, base: Weights, layers: dict[str, Mapped]) -> None:
    """Compare layers, shapes and the recorded base; one message tells what is amiss."""
    config, other = base.config, f"{adapter.path} is for another base:"
    if adapter.low_noise:
        raise CheckpointError(
            f"{adapter.path} is for a pair of experts ({len(adapter.pairs)} pairs of the one for high noise, "
            f"{len(adapter.low_noise)} of the one for low noise), and {base.source} is one model; give the other "
            "expert too by --low-noise, or the file of one expert by --adapter"
        )
    lacking = [layer for layer in adapter.pairs if layer not in layers]
    if lacking:
        raise CheckpointError(
            f"{other} {base.source} ({config.conditioning}, {config.num_layers} blocks) has no {listed(lacking)}"
        )
    for layer, pair in adapter.pairs.items():
        rows, *columns = layers[layer].external_shape
        wanted, found = (rows, math.prod(columns)), (pair.up.shape[0], math.prod(pair.down.shape[1:]))
        if found != wanted:
            raise CheckpointError(
                f"{other} its pair of {layer} changes a weight of shape {found}, {base.source} has one of {wanted}"
            )
    if adapter.config is None:
        return
    have = parameter_shapes(config)
    unlike = [
        f"{name} {list(shape)}" for name, shape in parameter_shapes(adapter.config).items()
        if name not in adapter.whole and have.get(name) != shape
    ]  # fmt: skip
    if unlike or config.num_attention_heads != adapter.config.num_attention_heads:
        what = listed(unlike) or f"{adapter.config.num_attention_heads} attention heads"
        raise CheckpointError(f"{other} it was trained beside {adapter.base}, and {base.source} has no {what}")
    if adapter.base_fingerprint and base_fingerprint(base) != adapter.base_fingerprint:
        raise CheckpointError(
            f"{other} it was trained beside {adapter.base}, and the values of {base.source} differ from that"
        )
