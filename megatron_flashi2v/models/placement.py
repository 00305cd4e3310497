"""Facts about every parameter that hold at every layout, declared once, by its global name.

Initialization, checkpoints, the optimizer's state, converters and megatron-core's reductions all read them here. A
parameter that is not declared cannot be built: a forgotten mark would show as a wrong gradient at some layouts only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from megatron_flashi2v.conditioning.interface import ImageConditioning
from megatron_flashi2v.parallel.placement import ParameterBox, ShardGrid, box_of_shard

PARADIGM_PREFIX = "conditioning."
"""First part of the names of a paradigm's own parameters."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Facts about one parameter.

    Attributes:
        sharded_dim: dimension that tensor-parallel ranks divide; None: each holds the whole.
        fused: projections whose rows the tensor holds in turn, head by head; empty for a single one.
        on_tokens: whether it acts on single tokens, text or image rows. Under sequence parallelism a rank's gradient
            then covers its own rows alone, and is summed over the tensor-parallel group.
    """

    sharded_dim: int | None = None
    fused: tuple[str, ...] = ()
    on_tokens: bool = False


def _column(*fused: str) -> dict[str, Placement]:
    """A linear with sharded outputs."""
    return {name: Placement(sharded_dim=0, fused=fused) for name in ("weight", "bias")}


_WHOLE, _ON_TOKENS = Placement(), Placement(on_tokens=True)
_LINEAR = {"weight": _WHOLE, "bias": _WHOLE}
_LINEAR_ON_TOKENS = {"weight": _ON_TOKENS, "bias": _ON_TOKENS}
# A linear with sharded inputs; its bias is added to each rank's tokens once the partial products are summed.
_ROW = {"weight": Placement(sharded_dim=1), "bias": _ON_TOKENS}
_NORM_OF_HEADS = {"weight": Placement(sharded_dim=0)}

_MODULES: Mapping[str, Mapping[str, Placement]] = {
    "patch_embedding": _LINEAR_ON_TOKENS,
    "text_embedding.linear_1": _column(),
    "text_embedding.linear_2": _ROW,
    "image_embedding.norm_in": _LINEAR_ON_TOKENS,
    "image_embedding.linear_1": _LINEAR_ON_TOKENS,
    "image_embedding.linear_2": _LINEAR_ON_TOKENS,
    "image_embedding.norm_out": _LINEAR_ON_TOKENS,
    "time_embedding.linear_1": _LINEAR,
    "time_embedding.linear_2": _LINEAR,
    "time_embedding.projection": _column(),
    "blocks.{i}": {"modulation": _ON_TOKENS},
    "blocks.{i}.self_attention.linear_qkv": _column("q", "k", "v"),
    "blocks.{i}.self_attention.norm_q": _NORM_OF_HEADS,
    "blocks.{i}.self_attention.norm_k": _NORM_OF_HEADS,
    "blocks.{i}.self_attention.linear_proj": _ROW,
    "blocks.{i}.norm_cross": _LINEAR_ON_TOKENS,
    "blocks.{i}.cross_attention.linear_q": _column(),
    "blocks.{i}.cross_attention.linear_kv": _column("k", "v"),
    "blocks.{i}.cross_attention.norm_q": _NORM_OF_HEADS,
    "blocks.{i}.cross_attention.norm_k": _NORM_OF_HEADS,
    "blocks.{i}.cross_attention.linear_kv_image": _column("k", "v"),
    "blocks.{i}.cross_attention.norm_k_image": _NORM_OF_HEADS,
    "blocks.{i}.cross_attention.linear_proj": _ROW,
    "blocks.{i}.mlp.linear_fc1": _column(),
    "blocks.{i}.mlp.linear_fc2": _ROW,
    "head": {"modulation": _ON_TOKENS},
    "head.linear": _LINEAR_ON_TOKENS,
}

PLACEMENTS: dict[str, Placement] = {
    f"{module}.{tensor}": placement for module, tensors in _MODULES.items() for tensor, placement in tensors.items()
}
"""Every parameter but a paradigm's own, ``{i}`` for the block's number; those of the image's rows are not in all."""


