"""Reads adapters in the forms that others write.

===================  ===========================================================  ===================================
form                 names                                                        alpha
===================  ===========================================================  ===================================
``diffusers-lora``   ``transformer.blocks.0.attn1.to_q.lora_A.weight``            peft's settings: the file's metadata,
                                                                                  or ``adapter_config.json``
``comfyui-lora``     ``diffusion_model.blocks.0.self_attn.q.lora_down.weight``    ``....alpha``
``kohya-lora``       ``lora_unet_blocks_0_self_attn_q.lora_down.weight``          ``....alpha``
===================  ===========================================================  ===================================

``lora_A`` and ``lora_B`` are other words for ``lora_down`` and ``lora_up``. Without an alpha, it is the rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_flashi2v.checkpoint.tensor_file import open_tensor_file
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.conversion.adapters.adapter import Adapter, Pair, original_name
from megatron_flashi2v.conversion.adapters.checkpoint import open_checkpoint
from megatron_flashi2v.conversion.containers import open_container, open_file
from megatron_flashi2v.conversion.quantised import dequantised
from megatron_flashi2v.conversion.recognition import recognise_format
from megatron_flashi2v.conversion.sources import SourceTensor
from megatron_flashi2v.runtime.files import read_json_object

AUTO, MEGATRON = "auto", "megatron"
METADATA_KEY = "lora_adapter_metadata"
"""Of a safetensors file's header: peft's settings as JSON, each key behind ``transformer.``; diffusers' own."""
TRANSFORMER, SECOND_TRANSFORMER, COMFYUI, KOHYA = "transformer.", "transformer_2.", "diffusion_model.", "lora_unet_"
FILES = {
    "diffusers-lora": ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors"),
    "comfyui-lora": ("lora.safetensors", "lora_low_noise.safetensors"),
}
"""Names of the files that we write, and find: of the one model or the expert for high noise, and for low noise."""

_PEFT_FILES, _PEFT_SETTINGS = ("adapter_model.safetensors", "adapter_model.bin"), "adapter_config.json"
_PREFIXES = (TRANSFORMER, SECOND_TRANSFORMER, COMFYUI, f"model.{COMFYUI}", "base_model.model.", KOHYA, "")
_MATRIX = re.compile(r"(?P<layer>.+)\.lora_(?P<side>A|B|down|up)(?:\.\w+)?\.weight")
_ALPHA = ".alpha"
_DOWN, _UP, _SCALE = "lora_A or lora_down", "lora_B or lora_up", "alpha"
_SIDES = {"A": _DOWN, "down": _DOWN, "B": _UP, "up": _UP}

# What a pair of matrices cannot say, by the end of a tensor's name.
_EXTRAS = (
    (r"lora_te\w*\..+|(.+\.)?(text_encoder|text_model)\..+", "part of an adapter of the text encoder"),
    (r".+\.(dora_scale|lora_magnitude_vector)(\.\w+)*", "a magnitude of DoRA"),
    (r".+\.(diff|diff_b|set_weight)", "a difference of a whole tensor"),
    (r".+\.hada_\w+", "a factor of LoHa"),
    (r".+\.lokr_\w+", "a factor of LoKr"),
    (r".+\.lora_(B|up)(\.\w+)?\.bias", "a bias beside a pair"),
    (r".+\.lora_mid(\.\w+)*", "a third matrix of a pair"),
)


@dataclass
class _Layer:
    """What a file holds of one layer: tensors by what they are, and the layer's name in the file without prefix."""

    spelt: str
    tensors: dict[str, SourceTensor] = field(default_factory=dict)


