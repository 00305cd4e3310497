"""Initial weights, drawn per global parameter name so that every layout starts from the same model.

Each full tensor is drawn on the host from a generator keyed by the seed and the parameter's name; a tensor-parallel
rank keeps its slice, and of that a rank of sharded weights its stretch. The distributions are Wan's (Xavier-uniform
matrices, normal text and time embeddings, scaled normal modulation, zero head) and FlashI2V's for what it adds. Columns
of the patch embedding for channels that a paradigm appends to the latents, and the values of an image encoder's rows in
cross-attention, start at zero: whatever the paradigm, the
first step is the text-to-video model's. An adapter's A is uniform within 1 / sqrt(inputs), as in the package peft, and
its B zero: the first step is the base model's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_flashi2v.conditioning.build import paradigm_of
from megatron_flashi2v.conditioning.interface import MODULE
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.models.placement import fused_parts
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.models.weight_shards import WeightShard, whole_weights
from megatron_flashi2v.parallel.placement import ShardGrid
from megatron_flashi2v.runtime.random import keyed_generator

ZERO = "head.linear.weight"
IMAGE_VALUES = "cross_attention.linear_kv_image.weight"
SMALL_NORMAL = ("text_embedding.linear_", "time_embedding.linear_")


@torch.no_grad()
def initialize_weights(model: DiffusionTransformer, seed: int) -> None:
    """Draw this rank's share of every parameter, in place."""
    group = model.spec.groups.tp
    grid = ShardGrid(tp_rank=group.rank(), tp_size=group.size())
    initialize_shards(whole_weights(model.named_parameters(), grid), model.spec.config, seed)


@torch.no_grad()
def initialize_shards(shards: Iterable[WeightShard], config: ModelConfig, seed: int) -> None:
    """Draw weights in place; beside them the host holds one whole tensor at a time.

    Args:
        shards: this rank's.
        config: of the model.
        seed: key of the draws.
    """
    own_tensors = paradigm_of(config).own_tensors(config)
    zero = {ZERO, *(f"{MODULE}.{name}" for name, tensor in own_tensors.items() if tensor.starts_at_zero)}
    for shard in shards:
        if shard.data.numel() == 0:
            continue
        name, box = shard.name, shard.box
        full = torch.zeros(box.global_shape)
        if name == "patch_embedding.weight":
            full[:, : config.patch_dim] = _draw(name, (len(full), config.patch_dim), seed)
        elif name not in zero:
            full = _draw(name, box.global_shape, seed)
        if name.endswith(IMAGE_VALUES):
            # Rows are (head, {k, v}, D).
            full.unflatten(0, (config.num_attention_heads, len(fused_parts(name)), -1))[:, 1] = 0
        shard.data.copy_(shard.part_of(full[box.slices]))


def _draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = keyed_generator(seed, "initial-weight", name)
    if name.endswith(("bias", "lora_B.weight")):
        return torch.zeros(shape)
    if name.endswith("lora_A.weight"):
        return (2.0 * torch.rand(shape, generator=generator) - 1.0) / math.sqrt(shape[-1])
    if name.endswith("modulation"):
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
    if len(shape) == 1:
        return torch.ones(shape)
    if name.startswith(SMALL_NORMAL):
        return 0.02 * torch.randn(shape, generator=generator)
    # A fused matrix is several square ones: each has its own fan-out. A convolution counts as Linear over its patch.
    fan_out, fan_in = shape[0] // max(len(fused_parts(name)), 1), math.prod(shape[1:])
    bound = math.sqrt(6.0 / (fan_in + fan_out))
    return (2.0 * torch.rand(shape, generator=generator) - 1.0) * bound
