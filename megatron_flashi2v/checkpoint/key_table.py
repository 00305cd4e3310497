"""The one table of parameter names: ours, original Wan and FlashI2V main, diffusers, FlashI2V npu.

``BACKBONE`` lists every tensor of the text-to-video model once: our name and shape, its names in the other formats, and
the arrangement of its values there. A paradigm's class lists the tensors that it adds
(``ImageConditioning.own_tensors``). Whatever reads, writes or counts parameters loops over both. Source of the names:
the state dicts of diffusers' ``WanTransformer3DModel`` and of both FlashI2V branches.

Sizes in shapes are symbols that a :class:`ModelConfig` gives values: d hidden, f feed-forward, P values in a patch of
latents, in and P_in channels and values in a patch of the patch embedding's input (wider in paradigms that
concatenate), text, freq and image input widths, pt ph pw the patch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_flashi2v.checkpoint.arrangements import (
    Box,
    FusedHeads,
    ReadBox,
    Reshape,
    Same,
    Shape,
    Size,
    Sizes,
    Transform,
)
from megatron_flashi2v.conditioning.build import input_channels, paradigm_of
from megatron_flashi2v.conditioning.interface import MODULE
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.models.placement import fused_parts

EXTERNAL_COLUMNS = ("wan", "diffusers", "flashi2v_npu")
"""The table's columns of external names; a format (``conversion/formats/``) uses one or two of them."""

_SAME = Same()


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of a module: our shape, and its arrangement in other formats."""

    shape: Sizes
    transform: Transform = _SAME


@dataclass(frozen=True, kw_only=True)
class Module:
    """One row of the table: a module's tensors and its names.

    ``{i}`` is the block's number and ``{part}`` one of the projections that our tensor fuses. A tensor's key "" is a
    parameter outside any module. ``of_image_rows`` marks modules that only models with an image encoder's rows have.
    """

    ours: str
    wan: str
    diffusers: str
    flashi2v_npu: str
    tensors: Mapping[str, Tensor]
    of_image_rows: bool = False

    @property
    def in_blocks(self) -> bool:
        """Whether every block has this module."""
        return "{i}" in self.ours


def _linear(rows: Size, columns: Size, transform: Transform = _SAME) -> dict[str, Tensor]:
    return {
        "weight": Tensor(shape=(rows, columns), transform=transform),
        "bias": Tensor(shape=(rows,), transform=transform),
    }


def _conv_as_linear(rows: Size, columns: Size, *external: Size) -> dict[str, Tensor]:
    """A convolution whose stride is its kernel: ours is a matrix product."""
    return {
        "weight": Tensor(shape=(rows, columns), transform=Reshape(external)),
        "bias": Tensor(shape=(rows,)),
    }


def _vectors(*names: str) -> dict[str, Tensor]:
    return {name: Tensor(shape=("d",)) for name in names}


def _attention(ours: str, original: str, diffusers: str, fused: str) -> tuple[Module, ...]:
    """The rows of one attention: ``fused`` fuses some projections; a query left over has its own."""
    parts = fused_parts(f"blocks.{{i}}.{ours}.{fused}.weight")

    def row(name: str, external: tuple[str, str, str], tensors: Mapping[str, Tensor]) -> Module:
        wan, diffusers_name, npu = external
        return Module(
            ours=f"blocks.{{i}}.{ours}.{name}",
            wan=f"blocks.{{i}}.{original}.{wan}",
            diffusers=f"blocks.{{i}}.{diffusers}.{diffusers_name}",
            flashi2v_npu=f"blocks.{{i}}.{original}.{npu}",
            tensors=tensors,
        )

    rows = [
        row(
            fused, ("{part}", "to_{part}", "proj_{part}"), _linear((len(parts), "d"), "d", FusedHeads(parts))
        ),
        row("norm_q", ("norm_q", "norm_q", "q_norm"), _vectors("weight")),
        row("norm_k", ("norm_k", "norm_k", "k_norm"), _vectors("weight")),
        row("linear_proj", ("o", "to_out.0", "proj_out"), _linear("d", "d")),
    ]
    if "q" not in parts:
        rows.insert(0, row("linear_q", ("q", "to_q", "proj_q"), _linear("d", "d")))
    return tuple(rows)


def _image_embedding(ours: str, original: str, diffusers: str, tensors: Mapping[str, Tensor]) -> Module:
    """A row of the embedding of an image encoder's rows, which FlashI2V's branches have not."""
    wan = f"img_emb.proj.{original}"
    return Module(
        ours=f"image_embedding.{ours}", wan=wan, diffusers=f"condition_embedder.image_embedder.{diffusers}",
        flashi2v_npu=wan, tensors=tensors, of_image_rows=True,
    )


def _image_keys(ours: str, original: str, diffusers: str, tensors: Mapping[str, Tensor]) -> Module:
    """A row of the keys and values of an image encoder's rows, likewise."""
    wan = f"blocks.{{i}}.cross_attn.{original}"
    return Module(
        ours=f"blocks.{{i}}.cross_attention.{ours}", wan=wan, diffusers=f"blocks.{{i}}.attn2.{diffusers}",
        flashi2v_npu=wan, tensors=tensors, of_image_rows=True,
    )


