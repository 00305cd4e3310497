"""What converters exchange: a model's weights under our names, and folders of safetensors shards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.checkpoint.tensor_file import FileRecord, TensorSpec, write_tensor_file
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.runtime.files import atomic_write_json

OnBytes = Callable[[int], None]

_LISTED = 5


class Weights(ABC):
    """A model's weights under our global names, read one tensor at a time.

    Attributes:
        config: the model that they are of.
    """

    config: ModelConfig

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which :meth:`read` gives a tensor."""

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """One whole tensor, on the host, of the shape in ``parameter_shapes(config)``.

        Raises:
            CheckpointError: it cannot be read.
        """

    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(
            TensorSpec(name=name, dtype=self.dtype(name), shape=shape).nbytes
            for name, shape in parameter_shapes(self.config).items()
        )


@dataclass(frozen=True, kw_only=True)
class TensorGroup:
    """Tensors of a file that are made together, such as the three projections that one fused tensor holds."""

    specs: tuple[TensorSpec, ...]
    load: Callable[[], Sequence[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(spec.nbytes for spec in self.specs)


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in another dtype.

    Raises:
        CheckpointError: a finite value is too large for it.
    """
    converted = tensor.to(dtype)
    if dtype == torch.float16 and bool((converted.isinf() & tensor.isfinite()).any()):
        raise CheckpointError(f"tensor {name} holds values too large for float16; choose bfloat16 or float32")
    return converted


def plan_shards(groups: Sequence[TensorGroup], max_bytes: int) -> list[list[TensorGroup]]:
    """Deal groups out, in order, to files of at most ``max_bytes``; a larger group gets a file of its own."""
    shards: list[list[TensorGroup]] = []
    size = 0
    for group in groups:
        if not shards or size + group.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size += group.nbytes
    return shards


def write_shard(path: Path, groups: Sequence[TensorGroup], on_bytes: OnBytes | None = None) -> FileRecord:
    """Write groups to one safetensors file, with one group in memory at a time."""
    specs = [spec for group in groups for spec in group.specs]
    return write_tensor_file(path, specs, _loaded(groups), on_bytes=on_bytes)


def _loaded(groups: Sequence[TensorGroup]) -> Iterator[torch.Tensor]:
    for group in groups:
        yield from group.load()


def write_hub_folder(
    folder: Path, stem: str, groups: Sequence[TensorGroup], max_bytes: int, on_bytes: OnBytes | None = None
) -> None:
    """Write tensors as Hugging Face libraries load them: one file, or numbered shards with their index.

    Args:
        folder: an existing folder.
        stem: file name without its ending, such as ``diffusion_pytorch_model``.
        groups: all tensors.
        max_bytes: largest file, in bytes of tensors.
        on_bytes: hears of the bytes written.
    """
    shards = plan_shards(groups, max_bytes)
    if len(shards) <= 1:
        write_shard(folder / f"{stem}.safetensors", groups, on_bytes)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / name, shard, on_bytes)
        weight_map.update({spec.name: name for group in shard for spec in group.specs})
    total = sum(group.nbytes for group in groups)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    atomic_write_json(folder / f"{stem}.safetensors.index.json", index)


def listed(names: Sequence[str]) -> str:
    """The first few of many names, for an error message."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def require_tensors(
    source: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]
) -> None:
    """Compare the names and shapes that a file should hold with those it holds.

    Raises:
        CheckpointError: names tensors that are missing, unexpected, or of another shape.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    faults = []
    if missing:
        faults.append(f"{len(missing)} tensors are missing ({listed(missing)})")
    if unexpected:
        faults.append(f"{len(unexpected)} tensors are unexpected ({listed(unexpected)})")
    wrong = [
        f"{name} has shape {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if wrong:
        faults.append(listed(wrong))
    if faults:
        raise CheckpointError(f"{source} does not fit its configuration: {'; '.join(faults)}")
