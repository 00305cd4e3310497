"""The predicted velocity on every rank, whatever the model's layout."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor

from megatron_flashi2v.conditioning.interface import Extras
from megatron_flashi2v.flow.sinusoid import timestep_sinusoid
from megatron_flashi2v.models.context_memory import ContextMemory
from megatron_flashi2v.models.patches import unpatchify
from megatron_flashi2v.models.spec import ModelSpec
from megatron_flashi2v.models.transformer import DiffusionTransformer, DiTInputs
from megatron_flashi2v.parallel.regions import gather_tokens


def predict_velocity(
    stages: Sequence[DiffusionTransformer] | DiffusionTransformer,
    latents_BCTHW: Tensor,
    timestep_B: Tensor,
    text_BLX: Tensor,
    image_latents_BC1HW: Tensor,
    extras: Extras,
    memory: ContextMemory | None = None,
) -> Tensor:
    """Velocity [B, C, T, H, W] in fp32, the same on every rank of the replica.

    Every rank calls it with the same arguments, as in :class:`~megatron_flashi2v.models.transformer.DiTInputs`.
    Gradients flow where the model has one stage.

    Args:
        stages: this rank's, in the order of the activation; a model of one stage may stand alone.
        latents_BCTHW: the noisy latents, fp32.
        timestep_B: 1000 * sigma, fp32, on the host: a device's would be waited for.
        text_BLX: text rows, zero-padded to the model's text length.
        image_latents_BC1HW: normalised latents of the condition image, fp32.
        extras: the paradigm's own settings.
        memory: of this model's contexts, where no gradient is wanted.
    """
    stages = [stages] if isinstance(stages, DiffusionTransformer) else stages
    spec = stages[0].spec
    known = None if memory is None else memory.of(text_BLX, extras)
    inputs = DiTInputs(latents_BCTHW, _sinusoid(spec, timestep_B), text_BLX, image_latents_BC1HW, extras, known)
    grid = stages[0].grid(tuple(latents_BCTHW.shape[2:]))
    for model in stages:
        if not model.stage.is_first:
            model.set_input_tensor(_receive(model, grid, len(timestep_B)))
        output = model(inputs)
        if not model.stage.is_last:
            _send(model, output)
    patches_SBP = _from_last_stage(stages[-1], output, grid, len(timestep_B))
    return unpatchify(gather_tokens(patches_SBP, math.prod(grid), spec.groups), grid, spec.config.patch_size)


def _sinusoid(spec: ModelSpec, timestep_B: Tensor) -> Tensor:
    """The timestep's features [B, F] on the model's device; the host does not wait for a copy from pinned memory."""
    sinusoid_BF = timestep_sinusoid(timestep_B, spec.config.freq_dim)
    return sinusoid_BF if spec.device.type == "cpu" else sinusoid_BF.pin_memory().to(spec.device, non_blocking=True)


def _neighbour(model: DiffusionTransformer, step: int) -> int:
    """Global rank of the pipeline rank that many places on."""
    pipeline = model.spec.groups.pp
    return torch.distributed.get_global_rank(pipeline, (pipeline.rank() + step) % pipeline.size())


def _receive(model: DiffusionTransformer, grid: tuple[int, int, int], batch: int) -> Tensor:
    rows, width = model.packed_shape(grid).rows, model.spec.config.hidden_size
    hop = torch.empty(rows, batch, width, dtype=model.spec.residual_dtype, device=model.spec.device)
    torch.distributed.recv(hop, _neighbour(model, -1), group=model.spec.groups.pp)
    return hop


def _send(model: DiffusionTransformer, hop: Tensor) -> None:
    torch.distributed.send(hop.contiguous(), _neighbour(model, 1), group=model.spec.groups.pp)


def _from_last_stage(model: DiffusionTransformer, output: Tensor, grid: tuple[int, int, int], batch: int) -> Tensor:
    """The last stage's patches [S, B, P] of this rank's tokens, on every pipeline rank."""
    groups, config = model.spec.groups, model.spec.config
    if groups.pp.size() == 1:
        return output
    patches = output if model.stage.is_last else torch.empty(
        model.packed_shape(grid).tokens, batch, config.patch_dim, dtype=torch.float32, device=model.spec.device
    )
    last = torch.distributed.get_global_rank(groups.pp, groups.pp.size() - 1)
    torch.distributed.broadcast(patches, last, group=groups.pp)
    return patches
