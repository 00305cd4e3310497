"""Kernels are chosen for what the layout needs of them, and megatron-core's schedules are told how to send hops."""

from __future__ import annotations

import pytest
import torch

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.models.spec import choose_kernels, make_spec
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device

CONFIG = ModelConfig(num_layers=1, hidden_size=128, ffn_hidden_size=128, num_attention_heads=1)


def test_a_ring_needs_the_backward_of_a_block() -> None:
    kernels = choose_kernels(torch.device("cpu"), torch.bfloat16, CONFIG, ring=True)
    assert kernels.chosen[0].spec.name == "torch_sdpa" and kernels.attention_backward is not None
    cuda = torch.device("cuda")
    assert choose_kernels(cuda, torch.bfloat16, CONFIG, "torch_sdpa").chosen[0].spec.name == "torch_sdpa"
    with pytest.raises(ConfigError, match=r"--attention-backend torch_sdpa \(with ring attention\): .* reference"):
        choose_kernels(cuda, torch.bfloat16, CONFIG, "torch_sdpa", ring=True)


def test_a_hop_is_waited_for_before_its_memory_is_freed() -> None:
    """The interleaved schedule only begins to send a hop and frees it then, so it must keep it."""
    with single_process(resolve_device("cpu")) as groups:
        plain, interleaved = (
            make_spec(CONFIG, groups, torch.device("cpu"), virtual_stages=count).megatron for count in (1, 2)
        )
    assert plain.batch_p2p_comm and not plain.overlap_p2p_comm and plain.deallocate_pipeline_outputs
    assert interleaved.overlap_p2p_comm and not interleaved.batch_p2p_comm
    assert not interleaved.deallocate_pipeline_outputs


def test_the_host_does_not_wait_for_the_device_at_every_hop() -> None:
    with single_process(resolve_device("cpu")) as groups:
        assert not make_spec(CONFIG, groups, torch.device("cpu")).megatron.batch_p2p_sync


def test_an_elementwise_backend_by_name() -> None:
    kernels = choose_kernels(torch.device("cpu"), torch.float32, CONFIG, elementwise_backend="reference")
    assert {kernel.spec.name for kernel in kernels.chosen[1:-1]} == {"reference"}
    with pytest.raises(ConfigError, match="--elementwise-backend tritn: there are auto, .*triton, triton_fused"):
        choose_kernels(torch.device("cpu"), torch.float32, CONFIG, elementwise_backend="tritn")
