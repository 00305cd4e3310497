"""The training step that ours is compared with: diffusers' model and torch's optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import RecomputeArguments
from megatron_flashi2v.flow.interpolation import interpolate, velocity_target
from megatron_flashi2v.flow.sigmas import timesteps_of
from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.training.batch import Microbatch


class PeerStep:
    """The same sizes in diffusers' WanTransformer3DModel: text to video, torch's AdamW, clipping to 1.

    Args:
        config: the model, without image conditioning.
        batch: the same latents, noise, sigmas and text.
        dtype: of the weights, but for what diffusers keeps in fp32.
        device: where it runs.
        recompute: all blocks are recomputed if ours recompute anything.
        compiled: whether torch compiles its blocks, all by one compilation.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: Microbatch,
        dtype: torch.dtype,
        device: Device,
        recompute: RecomputeArguments,
        *,
        compiled: bool = False,
    ) -> None:
        from diffusers import WanTransformer3DModel

        self.model: Any  # diffusers' annotations hide that it is a module
        with device.torch_device:
            self.model = WanTransformer3DModel(
                patch_size=config.patch_size, num_attention_heads=config.num_attention_heads,
                attention_head_dim=config.head_dim, in_channels=config.latent_channels,
                out_channels=config.latent_channels, text_dim=config.text_dim, freq_dim=config.freq_dim,
                ffn_dim=config.ffn_hidden_size, num_layers=config.num_layers,
            )
        kept = tuple(self.model._keep_in_fp32_modules or ())
        for name, parameter in self.model.named_parameters():
            if not any(part in name for part in kept):
                parameter.data = parameter.data.to(dtype)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_(std=0.02)  # as ours
        if recompute.recompute_granularity is not None:
            self.model.enable_gradient_checkpointing()
        self.model.train()
        if compiled:
            self.model.compile_repeated_blocks(fullgraph=True)
        self.dtype, self.batch = dtype, batch
        fused = device.name != "cpu"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, weight_decay=0.01, fused=fused or None)

    def __call__(self) -> None:
        """Forward, backward and update."""
        batch = self.batch
        noisy = interpolate(batch.latents_BCTHW, batch.noise_BCTHW, batch.sigma_B).to(self.dtype)
        velocity = self.model(
            noisy, timesteps_of(batch.sigma_B), batch.text_BLX.to(self.dtype), return_dict=False
        )[0]
        target = velocity_target(batch.latents_BCTHW, batch.noise_BCTHW)
        (velocity.float() - target).square().mean().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