BACKBONE: tuple[Module, ...] = (
    Module(
        ours="patch_embedding",
        wan="patch_embedding",
        diffusers="patch_embedding",
        flashi2v_npu="patch_embedding",
        tensors=_conv_as_linear("d", "P_in", "d", "in", "pt", "ph", "pw"),
    ),
    Module(
        ours="text_embedding.linear_1",
        wan="text_embedding.0",
        diffusers="condition_embedder.text_embedder.linear_1",
        flashi2v_npu="text_embedding.linear_1",
        tensors=_linear("d", "text"),
    ),
    Module(
        ours="text_embedding.linear_2",
        wan="text_embedding.2",
        diffusers="condition_embedder.text_embedder.linear_2",
        flashi2v_npu="text_embedding.linear_2",
        tensors=_linear("d", "d"),
    ),
    _image_embedding("norm_in", "0", "norm1", {"weight": Tensor(shape=("image",)), "bias": Tensor(shape=("image",))}),
    _image_embedding("linear_1", "1", "ff.net.0.proj", _linear("image", "image")),
    _image_embedding("linear_2", "3", "ff.net.2", _linear("d", "image")),
    _image_embedding("norm_out", "4", "norm2", _vectors("weight", "bias")),
    Module(
        ours="time_embedding.linear_1",
        wan="time_embedding.0",
        diffusers="condition_embedder.time_embedder.linear_1",
        flashi2v_npu="time_embedding.0",
        tensors=_linear("d", "freq"),
    ),
    Module(
        ours="time_embedding.linear_2",
        wan="time_embedding.2",
        diffusers="condition_embedder.time_embedder.linear_2",
        flashi2v_npu="time_embedding.2",
        tensors=_linear("d", "d"),
    ),
    Module(
        ours="time_embedding.projection",
        wan="time_projection.1",
        diffusers="condition_embedder.time_proj",
        flashi2v_npu="time_projection.1",
        tensors=_linear((6, "d"), "d"),
    ),
    Module(
        ours="blocks.{i}.modulation",
        wan="blocks.{i}.modulation",
        diffusers="blocks.{i}.scale_shift_table",
        flashi2v_npu="blocks.{i}.modulation",
        tensors={"": Tensor(shape=(6, "d"), transform=Reshape((1, 6, "d")))},
    ),
    *_attention("self_attention", "self_attn", "attn1", "linear_qkv"),
    Module(
        ours="blocks.{i}.norm_cross",
        wan="blocks.{i}.norm3",
        diffusers="blocks.{i}.norm2",
        flashi2v_npu="blocks.{i}.norm3",
        tensors=_vectors("weight", "bias"),
    ),
    *_attention("cross_attention", "cross_attn", "attn2", "linear_kv"),
    _image_keys("linear_kv_image", "{part}_img", "add_{part}_proj", _linear((2, "d"), "d", FusedHeads(("k", "v")))),
    _image_keys("norm_k_image", "norm_k_img", "norm_added_k", _vectors("weight")),
    Module(
        ours="blocks.{i}.mlp.linear_fc1",
        wan="blocks.{i}.ffn.0",
        diffusers="blocks.{i}.ffn.net.0.proj",
        flashi2v_npu="blocks.{i}.ffn.0",
        tensors=_linear("f", "d"),
    ),
    Module(
        ours="blocks.{i}.mlp.linear_fc2",
        wan="blocks.{i}.ffn.2",
        diffusers="blocks.{i}.ffn.net.2",
        flashi2v_npu="blocks.{i}.ffn.2",
        tensors=_linear("d", "f"),
    ),
    Module(
        ours="head.modulation",
        wan="head.modulation",
        diffusers="scale_shift_table",
        flashi2v_npu="head.modulation",
        tensors={"": Tensor(shape=(2, "d"), transform=Reshape((1, 2, "d")))},
    ),
    Module(
        ours="head.linear",
        wan="head.head",
        diffusers="proj_out",
        flashi2v_npu="head.head",
        tensors=_linear("P", "d"),
    ),
)

