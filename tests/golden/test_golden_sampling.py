"""Sampling against the reference's: each stored step by itself, and the whole trajectory through the model."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.reference_weights import GOLDEN_CASES, build_golden_model, golden_facts
from safetensors.torch import load_file

from megatron_flashi2v.flow.sigmas import inference_sigmas, timesteps_of
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.sampling.denoise import Conditions, denoise
from megatron_flashi2v.sampling.guidance import combine_guided, with_guidance
from megatron_flashi2v.sampling.load import velocity_of
from megatron_flashi2v.sampling.solvers import EulerSolver

ONE_ULP = torch.finfo(torch.float32).eps
GUIDANCE_SCALE, SHIFT, CUTOFF_RATIO = 5.0, 7.0, 0.1  # how the reference was run, see the goldens' README


@pytest.fixture(params=GOLDEN_CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def run(goldens: Path, case: str) -> dict[str, torch.Tensor]:
    return load_file(goldens / f"sample_{case}.safetensors")


def steps_of(run: dict[str, torch.Tensor]) -> list[int]:
    return sorted(int(match[1]) for name in run if (match := re.fullmatch(r"step(\d+)\.latents_after", name)))


def conditions_of(run: dict[str, torch.Tensor]) -> Conditions:
    return Conditions(
        text_BLD=run["prompt_embeds"],
        image_latents_BC1HW=run["start_frame_latents"],
        extras={"cutoff_ratio": torch.full((len(run["initial_noise"]),), CUTOFF_RATIO)},
    )


def test_schedule(run):
    sigmas = inference_sigmas(len(run["sigmas"]) - 1, SHIFT)
    torch.testing.assert_close(sigmas, run["sigmas"], atol=0, rtol=ONE_ULP)
    for step in steps_of(run):
        timestep_B = timesteps_of(sigmas)[step].expand(len(run[f"step{step}.timestep"]))
        torch.testing.assert_close(timestep_B, run[f"step{step}.timestep"], atol=0, rtol=ONE_ULP)
        # A difference of numbers up to 1, each known to one unit in its last place.
        delta = (sigmas[step + 1] - sigmas[step]).view(1)
        torch.testing.assert_close(delta, run[f"step{step}.delta"], atol=ONE_ULP, rtol=0)


def test_guided_steps_from_the_stored_velocities(run):
    """Where both passes' outputs are stored, guidance and one Euler step must give the stored next state."""
    stored = [step for step in steps_of(run) if f"step{step}.cond_out" in run]
    assert stored
    for step in stored:
        before = run["initial_noise"] if step == 0 else run[f"step{step - 1}.latents_after"]
        guided = combine_guided(run[f"step{step}.cond_out"], run[f"step{step}.uncond_out"], GUIDANCE_SCALE)
        after = denoise(
            lambda *_, value=guided: value, before, conditions_of(run), EulerSolver(run["sigmas"][step : step + 2])
        )
        torch.testing.assert_close(after, run[f"step{step}.latents_after"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batched", [False, True])
def test_whole_trajectory(goldens, case, run, batched):
    states: list[torch.Tensor] = []
    with single_process(resolve_device("cpu")) as groups:
        model = build_golden_model(goldens, case, groups)
        final = denoise(
            velocity_of(model),
            run["initial_noise"],
            conditions_of(run),
            EulerSolver(inference_sigmas(len(run["sigmas"]) - 1, SHIFT)),
            guidance=partial(
                with_guidance,
                negative_text_BLD=run["negative_prompt_embeds"],
                guidance_scale=GUIDANCE_SCALE,
                batched=batched,
            ),
            callback=lambda done, steps, state: states.append(state),
        )
    assert len(states) == len(steps_of(run))
    for step, state in enumerate(states):
        torch.testing.assert_close(state, run[f"step{step}.latents_after"], atol=1e-3, rtol=0)
    torch.testing.assert_close(final, run["final_latents"], atol=1e-3, rtol=0)
    assert final.std().item() == pytest.approx(golden_facts(goldens, case)["sample_final_std"], rel=1e-3)


@torch.no_grad()
def test_conditioning_and_velocities_of_stored_steps(goldens, case, run):
    """What each network call is given and returns, from the stored states."""
    extras = {"cutoff_ratio": torch.full((len(run["initial_noise"]),), CUTOFF_RATIO)}
    image, seen = run["start_frame_latents"], {}
    with single_process(resolve_device("cpu")) as groups:
        model = build_golden_model(goldens, case, groups)
        model.conditioning.register_forward_hook(lambda module, inputs, output: seen.update(vars(output)))
        for step in steps_of(run):
            before = run["initial_noise"] if step == 0 else run[f"step{step - 1}.latents_after"]
            for name, text in (("cond_out", "prompt_embeds"), ("uncond_out", "negative_prompt_embeds")):
                if f"step{step}.{name}" not in run:
                    continue
                velocity = velocity_of(model)(before, run[f"step{step}.timestep"], run[text], image, extras)
                torch.testing.assert_close(velocity, run[f"step{step}.{name}"], atol=2e-4, rtol=1e-4)
                if f"step{step}.dit_input" in run:
                    torch.testing.assert_close(seen["latents_BCTHW"], run[f"step{step}.dit_input"], atol=1e-5, rtol=0)
        shift = model.conditioning.phi(image, run["initial_noise"].shape[2])
    torch.testing.assert_close(seen["guidance_BCTHW"], run["fourier_features"], atol=1e-5, rtol=0)
    torch.testing.assert_close(shift, run["start_frame_proj"], atol=1e-5, rtol=0)
