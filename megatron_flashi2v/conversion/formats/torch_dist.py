"""The format ``torch-dist``: a folder of ``megatron.core.dist_checkpointing``, with one entry for each of our tensors.

Reads such folders with our names, or those of Wan or a FlashI2V branch; the optimizer's and other entries are left out.
What is written, any program on megatron-core loads at its own layout. megatron-core reads two pickles, which it and
torch define: torch's ``.metadata``, and ``common.pt`` with what is no tensor, here an empty dictionary.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem

from megatron_flashi2v.checkpoint.arrangements import Same
from megatron_flashi2v.checkpoint.folders import MODEL_CONFIG_NAME, load_model_config
from megatron_flashi2v.checkpoint.key_table import Mapped, parameter_shapes
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.conversion.containers import open_container
from megatron_flashi2v.conversion.formats.original import FLASHI2V_GPU, FLASHI2V_NPU, WAN
from megatron_flashi2v.conversion.recognition import format_of_names
from megatron_flashi2v.conversion.torch_distributed_checkpoint import METADATA_NAME
from megatron_flashi2v.conversion.training_folders import newest_iteration
from megatron_flashi2v.conversion.weights import ExternalWeights, OnBytes, ReadOptions, Weights
from megatron_flashi2v.runtime.files import atomic_write_json

CONFIG_NAME = "metadata.json"
"""What tells megatron-core that a folder is a checkpoint of its own."""
COMMON_NAME = "common.pt"

_CONFIG = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
    "common_backend_version": 1,
}  # fmt: skip
_MARK = "patch_embedding.weight"
_NOT_WEIGHTS = {"optimizer", "exp_avg", "exp_avg_sq", "fp32_param", "ema", "ema_model"}
"""Parts of names before the parameter's own that tell of something else than the trained weights."""


def open_weights(path: Path, options: ReadOptions) -> Weights:
    """Open the weights of a folder, or of its newest ``iter_*``.

    Raises:
        CheckpointError: it is no such folder, damaged, of unknown names, or of our names without their model's
            configuration beside.
    """
    folder = newest_iteration(path) if path.is_dir() else path
    if not (folder / METADATA_NAME).is_file():
        raise CheckpointError(
            f"{path} has no {METADATA_NAME}; give a folder that megatron-core's dist_checkpointing wrote"
        )
    held = open_container(path, options.weights)
    names = format_of_names(held.tensors)
    original = {form.name: form for form in (WAN, FLASHI2V_NPU, FLASHI2V_GPU)}.get(names or "")
    if original is not None:
        return original.open(path, options)
    if names is None:
        raise CheckpointError(f"{path} holds {len(held.tensors)} tensors of names that are neither ours nor Wan's")
    if not (folder / MODEL_CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{folder} has our names, but no {MODEL_CONFIG_NAME}, which tells the model's heads, paradigm and text "
            "length; copy it from the run or the conversion that the weights come from"
        )
    config = load_model_config(folder)
    options.require_agreement(config, folder / MODEL_CONFIG_NAME)
    prefix = _prefix(path, list(held.tensors), options.weights)
    shapes = parameter_shapes(config)
    tensors = {name: held.tensors[prefix + name] for name in shapes if prefix + name in held.tensors}
    entries = [
        Mapped(ours=name, shape=shape, external=(name,), external_shape=shape, transform=Same(),
               heads=config.num_attention_heads)
        for name, shape in shapes.items()
    ]  # fmt: skip
    weights = ExternalWeights(path, config, entries, tensors, options)
    taken = {prefix + name for name in tensors}
    weights.left_out = (*(name for name in held.tensors if name not in taken), *held.others)
    weights.notes = held.notes
    return weights


def _prefix(path: Path, names: list[str], weights: str) -> str:
    """What precedes the model's names: moments and masters of the optimizer have the same names behind theirs."""
    if weights != "model":
        raise CheckpointError(f"{path} is read without averaged weights; leave out --weights {weights}")
    found = [name.removesuffix(_MARK) for name in names if name == _MARK or name.endswith(f".{_MARK}")]
    found = [prefix for prefix in found if not set(prefix.split(".")) & _NOT_WEIGHTS]
    if len(found) != 1:
        several = f"several models, under {', '.join(map(repr, found))}" if found else f"no tensor {_MARK} of a model"
        raise CheckpointError(f"{path} holds {several}; save one model's weights alone")
    return found[0]


class _ReadAsWritten(DefaultSavePlanner):
    """Reads each tensor when its turn comes, so that no more than one is in memory.

    Args:
        weights: where they come from.
        on_bytes: called with the number of bytes after each.
    """

    def __init__(self, weights: Weights, on_bytes: OnBytes | None) -> None:
        super().__init__(flatten_state_dict=False)
        self._weights, self._on_bytes = weights, on_bytes

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        tensor = self._weights.read(write_item.index.fqn).contiguous()
        if self._on_bytes is not None:
            self._on_bytes(tensor.nbytes)
        return tensor


def write_weights(folder: Path, weights: Weights, max_bytes: int, on_bytes: OnBytes | None) -> None:
    """Write the folder, a file for each tensor, and ``model_config.json``."""
    del max_bytes  # no tensor is divided
    planned = {
        name: torch.empty(shape, dtype=weights.dtype(name), device="meta")
        for name, shape in parameter_shapes(weights.config).items()
    }
    # A file of several tensors would hold them all in memory until it is closed.
    writer = FileSystemWriter(folder, single_file_per_rank=False, thread_count=1, per_thread_copy_ahead=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is what no_dist asks for
        dcp.save(planned, storage_writer=writer, planner=_ReadAsWritten(weights, on_bytes), no_dist=True)
    torch.save({}, folder / COMMON_NAME)
    atomic_write_json(folder / CONFIG_NAME, _CONFIG)
    atomic_write_json(folder / MODEL_CONFIG_NAME, weights.config.to_json())


def is_ours(folder: Path) -> bool:
    """Whether a folder holds what :func:`write_weights` writes and nothing else."""
    rest = {path.name for path in folder.iterdir() if path.suffix != ".distcp"}
    return rest == {METADATA_NAME, COMMON_NAME, CONFIG_NAME, MODEL_CONFIG_NAME}


def names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Key of each of our tensors: its name."""
    return {name: (name,) for name in parameter_shapes(config)}
