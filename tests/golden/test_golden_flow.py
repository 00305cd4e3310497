"""Sigmas, interpolation, loss and Euler step against tensors made by the reference."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_flashi2v.flow import interpolation, sigmas
from megatron_flashi2v.flow.loss import mean_squared_error

TRAIN_FILES = ("train_tiny_1x3x3.safetensors", "train_tiny_3x3x3.safetensors")
INFERENCE_KEY = re.compile(
    r"infer\.steps(?P<steps>\d+)\.shift(?P<shift>[\d.]+)\.(?P<what>sigmas|timesteps|delta)"
)
TRAINING_KEY = re.compile(
    r"train\.(?:dynamic|static_shift(?P<shift>[\d.]+))_(?P<draws>logitnormal|uniform)"
    r"(?:\.(?P<case>\w+))?\.(?P<what>sigmas|timesteps)"
)
DRAWS = {"train.normal_draws", "train.uniform_draws"}


@pytest.fixture(scope="module")
def tables(goldens: Path) -> dict[str, torch.Tensor]:
    return load_file(goldens / "flow_and_tables.safetensors")


@pytest.fixture(scope="module")
def dynamic(goldens: Path) -> dict[str, Any]:
    return json.loads((goldens / "flow_and_tables.json").read_text())["dynamic"]


@pytest.fixture(scope="module")
def dynamic_cases(dynamic: dict[str, Any]) -> dict[str, dict]:
    return dynamic["cases"]


def assert_within_one_ulp(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    ulp = torch.nextafter(expected.abs(), torch.full_like(expected, torch.inf)) - expected.abs()
    assert ((actual - expected).abs() <= ulp).all(), what


def test_every_sigma_key_is_known(tables):
    for key in tables:
        if key.startswith("infer."):
            assert INFERENCE_KEY.fullmatch(key), key
        if key.startswith("train."):
            assert key in DRAWS or TRAINING_KEY.fullmatch(key), key


def test_inference_sigmas(tables):
    keys = [match for match in map(INFERENCE_KEY.fullmatch, tables) if match]
    assert keys
    for key in keys:
        sigmas_N = sigmas.inference_sigmas(int(key["steps"]), float(key["shift"]))
        ours = {"sigmas": sigmas_N, "timesteps": sigmas.timesteps_of(sigmas_N), "delta": sigmas_N.diff()}
        assert_within_one_ulp(ours[key["what"]], tables[key[0]], key[0])


def test_training_sigmas(tables, dynamic_cases):
    keys = [match for match in map(TRAINING_KEY.fullmatch, tables) if match]
    assert keys
    for key in keys:
        if key["draws"] == "uniform":
            drawn = sigmas.uniform_sigmas(tables["train.uniform_draws"])
        else:
            drawn = sigmas.logit_normal_sigmas(tables["train.normal_draws"])
        if key["shift"] is not None:
            shift = float(key["shift"])
        else:
            shift = sigmas.dynamic_shift(*dynamic_cases[key["case"]]["latent_hw"])
        shifted = sigmas.shift_sigmas(drawn, shift)
        ours = {"sigmas": shifted, "timesteps": sigmas.timesteps_of(shifted)}
        assert_within_one_ulp(ours[key["what"]], tables[key[0]], key[0])


def test_dynamic_shift(dynamic):
    """exp of a line in the tokens of one latent frame; two rows of 2 n latent pixels are n tokens."""
    def exponent(tokens: int) -> float:
        return math.log(sigmas.dynamic_shift(2, 2 * tokens))

    for name, case in dynamic["cases"].items():
        shift = sigmas.dynamic_shift(*case["latent_hw"])
        assert shift == pytest.approx(case["shift"], rel=1e-14), name
        assert math.log(shift) == pytest.approx(case["mu"], rel=1e-14), name
        assert exponent(case["image_seq_len"]) == pytest.approx(case["mu"], rel=1e-14), name
    for end in ("base", "max"):
        assert exponent(dynamic[f"{end}_image_seq"]) == pytest.approx(dynamic[f"{end}_shift"], rel=1e-14)
    assert exponent(1) - exponent(0) == pytest.approx(dynamic["k"], rel=1e-10)
    assert exponent(0) == pytest.approx(dynamic["b"], rel=1e-14)


def test_interpolation(tables):
    latents, noise, sigma_B = tables["interp.latents"], tables["interp.noise"], tables["interp.sigmas"]
    assert_within_one_ulp(sigmas.timesteps_of(sigma_B), tables["interp.timesteps"], "interp.timesteps")
    shift = tables["interp.start_proj"]
    mixed = interpolation.interpolate(latents, noise, sigma_B) - shift
    torch.testing.assert_close(mixed, tables["interp.x_t_fp32"], rtol=0, atol=1e-6)
    # latents and noise in bf16, the shift in fp32: the reference mixes in fp32 and casts back
    mixed = interpolation.interpolate(latents.bfloat16(), noise.bfloat16(), sigma_B) - shift
    assert_within_one_ulp(mixed.bfloat16(), tables["interp.x_t_bf16"], "interp.x_t_bf16")


def test_loss(tables):
    target = interpolation.velocity_target(tables["interp.latents"], tables["interp.noise"])
    loss = mean_squared_error(tables["loss.model_output"], target)
    torch.testing.assert_close(loss.view(1), tables["loss.value"], rtol=1e-6, atol=0)


def test_euler_step(tables):
    state, velocity, delta = tables["interp.latents"], tables["loss.model_output"], tables["step.delta"][0]
    step = interpolation.euler_step(state, velocity, 0.0, delta)
    torch.testing.assert_close(step, tables["step.next_fp32"], rtol=0, atol=1e-6)
    rounded = interpolation.euler_step(state.bfloat16(), velocity.bfloat16(), 0.0, delta)
    assert_within_one_ulp(rounded, tables["step.next_bf16"], "step.next_bf16")


@pytest.mark.parametrize("file", TRAIN_FILES)
def test_flow_of_a_training_step(goldens, file):
    """Dynamic shift and logit-normal draws; the shift phi(z0) is taken from the file."""
    step = load_file(goldens / file)
    latents, noise = step["latents"], step["noise"]
    drawn = sigmas.logit_normal_sigmas(step["normal_draws"])
    sigma_B = sigmas.shift_sigmas(drawn, sigmas.dynamic_shift(*latents.shape[-2:]))
    assert_within_one_ulp(sigma_B, step["sigmas"].flatten(), "sigmas")
    assert_within_one_ulp(sigmas.timesteps_of(sigma_B), step["timesteps"], "timesteps")
    mixed = interpolation.interpolate(latents, noise, sigma_B) - step["start_frame_proj"]
    torch.testing.assert_close(mixed, step["x_t"], rtol=0, atol=1e-6)
    target = interpolation.velocity_target(latents, noise)
    torch.testing.assert_close(target, step["target"], rtol=0, atol=1e-6)
    loss = mean_squared_error(step["model_output"], target)
    torch.testing.assert_close(loss.view(1), step["loss"], rtol=1e-6, atol=0)
