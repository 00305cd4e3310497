"""Floating-point operations of a model's definition, however they are computed.

The numerator of MFU: two for every multiplication with its addition, in matrix products, attention and convolutions.
Left out are elementwise work, the Fourier high-pass (a few thousandths of a percent) and whatever a run does twice
(recomputation, the scores of flash attention's backward).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_flashi2v.conditioning.build import input_channels, paradigm_of
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.models.patches import token_grid

BACKWARD = 2
"""Backward's work over forward's: the gradients of a product with respect to both factors."""


def forward_flops(config: ModelConfig, latent_shape: tuple[int, int, int], batch: int = 1) -> Mapping[str, int]:
    """One forward pass, by part of the model.

    Args:
        config: dimensions and paradigm.
        latent_shape: latent frames, rows and columns.
        batch: samples.
    """
    tokens = math.prod(token_grid(latent_shape, config.patch_size))
    text, width, layers = config.text_length, config.hidden_size, config.num_layers
    image = paradigm_of(config).image_rows(config)
    patch_volume = math.prod(config.patch_size)
    # multiplications with an addition, of one sample
    parts = {
        "patch_embedding": tokens * input_channels(config) * patch_volume * width,
        **paradigm_of(config).multiply_adds(config, latent_shape, tokens),
        "text_embedding": text * (config.text_dim * width + width**2),
        "time_embedding": config.freq_dim * width + width**2 + 6 * width**2,
        "self_attention_linears": layers * tokens * 4 * width**2,
        "self_attention": layers * 2 * tokens**2 * width,
        "cross_attention_linears": layers * (2 * tokens + 2 * (text + image)) * width**2,
        "cross_attention": layers * 2 * tokens * (text + image) * width,
        "image_embedding": image * (config.image_dim**2 + config.image_dim * width),
        "feed_forward": layers * 2 * tokens * width * config.ffn_hidden_size,
        "head": tokens * width * config.patch_dim,
    }
    return {name: 2 * batch * products for name, products in parts.items()}


def training_flops(config: ModelConfig, latent_shape: tuple[int, int, int], batch: int = 1) -> int:
    """Forward and backward; arguments as for :func:`forward_flops`."""
    return (1 + BACKWARD) * sum(forward_flops(config, latent_shape, batch).values())
