"""Kernels are chosen for what the layout needs of them."""

from __future__ import annotations

import pytest
import torch

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.models.spec import choose_kernels


def test_a_ring_needs_the_backward_of_a_block() -> None:
    config = ModelConfig(num_layers=1, hidden_size=128, ffn_hidden_size=128, num_attention_heads=1)
    kernels = choose_kernels(torch.device("cpu"), torch.bfloat16, config, ring=True)
    assert kernels.chosen[0].spec.name == "torch_sdpa" and kernels.attention_backward is not None
    cuda = torch.device("cuda")
    assert choose_kernels(cuda, torch.bfloat16, config, "torch_sdpa").chosen[0].spec.name == "torch_sdpa"
    with pytest.raises(ConfigError, match=r"--attention-backend torch_sdpa \(with ring attention\): .* reference"):
        choose_kernels(cuda, torch.bfloat16, config, "torch_sdpa", ring=True)
