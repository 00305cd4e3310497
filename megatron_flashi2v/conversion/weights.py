"""Weights as converters exchange them: under our names, and as folders of safetensors shards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from megatron_flashi2v.checkpoint.arrangements import Box, Shape
from megatron_flashi2v.checkpoint.key_table import Mapped, parameter_shapes
from megatron_flashi2v.checkpoint.peers import Peers
from megatron_flashi2v.checkpoint.tensor_file import FileRecord, TensorSpec, write_tensor_file
from megatron_flashi2v.config.errors import CheckpointError, ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.conversion.sources import SourceTensor, whole_box
from megatron_flashi2v.runtime.files import atomic_write_json

FOREIGN_TEXT_CLEANING = "light"
"""How Wan's pipelines and both branches of FlashI2V clean prompts, for weights that record nothing of it."""

NEGATIVE_PROMPT = "negative_prompt"
"""Key of a model's own negative prompt, among facts and among a pipeline's arguments."""
CARRIED_FACTS = ("data", NEGATIVE_PROMPT)
"""What a conversion carries on, where the target has a place for it: sampling takes sizes and prompt from it."""

OnBytes = Callable[[int], None]
"""Called with a number of bytes after each tensor, for a progress bar."""

_LISTED = 5


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Options for reading weights.

    Attributes:
        dtype: of all tensors; None keeps each tensor's own.
        weights: ``model`` or ``ema``, where the source holds both.
        num_attention_heads: for sources that do not state it; must agree with those that do.
        phi_order: likewise.
        assume: model to take a value from that neither the source nor these options state.
        keep_non_finite: read values that are NaN or infinite like others, in place of refusing them.
        peers: ranks that open the same weights together, and share the work of verifying them; None for this alone.
    """

    dtype: torch.dtype | None = None
    weights: str = "model"
    num_attention_heads: int | None = None
    phi_order: str | None = None
    assume: ModelConfig | None = None
    keep_non_finite: bool = False
    peers: Peers | None = None

    def require_agreement(self, config: ModelConfig, source: Path) -> None:
        """Refuse a flag that contradicts the source.

        Raises:
            ConfigError: names the flag and both values.
        """
        for name, flag in (("num_attention_heads", self.num_attention_heads), ("phi_order", self.phi_order)):
            if flag is not None and flag != getattr(config, name):
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{option} is {flag}, but {source} says {getattr(config, name)}; leave out {option}")


class Weights(ABC):
    """A model's weights under our global names, read one tensor, or a part of one, at a time.

    Attributes:
        config: the model.
        source: file or folder, for messages.
        origin: format, and file or folder that was read: of a trainer's folder the iteration's.
        names: each tensor's name or names in the source, by our name.
        left_out: other entries of the source.
        notes: assumptions made while opening them.
        facts: what the source states about the training, JSON-ready.
        options: as given to the format's ``open``.
    """

    config: ModelConfig
    source: Path
    origin: tuple[str, Path]
    options: ReadOptions
    names: Mapping[str, tuple[str, ...]]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = {}

    @cached_property
    def non_finite(self) -> dict[str, int]:
        """Numbers of values that are NaN or infinite and were read all the same, by the source's tensor."""
        return {}

    @abstractmethod
    def stored_dtypes(self, name: str) -> tuple[torch.dtype, ...]:
        """Dtypes of the source's tensors that hold our tensor ``name``."""

    @abstractmethod
    def own_dtype(self, name: str) -> torch.dtype:
        """Dtype in which the source gives a tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which :meth:`read` returns a tensor."""
        return self.options.dtype or self.own_dtype(name)

    @abstractmethod
    def read(self, name: str, box: Box | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read one tensor to the host, in the shape of ``parameter_shapes(config)``.

        Args:
            name: our name.
            box: only this part; hardly more than its bytes is read.
            dtype: another one than :meth:`dtype`; converted from the source's most exact values.

        Raises:
            CheckpointError: it cannot be read, or holds values that are NaN or infinite.
        """

    def converted(self, key: str, label: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What was read, in another dtype; for :meth:`read`.

        Args:
            key: the tensor's name in the source.
            label: the same with its file, for messages.
            tensor: its values, or some of them.
            dtype: to convert to.

        Raises:
            CheckpointError: a value is NaN or infinite, or a finite one is too large for the dtype.
        """
        finite = tensor.isfinite()
        count = int(tensor.numel() - finite.sum())
        if count and not self.options.keep_non_finite:
            raise CheckpointError(
                f"{label} holds {count} of {tensor.numel()} values that are NaN or infinite; use another copy, or a "
                "checkpoint from before (convert --keep-non-finite takes them as they are)"
            )
        if count:
            self.non_finite[key] = count
        converted = tensor.to(dtype)
        if dtype == torch.float16 and bool((converted.isinf() & finite).any()):
            raise CheckpointError(f"{label} holds values too large for float16; choose bfloat16 or float32")
        return converted

    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(
            TensorSpec(name=name, dtype=self.dtype(name), shape=shape).nbytes
            for name, shape in parameter_shapes(self.config).items()
        )


class ExternalWeights(Weights):
    """Weights in files of another format, by the key table.

    Args:
        source: folder or file.
        config: the model.
        entries: the table's, for the format.
        tensors: the files' tensors by external name, exactly those that ``entries`` names.
        options: the caller's.

    Raises:
        CheckpointError: tensors are missing, unexpected, of another shape, or of dtypes that cannot be fused.
    """

    def __init__(
        self,
        source: Path,
        config: ModelConfig,
        entries: Sequence[Mapped],
        tensors: Mapping[str, SourceTensor],
        options: ReadOptions,
    ) -> None:
        self.source, self.config, self.options = source, config, options
        self.names = {entry.ours: entry.external for entry in entries}
        self._entries = {entry.ours: entry for entry in entries}
        self._tensors = tensors
        require_tensors(
            source, {name: entry.external_shape for entry in entries for name in entry.external}, tensors
        )
        for entry in entries:
            dtypes = sorted({str(tensors[name].dtype) for name in entry.external})
            if len(dtypes) > 1 and options.dtype is None:
                raise CheckpointError(
                    f"{source}: the tensors {', '.join(entry.external)} are fused and must have one dtype, "
                    f"not {', '.join(dtypes)}; give --dtype"
                )

    def stored_dtypes(self, name: str) -> tuple[torch.dtype, ...]:
        return tuple(self._tensors[external].stored_dtype for external in self.names[name])

    def own_dtype(self, name: str) -> torch.dtype:
        return self._tensors[self.names[name][0]].dtype

    def read(self, name: str, box: Box | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        entry, dtype = self._entries[name], dtype or self.dtype(name)

        def read(external: str, part: Box) -> torch.Tensor:
            tensor = self._tensors[external]
            return self.converted(external, f"{tensor.path}: tensor {external}", tensor.read(part), dtype)

        return entry.read(read, whole_box(entry.shape) if box is None else box)


@dataclass(frozen=True, kw_only=True)
class TensorGroup:
    """Tensors of a file that come from one of ours, such as the three projections of one fused tensor."""

    specs: tuple[TensorSpec, ...]
    load: Callable[[], Sequence[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(spec.nbytes for spec in self.specs)


def external_groups(weights: Weights, entries: Sequence[Mapped], prefix: str = "") -> list[TensorGroup]:
    """The tensors of ``entries``, in one group for each tensor of ours; ``prefix`` precedes each name."""
    return [
        TensorGroup(
            specs=tuple(
                TensorSpec(name=prefix + name, dtype=weights.dtype(entry.ours), shape=entry.external_shape)
                for name in entry.external
            ),
            load=partial(_split, weights, entry),
        )
        for entry in entries
    ]


def _split(weights: Weights, entry: Mapped) -> tuple[torch.Tensor, ...]:
    return entry.to_external(weights.read(entry.ours))


def plan_shards(groups: Sequence[TensorGroup], max_bytes: int) -> list[list[TensorGroup]]:
    """Divide groups, in order, into files of at most ``max_bytes``; a larger group gets a file of its own."""
    shards: list[list[TensorGroup]] = []
    size = 0
    for group in groups:
        if not shards or size + group.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size += group.nbytes
    return shards


def write_shard(
    path: Path, groups: Sequence[TensorGroup], on_bytes: OnBytes | None = None, *, hashed: bool = True
) -> FileRecord:
    """Write groups to one safetensors file; keeps at most two groups in memory."""
    specs = [spec for group in groups for spec in group.specs]
    return write_tensor_file(path, specs, _loaded(groups), on_bytes=on_bytes, hashed=hashed)


def _loaded(groups: Sequence[TensorGroup]) -> Iterator[torch.Tensor]:
    """Yield each group's tensors, reading the next group ahead."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = [pool.submit(group.load) for group in groups[:1]]
        for following in range(1, len(groups) + 1):
            tensors = ahead.pop().result()
            ahead += [pool.submit(group.load) for group in groups[following : following + 1]]
            yield from tensors


def write_hub_folder(
    folder: Path, stem: str, groups: Sequence[TensorGroup], max_bytes: int, on_bytes: OnBytes | None = None
) -> None:
    """Write tensors in the layout of Hugging Face libraries: one file, or numbered shards with their index.

    Args:
        folder: an existing folder.
        stem: file name without its ending, such as ``diffusion_pytorch_model``.
        groups: all tensors.
        max_bytes: largest file, in bytes of tensors.
        on_bytes: called with the number of bytes after each tensor.
    """
    shards = plan_shards(groups, max_bytes)
    if len(shards) <= 1:
        write_shard(folder / f"{stem}.safetensors", groups, on_bytes, hashed=False)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / name, shard, on_bytes, hashed=False)
        weight_map.update({spec.name: name for group in shard for spec in group.specs})
    total = sum(group.nbytes for group in groups)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    atomic_write_json(folder / f"{stem}.safetensors.index.json", index)


def listed(names: Sequence[str]) -> str:
    """The first few of many names, for a message."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def require_tensors(source: Path, expected: Mapping[str, Shape], found: Mapping[str, Shape | SourceTensor]) -> None:
    """Compare the expected names and shapes of a file's tensors with those found.

    Raises:
        CheckpointError: names tensors that are missing, unexpected, or of another shape, and the file of the latter.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    faults = []
    if missing:
        faults.append(f"{len(missing)} tensors are missing ({listed(missing)})")
    if unexpected:
        faults.append(f"{len(unexpected)} tensors are unexpected ({listed(unexpected)})")
    wrong = []
    for name, shape in expected.items():
        tensor = found.get(name, shape)
        has, place = (tensor.shape, f" in {tensor.path.name}") if isinstance(tensor, SourceTensor) else (tensor, "")
        if has != shape:
            wrong.append(f"{name}{place} has shape {has} instead of {shape}")
    if wrong:
        faults.append(listed(wrong))
    if faults:
        raise CheckpointError(f"{source} does not fit its configuration: {'; '.join(faults)}")
