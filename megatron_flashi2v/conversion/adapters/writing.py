"""Writes adapters in the forms that diffusers and ComfyUI load, each matrix bit for bit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_flashi2v.checkpoint.tensor_file import open_tensor_file
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.conversion.adapters.adapter import Adapter, Pair, Pairs, diffusers_name
from megatron_flashi2v.conversion.adapters.reading import COMFYUI, FILES, METADATA_KEY, TRANSFORMER
from megatron_flashi2v.runtime.files import full_disk_named

_MARK = {"written_by": "megatron_flashi2v"}
"""Of a file's metadata: what --overwrite may replace."""


def write_adapter(folder: Path, adapter: Adapter, form: str, dtype: torch.dtype | None = None) -> None:
    """Write an adapter's file, and a second one for the expert of low noise.

    Args:
        folder: an empty one.
        adapter: opened, its values finite.
        form: one of ``FILES``.
        dtype: of all matrices; None keeps each one's own.

    Raises:
        CheckpointError: a value is too large for the dtype.
    """
    for name, pairs in zip(FILES[form], (adapter.pairs, adapter.low_noise), strict=True):
        if not pairs:
            continue
        tensors, metadata = _comfyui(pairs, dtype) if form == "comfyui-lora" else _diffusers(pairs, dtype)
        with full_disk_named(folder / name):
            save_file(tensors, folder / name, metadata={"format": "pt", **_MARK, **metadata})


def is_ours(folder: Path, form: str) -> bool:
    """Whether a folder holds what :func:`write_adapter` wrote and nothing else; trainers use the same names."""
    found = list(folder.iterdir())
    return {path.name for path in found} <= set(FILES[form]) and all(map(_is_marked, found))


def _is_marked(path: Path) -> bool:
    try:
        with open_tensor_file(path) as handle:
            return _MARK.items() <= (handle.metadata() or {}).items()
    except CheckpointError:
        return False


def caveats(adapter: Adapter, form: str) -> tuple[str, ...]:
    """What a reader of the written files must know."""
    notes = []
    every = (*adapter.pairs.items(), *adapter.low_noise.items())
    scaled = list(dict.fromkeys(name for name, pair in every if pair.alpha != pair.rank))
    outside = [name for name in scaled if not name.startswith("blocks.")]
    if form == "comfyui-lora" and outside:
        notes.append(
            f"diffusers' reader of ComfyUI's form refuses an alpha outside of blocks ({', '.join(outside)}); it reads "
            "diffusers-lora"
        )
    if form == "diffusers-lora" and scaled:
        notes.append(
            f"the alphas stand in the file's metadata ({METADATA_KEY}), as diffusers writes and reads them; a program "
            "that passes over them takes each alpha for the rank"
        )
    if form == "diffusers-lora" and adapter.low_noise:
        notes.append(
            f"diffusers loads {FILES[form][1]} by load_lora_weights(FOLDER, weight_name=..., "
            "load_into_transformer_2=True)"
        )
    return tuple(notes)


def _comfyui(pairs: Pairs, dtype: torch.dtype | None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors by ComfyUI's names; an alpha where it is not the rank, which readers take it for."""
    tensors: dict[str, torch.Tensor] = {}
    for layer, pair in pairs.items():
        down, up = _matrices(pair, dtype)
        stem = f"{COMFYUI}{layer}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        if pair.alpha != pair.rank:
            tensors[f"{stem}.alpha"] = torch.tensor(pair.alpha, dtype=torch.float64 if _long(pair.alpha) else None)
    return tensors, {}


def _long(value: float) -> bool:
    """Whether fp32 rounds a number, such as the alpha of a rank-stabilised pair."""
    return float(torch.tensor(value)) != value


def _diffusers(pairs: Pairs, dtype: torch.dtype | None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors by diffusers' names, and the settings from which it builds peft's configuration."""
    tensors: dict[str, torch.Tensor] = {}
    named: dict[str, Pair] = {diffusers_name(layer): pair for layer, pair in pairs.items()}
    for layer, pair in named.items():
        down, up = _matrices(pair, dtype)
        tensors |= {f"{TRANSFORMER}{layer}.lora_A.weight": down, f"{TRANSFORMER}{layer}.lora_B.weight": up}
    rank, ranks = _usual({layer: pair.rank for layer, pair in named.items()})
    alpha, alphas = _usual({layer: pair.alpha for layer, pair in named.items()})
    settings = {
        "r": rank, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas, "target_modules": sorted(named),
    }  # fmt: skip
    text = json.dumps({f"{TRANSFORMER}{key}": value for key, value in settings.items()}, indent=2, sort_keys=True)
    return tensors, {METADATA_KEY: text}


def _usual(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, and the others by layer; ``^`` keeps one layer's name from matching another's end."""
    ((usual, _),) = Counter(values.values()).most_common(1)
    return usual, {f"^{layer}": value for layer, value in values.items() if value != usual}


def _matrices(pair: Pair, dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
    down, up = (_cast(tensor.name, tensor.read(), dtype) for tensor in pair.tensors)
    return down, up


def _cast(name: str, values: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    cast = values.to(dtype or values.dtype)
    if not bool(cast.isfinite().all()):
        raise CheckpointError(f"tensor {name} holds values too large for {dtype}; choose bfloat16 or float32")
    return cast.contiguous().clone()  # two names may share a tensor of a pickled file, which the library refuses