ADAPTER = re.compile(r"(?P<linear>blocks\.\d+\..+)\.adapter\.(?:[a-z]\.)?lora_(?P<factor>[AB])\.weight")
"""Names of adapters' tensors, as :func:`adapter_name` makes them."""


def adapter_name(linear: str, part: str, factor: str) -> str:
    """Global name of one factor of a low-rank pair.

    Args:
        linear: global name of the linear beside which it stands, such as blocks.0.self_attention.linear_qkv.
        part: which of the projections that the linear fuses; empty of a single one.
        factor: lora_A or lora_B.
    """
    return ".".join(filter(None, (linear, "adapter", part, factor, "weight")))


def _factor(linear: str, factor: str) -> Placement:
    """One factor of a pair is sharded as its linear is; the other, which acts on single tokens, is whole."""
    dim = _backbone(f"{linear}.weight").sharded_dim
    shares_dim = (factor == "B") == (dim == 0)
    return Placement(sharded_dim=dim) if shares_dim else _ON_TOKENS


def _backbone(name: str) -> Placement:
    adapter = ADAPTER.fullmatch(name)
    if adapter is not None:
        return _factor(adapter["linear"], adapter["factor"])
    placement = PLACEMENTS.get(re.sub(r"^blocks\.\d+\.", "blocks.{i}.", name))
    if placement is None:
        raise LookupError(f"parameter {name} has no placement; declare it in models/placement.py")
    return placement


def sharded_dim(name: str) -> int | None:
    """The dimension of a parameter that tensor-parallel ranks divide; None where each holds the whole.

    A paradigm's own parameters are whole everywhere: its layer knows no ranks.

    Raises:
        LookupError: it is not declared.
    """
    return None if name.startswith(PARADIGM_PREFIX) else _backbone(name).sharded_dim


def fused_parts(name: str) -> tuple[str, ...]:
    """The projections that one parameter fuses; empty for a single one.

    Raises:
        LookupError: it is not declared.
    """
    return () if name.startswith(PARADIGM_PREFIX) else _backbone(name).fused


def parameter_box(name: str, shape: Sequence[int], grid: ShardGrid) -> ParameterBox:
    """The box of the whole tensor that a rank's parameter is.

    Args:
        name: global name.
        shape: of the rank's parameter.
        grid: the rank's place.

    Raises:
        LookupError: it is not declared.
    """
    return box_of_shard(shape, sharded_dim(name), grid)


def placement_of(name: str, paradigm: type[ImageConditioning]) -> Placement:
    """All facts about one parameter.

    Args:
        name: global name.
        paradigm: the model's, which declares its own parameters by their modules.

    Raises:
        LookupError: it is not declared.
    """
    if not name.startswith(PARADIGM_PREFIX):
        return _backbone(name)
    module = name.removeprefix(PARADIGM_PREFIX).partition(".")[0]
    if module in paradigm.token_modules:
        return _ON_TOKENS
    if module in paradigm.latent_modules:
        return _WHOLE
    raise LookupError(
        f"parameter {name} has no placement; list {module} in {paradigm.__name__}.token_modules or .latent_modules"
    )


def mark_parameters(model: nn.Module, paradigm: type[ImageConditioning]) -> None:
    """Set the attributes that megatron-core reads to count a parameter in norms and to sum its gradient.

    Args:
        model: a stage, complete.
        paradigm: the model's.

    Raises:
        LookupError: a parameter is not declared.
    """
    for name, parameter in model.named_parameters():
        placement = placement_of(name, paradigm)
        sharded = placement.sharded_dim is not None
        marks = {
            "tensor_model_parallel": sharded,
            "partition_dim": placement.sharded_dim if sharded else -1,
            "partition_stride": 1,
            "sequence_parallel": placement.on_tokens,
        }
        for attribute, value in marks.items():
            setattr(parameter, attribute, value)
