"""The diffusion transformer: one pipeline stage of it, or the whole on one stage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from flashi2v_kernels.qk_norm_rope.tables import rope_tables
from megatron_flashi2v.conditioning.build import build_conditioning, paradigm_of
from megatron_flashi2v.conditioning.interface import Extras
from megatron_flashi2v.models.adapters import add_adapters
from megatron_flashi2v.models.attention import Rotary
from megatron_flashi2v.models.backend import block_precision
from megatron_flashi2v.models.context_memory import Known
from megatron_flashi2v.models.embeddings import (
    CONDITIONING_ROWS,
    ImageEmbedding,
    TextEmbedding,
    TimeEmbedding,
    time_and_modulation,
)
from megatron_flashi2v.models.head import Head
from megatron_flashi2v.models.patches import Grid, patchify, token_grid
from megatron_flashi2v.models.placement import mark_parameters
from megatron_flashi2v.models.recompute import Recompute, build_block, run_blocks
from megatron_flashi2v.models.spec import ModelSpec
from megatron_flashi2v.models.stages import Stage, whole_model
from megatron_flashi2v.parallel.packing import PackedShape, pack, unpack
from megatron_flashi2v.parallel.regions import (
    context_block,
    pad_rows,
    rows_per_rank,
    shard_rows,
    shard_tokens,
    sum_in_backward,
)

KEPT_GRIDS = 8
"""Grids whose rotary tables are cached, so that resolution buckets in turn reuse theirs; a grid of 20,000 tokens takes
10 MB."""


@dataclass(frozen=True)
class DiTInputs:
    """Inputs of one forward pass; stages past the first use only the shape.

    Attributes:
        noisy_BCTHW: sigma * noise + (1 - sigma) * latents, fp32, not shifted.
        sinusoid_BF: :func:`~megatron_flashi2v.flow.sinusoid.timestep_sinusoid` of 1000 * sigma, fp32. The host computes
            it beforehand, so that the forward pass does not wait for the device.
        text_BLX: text rows, zero-padded to the model's text length.
        image_latents_BC1HW: normalised latents of the condition image, fp32.
        extras: the paradigm's own draws and settings by name, one row per sample.
        known: what the model's layers have found of the text, where that is kept; without gradients only.
    """

    noisy_BCTHW: Tensor
    sinusoid_BF: Tensor
    text_BLX: Tensor
    image_latents_BC1HW: Tensor
    extras: Extras
    known: Known | None = None


class DiffusionTransformer(MegatronModule):
    """Wan's DiT with an image-to-video paradigm, on megatron-core's parallel linears.

    Shapes: S tokens of this rank, B microbatch, d width. The output is the predicted velocity as patches [S, B, P] in
    fp32 on the last stage, and the packed hop on the others.

    Args:
        spec: settings of all stages.
        stage: the part of the model; by default all of it.
        recompute: activations to compute again in backward; by default none.
    """

    def __init__(self, spec: ModelSpec, stage: Stage | None = None, recompute: Recompute | None = None) -> None:
        super().__init__(config=spec.megatron)
        self.spec = spec
        self.stage = stage or whole_model(spec.config.num_layers)
        self.recompute = recompute or Recompute()
        # Attributes that megatron-core's schedules and gradient finalisation read.
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = self.stage.is_first
        self.post_process = self.stage.is_last
        self.share_embeddings_and_output_weights = False
        self.input_tensor: Tensor | None = None
        self.rotary = lru_cache(maxsize=KEPT_GRIDS)(partial(rotary_of, spec))

        if self.pre_process:
            self.conditioning = build_conditioning(spec.config, spec.kernels.highpass, spec.dtype)
            patch_volume = spec.config.patch_dim // spec.config.latent_channels
            self.patch_embedding = nn.Linear(
                self.conditioning.input_channels * patch_volume, spec.config.hidden_size, dtype=spec.dtype
            )
            self.text_embedding = TextEmbedding(spec)
            if spec.image_rows:
                self.image_embedding = ImageEmbedding(spec)
            self.time_embedding = TimeEmbedding(spec)
        # Keys are global indices: a parameter's name is the same at every layout.
        self.blocks = nn.ModuleDict({str(index): build_block(spec, self.recompute) for index in self.stage.layers})
        if spec.adapter is not None:
            for block in self.blocks.values():
                add_adapters(block, spec, spec.adapter)
        if self.post_process:
            self.head = Head(spec)
        mark_parameters(self, paradigm_of(spec.config))

    def set_input_tensor(self, input_tensor: list[Tensor | None] | Tensor | None) -> None:
        """Take the previous stage's output; megatron-core's schedules call this before :meth:`forward`."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, inputs: DiTInputs) -> Tensor:
        """Velocity as patches [S, B, P] on the last stage, the packed hop [rows, B, d] on the others."""
        grid = self.grid(tuple(inputs.noisy_BCTHW.shape[2:]))
        if self.pre_process:
            hidden_SBD, context_TBD, conditioning_7BD = self.embed(inputs)
        else:
            assert self.input_tensor is not None, "a later stage needs the previous stage's output"
            # Not kept here: the received hop would otherwise outlive the backward pass.
            packed, self.input_tensor = self.input_tensor, None
            hidden_SBD, context_TBD, conditioning_7BD = unpack(packed, self.packed_shape(grid))
        time_BD, modulation_6BD = time_and_modulation(conditioning_7BD)
        rotary = self.rotary(grid, hidden_SBD.device)
        hidden_SBD = self.run_blocks(
            hidden_SBD, context_TBD.to(self.spec.dtype), modulation_6BD, rotary, inputs.known
        )
        if self.post_process:
            return self.head(hidden_SBD, time_BD)
        if torch.is_grad_enabled() and not hidden_SBD.requires_grad:
            # megatron-core's schedules run the backward also of a stage that trains nothing.
            hidden_SBD.requires_grad_()
        return pack(hidden_SBD, context_TBD.to(hidden_SBD.dtype), conditioning_7BD)

    def embed(self, inputs: DiTInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, rows for cross-attention (text, then image) and conditioning rows, from the inputs."""
        groups, patch_size = self.spec.groups, self.spec.config.patch_size
        conditioned = self.conditioning(inputs.noisy_BCTHW, inputs.image_latents_BC1HW, inputs.extras)
        patches = shard_tokens(patchify(conditioned.latents_BCTHW, patch_size), groups)
        hidden_SBD = self.patch_embedding(patches.to(self.patch_embedding.weight.dtype))
        if conditioned.guidance_BCTHW is not None:
            guidance = shard_tokens(patchify(conditioned.guidance_BCTHW, patch_size), groups)
            hidden_SBD = hidden_SBD + self.conditioning.embed_guidance(guidance)
        context_TBD = self.embed_context(inputs, conditioned.image_rows_BRX)
        conditioning_7BD = sum_in_backward(self.time_embedding(inputs.sinusoid_BF), groups)
        return hidden_SBD.to(self.spec.residual_dtype), context_TBD, conditioning_7BD

    def embed_context(self, inputs: DiTInputs, image_rows_BRX: Tensor | None) -> Tensor:
        """This rank's embedded text rows, then rows of the image if there are any: [T, B, d]."""
        known = {} if inputs.known is None else inputs.known
        if self.text_embedding not in known:
            known[self.text_embedding] = self._embed_rows(inputs.text_BLX, image_rows_BRX)
        context_TBD: Tensor = known[self.text_embedding]
        return context_TBD

    def _embed_rows(self, text_BLX: Tensor, image_rows_BRX: Tensor | None) -> Tensor:
        groups = self.spec.groups
        text_TBD: Tensor = self.text_embedding(shard_rows(text_BLX.transpose(0, 1), groups))
        if image_rows_BRX is None:
            return text_TBD
        image_RBD = self.image_embedding(shard_rows(pad_rows(image_rows_BRX.transpose(0, 1), groups), groups))
        return torch.cat([text_TBD, image_RBD.to(text_TBD.dtype)])

    def run_blocks(
        self, hidden_SBD: Tensor, context_TBD: Tensor, modulation_6BD: Tensor, rotary: Rotary,
        known: Known | None = None,
    ) -> Tensor:
        """The residual stream after this stage's blocks."""
        blocks = list(self.blocks.values())
        with block_precision(self.spec.megatron):
            return run_blocks(blocks, self.recompute, hidden_SBD, context_TBD, modulation_6BD, rotary, known)

    def grid(self, latent_shape: tuple[int, ...]) -> Grid:
        """Tokens along time, height and width of latents (T, H, W)."""
        frames, height, width = latent_shape
        return token_grid((frames, height, width), self.spec.config.patch_size)

    def packed_shape(self, grid: Grid) -> PackedShape:
        """Rows of a pipeline hop on this rank."""
        groups = self.spec.groups
        return PackedShape(
            tokens=rows_per_rank(math.prod(grid), groups),
            context=sum(self.spec.context_rows),
            conditioning=CONDITIONING_ROWS,
            dtype=self.spec.residual_dtype,
        )


def rotary_of(spec: ModelSpec, grid: Grid, device: torch.device) -> Rotary:
    """Rotary tables of the grid positions that this context-parallel rank's tokens have."""
    tables = rope_tables(grid, spec.config.head_dim)
    cos_SR, sin_SR = (context_block(table_SR, spec.groups).to(device) for table_SR in tables)
    return Rotary(cos_SR, sin_SR, math.prod(grid))

