"""Sampling against the reference's: each stored step by itself, and the whole trajectory through the model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_flashi2v.checkpoint.key_table import mappings
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.flow.sigmas import inference_sigmas, timesteps_of
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.sampling.guidance import combine_guided, with_guidance
from megatron_flashi2v.sampling.load import build_model, single_process, velocity_of
from megatron_flashi2v.sampling.solvers import solve_euler

CASES = ("tiny_1x3x3", "tiny_3x3x3")
GUIDANCE_SCALE, SHIFT, CUTOFF_RATIO = 5.0, 7.0, 0.1  # how the reference was run, see the goldens' README


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def run(goldens: Path, case: str) -> dict[str, torch.Tensor]:
    return load_file(goldens / f"sample_{case}.safetensors")


def steps_of(run: dict[str, torch.Tensor]) -> list[int]:
    return sorted(int(match[1]) for name in run if (match := re.fullmatch(r"step(\d+)\.latents_after", name)))


def model_config(goldens: Path, case: str, weights: dict[str, torch.Tensor]) -> ModelConfig:
    sizes = json.loads((goldens / "dit_and_loss.json").read_text())[case]["config"]
    phi = weights["learnable_proj.proj.0.weight"]
    return ModelConfig(
        num_layers=sizes["num_layers"],
        hidden_size=sizes["dim"],
        ffn_hidden_size=sizes["ffn_dim"],
        num_attention_heads=sizes["num_heads"],
        latent_channels=sizes["in_dim"],
        freq_dim=sizes["freq_dim"],
        text_dim=sizes["text_dim"],
        text_length=sizes["text_len"],
        phi_kernel_size=tuple(phi.shape[2:]),
        phi_hidden_channels=phi.shape[0],
        phi_order="conv_then_broadcast",  # the reference's main branch
    )


def test_schedule(run):
    sigmas = inference_sigmas(len(run["sigmas"]) - 1, SHIFT)
    torch.testing.assert_close(sigmas, run["sigmas"], atol=1e-7, rtol=1e-7)
    for step in steps_of(run):
        torch.testing.assert_close(
            timesteps_of(sigmas)[step].expand(len(run[f"step{step}.timestep"])), run[f"step{step}.timestep"]
        )
        torch.testing.assert_close((sigmas[step + 1] - sigmas[step]).view(1), run[f"step{step}.delta"])


def test_guided_steps_from_the_stored_velocities(run):
    """Where both passes' outputs are stored, guidance and one Euler step must give the stored next state."""
    stored = [step for step in steps_of(run) if f"step{step}.cond_out" in run]
    assert stored
    for step in stored:
        before = run["initial_noise"] if step == 0 else run[f"step{step - 1}.latents_after"]
        guided = combine_guided(run[f"step{step}.cond_out"], run[f"step{step}.uncond_out"], GUIDANCE_SCALE)
        after = solve_euler(lambda *_, value=guided: value, before, run["sigmas"][step : step + 2])
        torch.testing.assert_close(after, run[f"step{step}.latents_after"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batched", [False, True])
def test_whole_trajectory(goldens, case, run, batched):
    weights = load_file(goldens / f"dit_{case}.weights.safetensors")
    config = model_config(goldens, case, weights)
    device = resolve_device("cpu")
    states: list[torch.Tensor] = []
    with single_process(device) as groups:
        model = build_model(config, groups, device)
        ours = {
            row.ours: row.to_ours([weights[name] for name in row.external]) for row in mappings(config, "wan")
        }
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(ours.pop(name))
        assert not ours
        velocity = with_guidance(
            velocity_of(model), run["negative_prompt_embeds"], GUIDANCE_SCALE, batched=batched
        )
        samples = len(run["initial_noise"])
        final = solve_euler(
            lambda state, timestep: velocity(
                state,
                timestep,
                run["prompt_embeds"],
                run["start_frame_latents"],
                torch.full((samples,), CUTOFF_RATIO),
            ),
            run["initial_noise"],
            inference_sigmas(len(run["sigmas"]) - 1, SHIFT),
            callback=lambda done, steps, state: states.append(state),
        )
    assert len(states) == len(steps_of(run))
    for step, state in enumerate(states):
        torch.testing.assert_close(state, run[f"step{step}.latents_after"], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(final, run["final_latents"], atol=1e-3, rtol=1e-3)
