"""Files of Wan's own encoders as the folders that diffusers and transformers read: other names, the same bytes.

Names and layers of the text encoder: Wan2.1's ``wan/modules/t5.py``. Its feed-forward layer is
fc2(fc1(x) * gelu(gate(x))) with the tanh form of gelu, and every block has its own table of relative positions, as UMT5
has. The VAE's names are diffusers' own table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_flashi2v.checkpoint.tensor_file import TensorSpec
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.conversion.containers import open_file
from megatron_flashi2v.conversion.sources import SourceTensor
from megatron_flashi2v.conversion.weights import TensorGroup, require_tensors

VAE_CHANNELS = 16
"""Latent channels of Wan2.1's VAE, whose means and deviations diffusers' class has as defaults."""

_T5_NAMES = {
    "token_embedding.weight": "shared.weight",
    "norm.weight": "encoder.final_layer_norm.weight",
}
_T5_BLOCK_NAMES = {
    "norm1.weight": "layer.0.layer_norm.weight",
    **{f"attn.{part}.weight": f"layer.0.SelfAttention.{part}.weight" for part in "qkvo"},
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}
_T5_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True)
class EncoderWeights:
    """One encoder under its library's names.

    Attributes:
        stem: of the file to write.
        tensors: in the file that was opened, by the library's name.
        save_config: writes the library's configuration into a folder.
    """

    stem: str
    tensors: Mapping[str, SourceTensor]
    save_config: Callable[[Path], None]

    def groups(self) -> list[TensorGroup]:
        """The tensors, one by one, as they are written."""
        return [
            TensorGroup(
                specs=(TensorSpec(name=name, dtype=tensor.dtype, shape=tensor.shape),), load=partial(_read, tensor)
            )
            for name, tensor in self.tensors.items()
        ]


def _read(tensor: SourceTensor) -> tuple[torch.Tensor]:
    return (tensor.read(),)


def open_vae(path: Path) -> EncoderWeights:
    """Open ``Wan2.1_VAE.pth``.

    Raises:
        CheckpointError: the file is damaged, or of another model, such as Wan2.2's VAE of 48 channels.
    """
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    held = open_file(path).tensors
    first, channels = _shape(path, held, "encoder.conv1.weight"), _shape(path, held, "conv2.weight")[0]
    if channels != VAE_CHANNELS:
        raise CheckpointError(
            f"{path} is a VAE of {channels} latent channels; only Wan2.1's of {VAE_CHANNELS} can be converted: take "
            "another one's folder from a repository in the layout of diffusers"
        )
    tensors = convert_wan_vae_to_diffusers(dict(held))
    with torch.device("meta"):
        model: Any = AutoencoderKLWan(base_dim=first[0], z_dim=channels)
    _require(path, model, tensors)
    return EncoderWeights(
        stem="diffusion_pytorch_model", tensors=tensors, save_config=lambda folder: model.save_config(folder)
    )


def open_text_encoder(path: Path) -> EncoderWeights:
    """Open ``models_t5_umt5-xxl-enc-bf16.pth``.

    Raises:
        CheckpointError: the file is damaged, or of another model.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    held = open_file(path).tensors
    tensors = {_t5_name(name): tensor for name, tensor in held.items()}
    words, width = _shape(path, held, "token_embedding.weight")
    buckets, heads = _shape(path, held, "blocks.0.pos_embedding.embedding.weight")
    config = UMT5Config(
        vocab_size=words, d_model=width, d_kv=_shape(path, held, "blocks.0.attn.q.weight")[0] // heads,
        d_ff=_shape(path, held, "blocks.0.ffn.fc1.weight")[0], num_heads=heads,
        num_layers=1 + max(int(match[1]) for name in held if (match := _T5_BLOCK.fullmatch(name))),
        relative_attention_num_buckets=buckets, feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
        architectures=["UMT5EncoderModel"],
    )  # fmt: skip
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    _require(path, model, tensors)
    return EncoderWeights(stem="model", tensors=tensors, save_config=lambda folder: config.save_pretrained(str(folder)))


def _t5_name(name: str) -> str:
    match = _T5_BLOCK.fullmatch(name)
    if match and match[2] in _T5_BLOCK_NAMES:
        return f"encoder.block.{match[1]}.{_T5_BLOCK_NAMES[match[2]]}"
    return _T5_NAMES.get(name, name)


def _shape(path: Path, tensors: Mapping[str, SourceTensor], name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise CheckpointError(f"{path} holds no tensor {name}: it is of another model")
    return tensors[name].shape


def _require(path: Path, model: Any, tensors: Mapping[str, SourceTensor]) -> None:
    """Compare names and shapes with those of the library's class, without the tensors that it ties to others."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items() if "embed_tokens" not in name}
    require_tensors(path, expected, tensors)
