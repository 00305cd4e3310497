"""Training and sampling never wait for the device.

The model lives on torch's meta device, which has no values: reading one back from it, which on an accelerator makes the
host wait for all that was started, is an error there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.flow.sigmas import inference_sigmas
from megatron_flashi2v.flow.sinusoid import timestep_sinusoid
from megatron_flashi2v.models.spec import make_spec
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.sampling.denoise import Conditions, denoise
from megatron_flashi2v.sampling.guidance import with_guidance
from megatron_flashi2v.sampling.load import velocity_of
from megatron_flashi2v.sampling.solvers import EulerSolver
from megatron_flashi2v.training import step
from megatron_flashi2v.training.batch import Microbatch

CONFIG = ModelConfig(
    num_layers=2, hidden_size=16, ffn_hidden_size=16, num_attention_heads=2, latent_channels=3, text_dim=5,
    text_length=4,
)
META = torch.device("meta")


@pytest.fixture(scope="module")
def model() -> Iterator[DiffusionTransformer]:
    """On a device of which nothing can be read, with the CPU's kernels."""
    with single_process(resolve_device("cpu")) as groups:
        spec = dataclasses.replace(make_spec(CONFIG, groups, torch.device("cpu")), device=META)
        yield DiffusionTransformer(spec).to(META)


def test_forward_and_backward(model: DiffusionTransformer) -> None:
    sigma_B = torch.tensor([0.2, 0.7])
    batch = Microbatch(
        latents_BCTHW=torch.randn(2, 3, 2, 4, 6), noise_BCTHW=torch.randn(2, 3, 2, 4, 6), sigma_B=sigma_B,
        sinusoid_BF=timestep_sinusoid(1000 * sigma_B, CONFIG.freq_dim), text_BLX=torch.randn(2, 4, 5),
        extras={"cutoff_ratio": torch.tensor([0.1, 0.6])},
    ).to(META)
    output, loss = step.forward_step(model.spec, iter([batch]), model)
    loss(output)[0].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_sampling(model: DiffusionTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []  # a copy from other memory is one that the host waits for, on NPUs
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    text, negative = (torch.empty(2, 4, 5, device=META) for _ in range(2))
    conditions = Conditions(
        text_BLD=text, image_latents_BC1HW=torch.empty(2, 3, 1, 4, 6, device=META),
        extras={"cutoff_ratio": torch.empty(2, device=META)},
    )
    end = denoise(
        velocity_of(model), torch.empty(2, 3, 2, 4, 6, device=META), conditions, EulerSolver(inference_sigmas(3, 7.0)),
        guidance=partial(with_guidance, negative_text_BLD=negative, guidance_scale=5.0),
    )
    assert end.is_meta and len(pinned) == 6
