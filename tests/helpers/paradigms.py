"""Names of the built-in paradigms, and what a test must give them."""

import torch
from torch import Tensor

from megatron_flashi2v.conditioning.build import BUILT_IN, paradigm_of
from megatron_flashi2v.config.model import ModelConfig

PARADIGMS = tuple(paradigm.name for paradigm in BUILT_IN)


def stored_inputs(config: ModelConfig, latents_BCTHW: Tensor) -> dict[str, Tensor]:
    """Random tensors that the paradigm takes of a batch of samples beside latents and text."""
    generator = torch.Generator().manual_seed(11)
    batch, *shape = latents_BCTHW.shape
    wanted = paradigm_of(config).stored_inputs(config, tuple(shape))
    return {name: torch.randn(batch, *sides, generator=generator) for name, sides in wanted.items()}
