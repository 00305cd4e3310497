"""The image encoder of Wan's CLIP file as a folder of transformers: other names, the same bytes.

Names and layers: Wan2.1's ``wan/modules/clip.py``. The file holds a ViT-H/14 under ``visual.`` and a text model, which
Wan's models do not use. Queries, keys and values are one matrix there, in this order of rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_flashi2v.checkpoint.arrangements import Box
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.conversion.containers import open_file
from megatron_flashi2v.conversion.sources import SourceTensor
from megatron_flashi2v.conversion.wan_encoders import EncoderWeights
from megatron_flashi2v.conversion.weights import require_tensors

HEAD_WIDTH = 80
"""Of ViT-H/14: 16 heads in 1280; no shape tells it."""

_VISUAL, _PREFIX = "visual.", "vision_model."
_NAMES = {
    "patch_embedding.weight": "embeddings.patch_embedding.weight",
    "cls_embedding": "embeddings.class_embedding",
    "pos_embedding": "embeddings.position_embedding.weight",
    **{f"pre_norm.{kind}": f"pre_layrnorm.{kind}" for kind in ("weight", "bias")},
    **{f"post_norm.{kind}": f"post_layernorm.{kind}" for kind in ("weight", "bias")},
}
_BLOCK_NAMES = {"norm1": "layer_norm1", "attn.proj": "self_attn.out_proj", "norm2": "layer_norm2",
                "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}  # fmt: skip
_FUSED, _PARTS = "attn.to_qkv", ("q", "k", "v")
_BLOCK = re.compile(r"transformer\.(\d+)\.(.+)\.(weight|bias)")
# The projection behind the last layer, which nothing here uses.
_LEFT_OUT = ("head",)


@dataclass(frozen=True, kw_only=True)
class _Rows(SourceTensor):
    """Rows of another tensor, in another shape.

    Attributes:
        whole: the tensor in the file.
        first: its first row; as many follow as ``shape`` holds values.
    """

    whole: SourceTensor
    first: int = 0

    def read(self, box: Box | None = None) -> torch.Tensor:
        rows = math.prod(self.shape) // math.prod(self.whole.shape[1:])
        inner = (slice(self.first, self.first + rows), *(slice(0, size) for size in self.whole.shape[1:]))
        values = self.whole.read(inner).reshape(self.shape)
        return values if box is None else values[box]


def open_image_encoder(path: Path) -> EncoderWeights:
    """Open ``models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth``.

    Raises:
        CheckpointError: the file is damaged, or of another model.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    held = {
        name.removeprefix(_VISUAL): tensor
        for name, tensor in open_file(path).tensors.items() if name.startswith(_VISUAL)
    }  # fmt: skip
    tensors: dict[str, SourceTensor] = {}
    for name, tensor in held.items():
        if name not in _LEFT_OUT:
            tensors |= _renamed(name, tensor)
    width, _, patch, _ = _shape(path, held, "patch_embedding.weight", 4)
    rows = _shape(path, held, "pos_embedding", 3)[1]
    side = math.isqrt(rows - 1)
    if width % HEAD_WIDTH or side**2 != rows - 1:
        raise CheckpointError(
            f"{path} is {width} wide and has {rows} positions; the vision model of Wan's CLIP has heads of "
            f"{HEAD_WIDTH} and a square of patches beside the class"
        )
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=_shape(path, held, "transformer.0.mlp.0.weight", 2)[0],
        num_hidden_layers=1 + max(int(match[1]) for name in held if (match := _BLOCK.fullmatch(name))),
        num_attention_heads=width // HEAD_WIDTH, image_size=side * patch, patch_size=patch, hidden_act="gelu",
        layer_norm_eps=1e-5, projection_dim=held["head"].shape[1] if "head" in held else 512,
        architectures=["CLIPVisionModel"],
    )  # fmt: skip
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    # Version 5 of transformers has the names without their prefix, and reads them with it, as version 4 does.
    expected = {
        _PREFIX + name.removeprefix(_PREFIX): tuple(value.shape) for name, value in model.state_dict().items()
        if not name.endswith("position_ids")
    }  # fmt: skip
    require_tensors(path, expected, tensors)

    def save_config(folder: Path) -> None:
        config.save_pretrained(str(folder))

    return EncoderWeights(stem="model", tensors=tensors, save_config=save_config)


def image_processor_settings(image_size: int) -> dict[str, Any]:
    """As Wan's own code makes a picture a square of the encoder's size, whatever its aspect; with antialiasing.

    Wan interpolates bicubically without, so that of pictures larger than the square the pixels differ.
    """
    return {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True, "resample": 3,
        "size": {"height": image_size, "width": image_size}, "do_center_crop": False, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip


def _renamed(name: str, tensor: SourceTensor) -> dict[str, SourceTensor]:
    """A tensor of the file by transformers' names: several for the matrix of queries, keys and values."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        shape = tensor.shape[1:] if name == "pos_embedding" else tensor.shape[-1:] if name == "cls_embedding" else None
        return {_PREFIX + _NAMES.get(name, name): tensor if shape is None else _view(tensor, shape)}
    block, layer, kind = match.groups()
    stem = f"{_PREFIX}encoder.layers.{block}"
    if layer != _FUSED:
        return {f"{stem}.{_BLOCK_NAMES.get(layer, layer)}.{kind}": tensor}
    rows = tensor.shape[0] // len(_PARTS)
    return {
        f"{stem}.self_attn.{part}_proj.{kind}": _view(tensor, (rows, *tensor.shape[1:]), number * rows)
        for number, part in enumerate(_PARTS)
    }


def _view(tensor: SourceTensor, shape: tuple[int, ...], first: int = 0) -> SourceTensor:
    return _Rows(path=tensor.path, name=tensor.name, shape=shape, dtype=tensor.dtype, whole=tensor, first=first)


def _shape(path: Path, tensors: Mapping[str, SourceTensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in tensors or len(tensors[name].shape) != dimensions:
        raise CheckpointError(f"{path} holds no tensor {_VISUAL}{name} of {dimensions} dimensions: another model")
    return tensors[name].shape