@dataclass(frozen=True, kw_only=True)
class Mapped:
    """One tensor of a concrete model and its counterparts in one column.

    Attributes:
        ours: our name.
        shape: our shape.
        external: the external tensors' names; several where ours fuses them.
        external_shape: shape of each of them.
        transform: arrangement of the values.
        heads: attention heads of the model.
    """

    ours: str
    shape: Shape
    external: tuple[str, ...]
    external_shape: Shape
    transform: Transform
    heads: int

    def to_external(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Our tensor as the external ones, in the order of ``external``."""
        return self.transform.to_external(tensor, self.external_shape, self.heads)

    def to_ours(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The external tensors, in the order of ``external``, as ours."""
        return self.transform.to_ours(tensors, self.shape, self.heads)

    def read(self, read: ReadBox, box: Box) -> torch.Tensor:
        """Read ``box`` of our tensor; ``read`` reads boxes of the external ones."""
        return self.transform.read_box(read, self.external, box, self.shape, self.external_shape, self.heads)


def mappings(config: ModelConfig, column: str) -> Iterator[Mapped]:
    """Yield every tensor of a model that a column names, in the model's order.

    Leaves out a paradigm's own tensors for diffusers, whose transformer has no place for them.
    """
    if column not in EXTERNAL_COLUMNS:
        raise ValueError(f"no such column: {column}; the table has {', '.join(EXTERNAL_COLUMNS)}")
    sizes = _sizes(config)
    for module, block in _instances(config):
        external = getattr(module, column)
        for key, tensor in module.tensors.items():
            shape = _shape(tensor.shape, sizes)
            transform = tensor.transform
            parts: tuple[str, ...] = ("",)
            external_shape = shape
            if isinstance(transform, FusedHeads):
                parts = transform.parts
                external_shape = (shape[0] // len(parts), *shape[1:])
            elif isinstance(transform, Reshape):
                external_shape = _shape(transform.external, sizes)
            yield Mapped(
                ours=_name(module.ours, key, block),
                shape=shape,
                external=tuple(_name(external, key, block).replace("{part}", part) for part in parts),
                external_shape=external_shape,
                transform=transform,
                heads=config.num_attention_heads,
            )
    if column != "diffusers":
        yield from conditioning_mappings(config, column)


def conditioning_mappings(config: ModelConfig, column: str) -> Iterator[Mapped]:
    """The paradigm's own tensors, in the module's order."""
    paradigm = paradigm_of(config)
    for name, tensor in paradigm.own_tensors(config).items():
        external_shape = tensor.external_shape or tensor.shape
        yield Mapped(
            ours=f"{MODULE}.{name}",
            shape=tensor.shape,
            external=(paradigm.external_name(name, column),),
            external_shape=external_shape,
            transform=_SAME if external_shape == tensor.shape else Reshape(external_shape),
            heads=config.num_attention_heads,
        )


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Our global names and shapes of all of a model's parameters, in the model's order."""
    sizes = _sizes(config)
    backbone = {
        _name(module.ours, key, block): _shape(tensor.shape, sizes)
        for module, block in _instances(config)
        for key, tensor in module.tensors.items()
    }
    own_tensors = paradigm_of(config).own_tensors(config)
    return backbone | {f"{MODULE}.{name}": tensor.shape for name, tensor in own_tensors.items()}


def external_name(ours: str, column: str) -> str:
    """External name of one of the backbone's tensors, which fuses nothing.

    Raises:
        KeyError: the table has no such tensor.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", ours)
    template, block = (f"blocks.{{i}}.{match[2]}", int(match[1])) if match else (ours, 0)
    for module in BACKBONE:
        for key in module.tensors:
            if template == (f"{module.ours}.{key}" if key else module.ours):
                return _name(getattr(module, column), key, block)
    raise KeyError(ours)


def parameter_count(config: ModelConfig) -> int:
    """Number of a model's parameters."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def _instances(config: ModelConfig) -> Iterator[tuple[Module, int]]:
    """Yield the backbone's modules with their block's number (0 outside of blocks), in the model's order."""
    has_image_rows = paradigm_of(config).image_rows(config) > 0
    rows = [row for row in BACKBONE if has_image_rows or not row.of_image_rows]
    first = next(index for index, row in enumerate(rows) if row.in_blocks)
    yield from ((row, 0) for row in rows[:first])
    yield from ((row, block) for block in range(config.num_layers) for row in rows if row.in_blocks)
    yield from ((row, 0) for row in rows[first:] if not row.in_blocks)


def _sizes(config: ModelConfig) -> dict[str, int]:
    pt, ph, pw = config.patch_size
    channels = input_channels(config)
    return {
        "d": config.hidden_size,
        "f": config.ffn_hidden_size,
        "P": config.patch_dim,
        "in": channels,
        "P_in": channels * pt * ph * pw,
        "text": config.text_dim,
        "freq": config.freq_dim,
        "image": config.image_dim,
        "pt": pt,
        "ph": ph,
        "pw": pw,
    }


def _shape(symbols: Sizes, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(_size(symbol, sizes) for symbol in symbols)


def _size(symbol: Size, sizes: Mapping[str, int]) -> int:
    if isinstance(symbol, tuple):
        return symbol[0] * sizes[symbol[1]]
    return sizes[symbol] if isinstance(symbol, str) else symbol


def _name(template: str, key: str, block: int) -> str:
    name = template.replace("{i}", str(block))
    return f"{name}.{key}" if key else name
