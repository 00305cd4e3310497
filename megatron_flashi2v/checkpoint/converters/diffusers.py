"""The format ``diffusers``: a folder whose ``transformer/`` is diffusers' ``WanTransformer3DModel``.

What diffusers' model has no place for, FlashI2V's own tensors and the settings that shapes cannot tell, lies
in the sibling ``image_conditioning/``, under the names of FlashI2V's main branch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_flashi2v.checkpoint.key_table import Mapped, mappings
from megatron_flashi2v.checkpoint.tensor_file import DTYPES, TensorSpec, open_tensor_file, read_tensor
from megatron_flashi2v.checkpoint.weights import (
    OnBytes,
    TensorGroup,
    Weights,
    cast,
    require_tensors,
    write_hub_folder,
)
from megatron_flashi2v.conditioning.build import input_channels
from megatron_flashi2v.config.errors import CheckpointError, ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.runtime.files import atomic_write_json, read_json

TRANSFORMER, CONDITIONING = "transformer", "image_conditioning"
PIPELINE_NAME = "model_index.json"
TRANSFORMER_STEM, CONDITIONING_STEM = "diffusion_pytorch_model", "model"
TRANSFORMER_CLASS, CONDITIONING_CLASS = "WanTransformer3DModel", "FlashI2VImageConditioning"

# What our model is, among the things that diffusers' class can be.
_FIXED: Mapping[str, Any] = {
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}


def transformer_config(config: ModelConfig) -> dict[str, Any]:
    """``transformer/config.json``."""
    return {
        "_class_name": TRANSFORMER_CLASS,
        "_diffusers_version": metadata.version("diffusers"),
        "patch_size": list(config.patch_size),
        "num_attention_heads": config.num_attention_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": input_channels(config),
        "out_channels": config.latent_channels,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_hidden_size,
        "num_layers": config.num_layers,
        "eps": config.norm_eps,
        **_FIXED,
    }


def write_weights(folder: Path, weights: Weights, max_bytes: int, on_bytes: OnBytes | None) -> None:
    """Write the folder's files."""
    config = weights.config
    inside = list(mappings(config, "diffusers"))
    held = {entry.ours for entry in inside}
    beside = [entry for entry in mappings(config, "wan") if entry.ours not in held]
    for name in (TRANSFORMER, CONDITIONING):
        (folder / name).mkdir()
    write_hub_folder(folder / TRANSFORMER, TRANSFORMER_STEM, _groups(weights, inside), max_bytes, on_bytes)
    atomic_write_json(folder / TRANSFORMER / "config.json", transformer_config(config))
    if beside:
        write_hub_folder(
            folder / CONDITIONING, CONDITIONING_STEM, _groups(weights, beside), max_bytes, on_bytes
        )
    atomic_write_json(
        folder / CONDITIONING / "config.json", {"_class_name": CONDITIONING_CLASS, **config.to_json()}
    )
    atomic_write_json(
        folder / PIPELINE_NAME,
        {
            "_class_name": "FlashI2VPipeline",
            "_diffusers_version": metadata.version("diffusers"),
            TRANSFORMER: ["diffusers", TRANSFORMER_CLASS],
            CONDITIONING: ["megatron_flashi2v", CONDITIONING_CLASS],
        },
    )


def _groups(weights: Weights, entries: Sequence[Mapped]) -> list[TensorGroup]:
    return [
        TensorGroup(
            specs=tuple(
                TensorSpec(name=name, dtype=weights.dtype(entry.ours), shape=entry.external_shape)
                for name in entry.external
            ),
            load=partial(_split, weights, entry),
        )
        for entry in entries
    ]


def _split(weights: Weights, entry: Mapped) -> tuple[torch.Tensor, ...]:
    return entry.to_external(weights.read(entry.ours))


class DiffusersWeights(Weights):
    """The tensors of an exported folder, or of a plain Wan text-to-video ``transformer/``."""

    def __init__(self, path: Path, dtype: torch.dtype | None) -> None:
        transformer = path / TRANSFORMER if (path / TRANSFORMER).is_dir() else path
        conditioning = path / CONDITIONING if transformer != path else path.parent / CONDITIONING
        self.config = read_config(transformer, conditioning)
        self._wanted = dtype
        inside = list(mappings(self.config, "diffusers"))
        held = {entry.ours for entry in inside}
        beside = [entry for entry in mappings(self.config, "wan") if entry.ours not in held]
        self._entries = {entry.ours: entry for entry in inside + beside}
        self._tensors = _stored_tensors(transformer, TRANSFORMER_STEM)
        self._require(transformer, inside, self._tensors)
        if beside:
            tensors = _stored_tensors(conditioning, CONDITIONING_STEM)
            self._require(conditioning, beside, tensors)
            self._tensors.update(tensors)

    def _require(self, folder: Path, entries: Sequence[Mapped], tensors: Mapping[str, _StoredTensor]) -> None:
        if "head.head.weight" in tensors:
            raise CheckpointError(
                f"{folder} holds tensors under the original Wan names, which is the format wan"
            )
        expected = {name: entry.external_shape for entry in entries for name in entry.external}
        require_tensors(folder, expected, {name: tensor.shape for name, tensor in tensors.items()})
        for entry in entries:
            dtypes = sorted({str(tensors[name].dtype) for name in entry.external})
            if len(dtypes) > 1 and self._wanted is None:
                raise CheckpointError(
                    f"{folder}: the tensors {', '.join(entry.external)} are fused and must have one dtype, "
                    f"not {', '.join(dtypes)}; give --dtype"
                )

    def dtype(self, name: str) -> torch.dtype:
        return self._wanted or self._tensors[self._entries[name].external[0]].dtype

    def read(self, name: str) -> torch.Tensor:
        entry, dtype = self._entries[name], self.dtype(name)
        return entry.to_ours([cast(part, self._tensors[part].read(), dtype) for part in entry.external])


