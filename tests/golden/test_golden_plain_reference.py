"""The plain reference that other tests measure by (helpers/plain_flashi2v.py) against the reference's own numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.plain_flashi2v import PlainFlashI2V, euler_states, guided, high_pass, shifted_sigmas
from helpers.reference_weights import (
    GOLDEN_CASES,
    assert_same_gradient,
    golden_config,
    golden_weights,
    plain_model,
)
from safetensors.torch import load_file
from torch import Tensor

GUIDANCE_SCALE, SHIFT, SAMPLING_RATIO = 5.0, 7.0, 0.1  # how the reference was run, see the goldens' README
LOW, HIGH = 0.05, 0.95


def read(path: Path) -> dict[str, Tensor]:
    """A golden file in fp64."""
    return {name: tensor.double() for name, tensor in load_file(path).items()}


@pytest.fixture(params=GOLDEN_CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def plain(goldens: Path, case: str) -> PlainFlashI2V:
    return plain_model(golden_config(goldens, case), golden_weights(goldens, case))


def assert_gradients(plain: PlainFlashI2V, stored: dict[str, Tensor]) -> None:
    assert stored
    for name, expected in stored.items():
        assert_same_gradient(plain.weights[name].grad, expected, name, 1e-3)


def test_dit(goldens: Path, case: str, plain: PlainFlashI2V) -> None:
    io = read(goldens / f"dit_{case}.io.safetensors")
    output = plain.dit(io["x"], io["t"], io["context"], io["fourier_features"])
    torch.testing.assert_close(output, io["output"], atol=2e-4, rtol=1e-4)
    loss = (output - io["target"]).square().mean()
    torch.testing.assert_close(loss.view(1), io["loss"], atol=0, rtol=1e-5)
    loss.backward()
    assert_gradients(plain, read(goldens / f"dit_{case}.grads.safetensors"))


def test_training_loss(goldens: Path, case: str, plain: PlainFlashI2V) -> None:
    stored = read(goldens / f"train_{case}.safetensors")
    sigma_B, ratio_B = stored["sigmas"].flatten(), LOW + (HIGH - LOW) * stored["uniform_draws"]
    loss = plain.loss(
        stored["latents"], stored["noise"], sigma_B, stored["text_embeddings"], stored["start_frame_latents"], ratio_B
    )
    torch.testing.assert_close(loss.view(1), stored["loss"], atol=0, rtol=1e-5)
    loss.backward()
    gradients = {name.removeprefix("grad."): value for name, value in stored.items() if name.startswith("grad.")}
    assert_gradients(plain, gradients)


@torch.no_grad()
def test_sampling(goldens: Path, case: str, plain: PlainFlashI2V) -> None:
    stored = read(goldens / f"sample_{case}.safetensors")
    ratio_B = torch.full((len(stored["initial_noise"]),), SAMPLING_RATIO)
    with_text = {
        text: lambda state, timestep_B, rows=stored[text]: plain.velocity(
            state, timestep_B, rows, stored["start_frame_latents"], ratio_B
        )
        for text in ("prompt_embeds", "negative_prompt_embeds")
    }
    velocity = guided(*with_text.values(), GUIDANCE_SCALE)
    sigmas = shifted_sigmas(len(stored["sigmas"]) - 1, SHIFT)
    torch.testing.assert_close(torch.tensor(sigmas).double(), stored["sigmas"], atol=1e-6, rtol=0)
    states = euler_states(velocity, stored["initial_noise"], sigmas)
    for step, state in enumerate(states):
        torch.testing.assert_close(state, stored[f"step{step}.latents_after"], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(states[-1], stored["final_latents"], atol=1e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("order, name", [
    ("repeat_then_conv", "phi_repeat_then_conv"), ("conv_then_broadcast", "phi_single_frame"),
])
def test_phi(goldens: Path, case: str, order: str, name: str) -> None:
    plain = plain_model(golden_config(goldens, case, phi_order=order), golden_weights(goldens, case))
    stored = read(goldens / f"npu_{case}.safetensors")
    image = read(goldens / f"train_{case}.safetensors")["start_frame_latents"]
    shift = plain.phi(image, stored["phi_repeat_then_conv"].shape[2])
    torch.testing.assert_close(shift, stored[name], atol=1e-5, rtol=0)


def test_high_pass(goldens: Path) -> None:
    """Whole outputs with a written ratio, from fp32 inputs; other cases are the kernels' affair."""
    stored = load_file(goldens / "hf_extractor.safetensors")
    matches = [match for match in (re.fullmatch(r"(b\d_\d+x\d+)\.r([\d.]+)\.abs1\.(hf|hf_ch3)", name)
                                   for name in stored) if match]
    assert matches
    for name, scene, ratio, part in ((match[0], *match.groups()) for match in matches):
        images = stored[f"{scene}.input"].double()
        output = high_pass(images, torch.full((len(images),), float(ratio)))
        output = output if part == "hf" else output[:, 3:4]
        torch.testing.assert_close(output.float(), stored[name], atol=1e-5, rtol=0)
