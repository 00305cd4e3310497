"""Quantised weights: eight-bit floats are read, by their scales where they have some; integers are refused by name.

A scaled tensor W of a file is q * s with q in eight bits, and s in fp32 beside it: one value for the tensor, or one for
each row (ComfyUI's ``scale_weight`` and ``weight_scale``; torch's ``_scaled_mm`` takes both). Scales of activations
belong to the eight-bit matrix product, and a model in higher precision needs none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_flashi2v.checkpoint.arrangements import Box
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.conversion.sources import SourceTensor

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

_SCALES = ("scale_weight", "weight_scale")
_ASIDE = re.compile(r"(.*\.)?(scale_weight|weight_scale|scale_input|input_scale|comfy_quant|scaled_fp8)")
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)


@dataclass(frozen=True, kw_only=True)
class DequantisedTensor(SourceTensor):
    """An eight-bit tensor as it counts: ``dtype`` holds every value of it exactly, or the product with its scale.

    Attributes:
        stored: in eight bits.
        scale: fp32, of one value or one for each row; None if the values count as they are.
    """

    stored: SourceTensor
    scale: SourceTensor | None = None

    @property
    def stored_dtype(self) -> torch.dtype:
        return self.stored.dtype

    def read(self, box: Box | None = None) -> torch.Tensor:
        values = self.stored.read(box).to(self.dtype)
        if self.scale is None:
            return values
        scale = self.scale.read().to(self.dtype).flatten()
        if scale.numel() > 1:
            rows = scale if box is None else scale[box[0]]
            scale = rows.reshape(-1, *(1,) * (values.dim() - 1))
        return values * scale


def dequantised(source: Path, tensors: Mapping[str, SourceTensor]) -> tuple[dict[str, SourceTensor], tuple[str, ...]]:
    """Replace eight-bit floats by what they count; also returns the names of the scales and marks, which go.

    Raises:
        CheckpointError: a tensor is of integers, or an eight-bit one lacks its scale, or a scale has another shape.
    """
    aside = {name for name in tensors if _ASIDE.fullmatch(name)}
    integers = next((name for name, tensor in tensors.items() if name not in aside and tensor.dtype in _INTEGERS), None)
    if integers is not None:
        raise CheckpointError(
            f"{tensors[integers].path}: tensor {integers} is of {tensors[integers].dtype}: quantised weights, which "
            "cannot be read; give the bf16 or fp16 weights that they were made from"
        )
    result: dict[str, SourceTensor] = {}
    for name, tensor in tensors.items():
        if name in aside:
            continue
        result[name] = _dequantised(source, name, tensors, scaled=bool(aside)) if tensor.dtype in FLOAT8 else tensor
    return result, tuple(sorted(aside))


def _dequantised(source: Path, name: str, tensors: Mapping[str, SourceTensor], *, scaled: bool) -> SourceTensor:
    stored = tensors[name]
    stem = name.removesuffix("weight")
    scale = next((tensors[stem + end] for end in _SCALES if name != stem and stem + end in tensors), None)
    if scale is None and scaled:
        raise CheckpointError(
            f"{source}: tensor {name} is in eight bits and has no scale ({stem}{_SCALES[0]}), though the file holds "
            "some; use another copy"
        )
    if scale is not None and scale.shape not in ((), (1,), (1, 1), stored.shape[:1], (*stored.shape[:1], 1)):
        raise CheckpointError(
            f"{source}: the scale of tensor {name} has shape {scale.shape}; only one value, or one for each row, can "
            "be read: give the bf16 or fp16 weights"
        )
    return DequantisedTensor(
        path=stored.path, name=name, shape=stored.shape, dtype=torch.bfloat16 if scale is None else torch.float32,
        stored=stored, scale=scale,
    )  # fmt: skip