def open_adapter(path: Path, form: str = AUTO, weights: str = "model") -> Adapter:
    """Open an adapter; its matrices are read later.

    Args:
        path: a file; a folder with one, as peft, diffusers or this package writes it; or a checkpoint of training.
        form: ``megatron`` or one of the table above, which it must be in; or ``auto``.
        weights: of a checkpoint: ``model``, or ``ema`` for the averaged ones.

    Raises:
        CheckpointError: there is none, it is damaged, holds more than pairs, or is in another form.
    """
    if form in (AUTO, MEGATRON) and is_checkpoint(path):
        return open_checkpoint(path, weights)
    first, second = _files(path)
    found, pairs, low_noise = _read(first) if first is not None else (AUTO, {}, {})
    if second is not None:
        spelt, own, prefixed = _read(second)
        if low_noise or (own and prefixed):
            raise CheckpointError(
                f"{path}: {second.name} is for the expert for low noise, and there are other pairs of it under "
                f"{SECOND_TRANSFORMER}; name one file"
            )
        found, low_noise = (spelt if first is None else found), own or prefixed
    if weights != "model":
        raise CheckpointError(f"{path}: a file of an adapter holds one set of weights; leave out --weights {weights}")
    if form not in (AUTO, found):
        raise CheckpointError(f"{path} is in the form {found}, not {form}; give {found} in its place, or auto")
    return Adapter(path=path, form=found, pairs=pairs, low_noise=low_noise)


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint of training, which may hold averaged weights beside the others."""
    return path.is_dir() and recognise_format(path) == MEGATRON


def _files(path: Path) -> tuple[Path | None, Path | None]:
    """The file of an adapter, and that of the expert for low noise if it has its own; one of them may be missing."""
    if not path.is_dir():
        return path, None
    for name in _PEFT_FILES:
        if (path / name).is_file():
            return path / name, None
    for high, low in FILES.values():
        first, second = (path / name if (path / name).is_file() else None for name in (high, low))
        if first is not None or second is not None:
            return first, second
    held = {tensor.path for tensor in open_container(path).tensors.values()}
    if len(held) != 1:
        raise CheckpointError(f"{path} holds an adapter in {len(held)} files, or none; name one file")
    return held.pop(), None


def _read(path: Path) -> tuple[str, dict[str, Pair], dict[str, Pair]]:
    """The form, the pairs of the first model, and those of the second."""
    tensors = open_file(path).tensors if path.is_file() else open_container(path).tensors
    parts: dict[bool, dict[str, _Layer]] = {False: {}, True: {}}
    alphas = {name: tensor for name, tensor in tensors.items() if name.endswith(_ALPHA)}
    matrices, _ = dequantised(path, {name: tensor for name, tensor in tensors.items() if name not in alphas})
    if not any(map(_MATRIX.fullmatch, matrices)) and not any(map(_extra, matrices)):
        raise CheckpointError(f"{path} is no adapter: none of its {len(tensors)} tensors is of a pair (lora_A, lora_B)")
    for name, tensor in {**matrices, **alphas}.items():
        match = _MATRIX.fullmatch(name)
        spelt = match["layer"] if match else name.removesuffix(_ALPHA) if name in alphas else ""
        prefix, layer = _layer(spelt)
        if layer is None:
            raise CheckpointError(_refusal(path, name))
        held = parts[prefix == SECOND_TRANSFORMER].setdefault(
            layer, _Layer(KOHYA if prefix == KOHYA else spelt.removeprefix(prefix))
        )
        kind = _SIDES[match["side"]] if match else _SCALE
        if kind in held.tensors:
            raise CheckpointError(
                f"{path}: tensors {held.tensors[kind].name} and {name} are both the {kind} of {layer}; it holds two "
                "adapters, give each in a file of its own"
            )
        held.tensors[kind] = tensor
    stated = _peft_settings(path)
    first, second = (
        {
            layer: _pair(path, layer, held, _PeftSettings.of(path, stated, prefix))
            for layer, held in parts[prefix == SECOND_TRANSFORMER].items()
        }
        for prefix in (TRANSFORMER, SECOND_TRANSFORMER)
    )
    return _form({(layer, held.spelt) for part in parts.values() for layer, held in part.items()}), first, second


def _layer(spelt: str) -> tuple[str, str | None]:
    """The prefix and the original name of a layer; None if no layer has such a name."""
    for prefix in _PREFIXES:
        if spelt.startswith(prefix):
            layer = original_name(spelt.removeprefix(prefix))
            if layer is not None:
                return prefix, layer
    return "", None


def _form(spellings: Set[tuple[str, str]]) -> str:
    """The form by layers and their spellings without a prefix; a name that two forms share tells nothing."""
    if any(spelt == KOHYA for _, spelt in spellings):
        return "kohya-lora"
    if any(spelt != layer for layer, spelt in spellings):
        return "diffusers-lora"
    return "comfyui-lora"


def _pair(path: Path, layer: str, held: _Layer, settings: _PeftSettings) -> Pair:
    if not {_DOWN, _UP} <= held.tensors.keys():
        names = ", ".join(tensor.name for tensor in held.tensors.values())
        raise CheckpointError(f"{path}: the pair of {layer} is not whole, it has {names} alone")
    down, up = held.tensors[_DOWN], held.tensors[_UP]
    rank = down.shape[0] if len(down.shape) > 1 else 0
    if rank == 0 or up.shape[1:] != (rank, *(1,) * (len(up.shape) - 2)):
        raise CheckpointError(
            f"{path}: the pair of {layer} has shapes {down.shape} and {up.shape}; it must be [r, in] and [out, r]"
        )
    alpha = _number(held.tensors[_SCALE]) if _SCALE in held.tensors else settings.alpha(held.spelt, rank)
    return Pair(down=down, up=up, alpha=alpha)


def _number(tensor: SourceTensor) -> float:
    if math.prod(tensor.shape) != 1:
        raise CheckpointError(f"{tensor.path}: tensor {tensor.name} has shape {tensor.shape}; an alpha is one number")
    value = float(tensor.read().reshape(()))
    if not math.isfinite(value):
        raise CheckpointError(f"{tensor.path}: tensor {tensor.name} is {value}; an alpha is a finite number")
    return value


def _extra(name: str) -> str | None:
    return next((what for mark, what in _EXTRAS if re.fullmatch(mark, name)), None)


def _refusal(path: Path, name: str) -> str:
    what = _extra(name)
    if what is None:
        return f"{path}: tensor {name} belongs to no linear layer of this family of models; it is of another one"
    return (
        f"{path}: tensor {name} is {what}, which pairs of matrices cannot carry; merge it into its base with the "
        "program that made it, and convert that"
    )


def _peft_settings(path: Path) -> dict[str, Any]:
    """Peft's settings of a file: from a safetensors file's metadata, or peft's own file beside; empty if it has none.

    Raises:
        CheckpointError: they are no JSON object.
    """
    if path.name in _PEFT_FILES and (path.parent / _PEFT_SETTINGS).is_file():
        return read_json_object(path.parent / _PEFT_SETTINGS, error=CheckpointError)
    if path.suffix not in (".safetensors", ".sft"):
        return {}
    with open_tensor_file(path) as handle:
        text = (handle.metadata() or {}).get(METADATA_KEY, "{}")
    try:
        stated = json.loads(text)
    except ValueError:
        stated = None
    if not isinstance(stated, dict):
        raise CheckpointError(f"{path}: {METADATA_KEY} in its metadata is not a JSON object")
    return stated


@dataclass(frozen=True, kw_only=True)
class _PeftSettings:
    """What peft's settings say of scales; without settings, alpha is the rank."""

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def of(cls, path: Path, stated: Mapping[str, Any], prefix: str) -> _PeftSettings:
        """Those of one model; refuses what pairs cannot carry."""
        own = {key.removeprefix(prefix): value for key, value in stated.items() if key.startswith(prefix)}
        values = own or {key: value for key, value in stated.items() if "." not in key}
        for key, what in (("use_dora", "magnitudes of DoRA"), ("lora_bias", "biases beside its pairs")):
            if values.get(key):
                raise CheckpointError(f"{path}: its settings say {key}: {what} are not read; merge it into its base")
        return cls(path=path, values=values)

    def alpha(self, layer: str, rank: int) -> float:
        """Alpha of a layer, given by its name in the file, so that the pair counts alpha / rank.

        Raises:
            CheckpointError: the settings are malformed.
        """
        alpha = self.values.get("lora_alpha")
        try:
            for key, value in (self.values.get("alpha_pattern") or {}).items():
                if re.match(rf"(.*\.)?({key})$", layer):  # as peft reads it
                    alpha = value
                    break
            if alpha is None:
                return float(rank)
            # rank-stabilised: the pair counts alpha / sqrt(r)
            return float(alpha) * (math.sqrt(rank) if self.values.get("use_rslora") else 1)
        except (re.error, AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: its settings give no alpha of {layer}: {error}") from error