@dataclass(frozen=True)
class _StoredTensor:
    """One tensor of a safetensors file.

    The file is opened for each one anew: the memory that a lasting map of it takes would grow to the file's
    size.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> torch.Tensor:
        with open_tensor_file(self.path) as handle:
            return read_tensor(self.path, handle, self.name)


def _stored_tensors(folder: Path, stem: str) -> dict[str, _StoredTensor]:
    """All tensors of a component, from its one file or the shards that its index names."""
    index = folder / f"{stem}.safetensors.index.json"
    names = [f"{stem}.safetensors"]
    if index.exists():
        document = read_json(index, error=CheckpointError)
        weight_map = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            # An index may come from anyone: it must not lead the reader out of its folder.
            if Path(name).name != name:
                raise CheckpointError(f"{index} names the file {name!r}, which is not a plain name")
    tensors: dict[str, _StoredTensor] = {}
    for name in names:
        path = folder / name
        with open_tensor_file(path) as handle:
            for key in list(handle.keys()):
                part = handle.get_slice(key)
                if part.get_dtype() not in DTYPES:
                    raise CheckpointError(
                        f"{path}: tensor {key} has dtype {part.get_dtype()}, which is not supported"
                    )
                tensors[key] = _StoredTensor(path, key, tuple(part.get_shape()), DTYPES[part.get_dtype()])
    return tensors


def read_config(transformer: Path, conditioning: Path) -> ModelConfig:
    """The model of a folder: from the conditioning's settings, checked against the transformer's.

    Raises:
        CheckpointError: a file is missing or malformed, they contradict each other, or it is another kind of
            model.
    """
    path = transformer / "config.json"
    stored = _object(path)
    if stored.get("_class_name") != TRANSFORMER_CLASS:
        raise CheckpointError(
            f"{path}: _class_name is {stored.get('_class_name')!r}, it must be {TRANSFORMER_CLASS!r}"
        )
    for key, value in _FIXED.items():
        # An absent key has the class's default, which is what ours is.
        if key != "rope_max_seq_len" and stored.get(key, value) != value:
            raise CheckpointError(f"{path}: {key} is {stored[key]!r}, this model family has {value!r}")
    try:
        beside = conditioning / "config.json"
        if not beside.exists():
            return _from_transformer(stored)
        settings = {key: value for key, value in _object(beside).items() if not key.startswith("_")}
        config = ModelConfig.from_json(settings, source=str(beside))
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        reason = f"{path}: no key {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(reason) from error
    for key, value in transformer_config(config).items():
        if not key.startswith("_") and key not in _FIXED and stored.get(key, value) != value:
            raise CheckpointError(f"{path}: {key} is {stored[key]!r}, but {beside} makes it {value!r}")
    return config


def _from_transformer(stored: Mapping[str, Any]) -> ModelConfig:
    """What a plain transformer folder describes: a text-to-video model, or Wan's inpainting by its wider input."""
    channels = stored["in_channels"]
    latents = stored["out_channels"] or channels  # diffusers takes none for as many
    mask_channels = channels - 2 * latents
    if channels != latents and mask_channels < 1:
        raise ConfigError(
            f"in_channels is {channels} and out_channels {latents}: equal ones are a text-to-video model, and more "
            f"than {2 * latents} inpainting; another paradigm needs the {CONDITIONING}/ folder of its export"
        )
    paradigm = {} if channels == latents else {"mask_channels": mask_channels}
    return ModelConfig(
        num_layers=stored["num_layers"],
        hidden_size=stored["num_attention_heads"] * stored["attention_head_dim"],
        ffn_hidden_size=stored["ffn_dim"],
        num_attention_heads=stored["num_attention_heads"],
        latent_channels=latents,
        patch_size=tuple(stored["patch_size"]),
        freq_dim=stored["freq_dim"],
        text_dim=stored["text_dim"],
        norm_eps=stored["eps"],
        conditioning="inpainting" if paradigm else "text_to_video",
        **paradigm,
    )


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path, error=CheckpointError)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def open_weights(path: Path, dtype: torch.dtype | None) -> Weights:
    """The weights of an exported folder, or of a ``WanTransformer3DModel`` folder.

    Raises:
        CheckpointError: a file is missing, damaged, or of another model.
    """
    return DiffusersWeights(path, dtype)


def is_ours(folder: Path) -> bool:
    """Whether a folder holds what :func:`write_weights` wrote and nothing else."""
    return {path.name for path in folder.iterdir()} == {TRANSFORMER, CONDITIONING, PIPELINE_NAME}
