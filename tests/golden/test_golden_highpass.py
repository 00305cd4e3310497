"""The Fourier high-pass against tensors made by the reference, for every implementation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flashi2v_kernels.fourier_highpass.cutoff import EPSILON, squared_cutoff, squared_radius_map
from flashi2v_kernels.registry import load_entry_point, specs_of
from megatron_flashi2v.flow.highpass import cutoff_ratios, high_frequency_features

SPECS = [spec for spec in specs_of("fourier_highpass") if "cpu" in spec.devices]
IMPLEMENTATIONS = {spec.name: load_entry_point(spec) for spec in SPECS}
ATOL = 1e-5  # the goldens' README; of results in fp32
TRAINING_RATIOS, SAMPLING_RATIO = (0.05, 0.95), 0.1  # the reference's shipped settings
# Where images have values above this, the fp32 FFT of the reference is off by more than ATOL (the definition
# in fp64 shows it): another algorithm cannot come closer to its tensors than fp32 resolves such values.
LARGE = 10.0
RESULT_PARTS = ("hf", "hf_ch3", "lf")
CHANNEL = 3  # the one that is stored where the whole output is not

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tensors(goldens: Path) -> Tensors:
    return load_file(goldens / "hf_extractor.safetensors")


@pytest.fixture(scope="module")
def cases(goldens: Path) -> dict[str, dict[str, Any]]:
    described = json.loads((goldens / "hf_extractor.json").read_text())["cases"]
    return {case["name"]: case for case in described}


def input_of(name: str, tensors: Tensors, cases: dict[str, dict[str, Any]]) -> torch.Tensor:
    """The images behind a case or a result: fp32, unless the case itself is about bf16."""
    described = cases.get(name.partition(".abs")[0], {})
    key = described.get("input", name.partition(".r")[0].removesuffix(".lowpass") + ".input")
    return tensors[key] if key.endswith(".bf16.input") else tensors[key].float()


def ratios_of(name: str, tensors: Tensors, cases: dict[str, dict[str, Any]]) -> torch.Tensor:
    """One ratio per image: the name's, the description's, or drawn from the stored uniform numbers."""
    scene, _, random = name.partition(".rand")
    images = input_of(name, tensors, cases)
    if random or name.endswith(".rand"):
        low, width = re.findall(r"[\d.]+", cases[f"{scene}.rand"]["ratio"])  # "low+width*u"
        return cutoff_ratios(tensors[f"{scene}.rand.uniforms"], float(low), float(low) + float(width))
    written = re.search(r"\.r(?:atio)?(\d+\.\d+)", name)
    ratio = float(written[1]) if written else cases[name]["ratio"]
    return torch.full((len(images),), ratio)


def test_every_key_is_compared(tensors):
    for key in tensors:
        is_input = key.endswith((".input", ".rand.uniforms"))
        assert is_input or key.startswith("radius.") or key.rpartition(".")[2] in RESULT_PARTS, key


def test_radius_maps(tensors):
    for key in [key for key in tensors if key.startswith("radius.")]:
        height, width = map(int, key.removeprefix("radius.").split("x"))
        assert torch.equal(squared_radius_map(height, width).sqrt(), tensors[key]), key


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_outputs(tensors, cases, name):
    results = [key for key in tensors if key.rpartition(".")[2] in RESULT_PARTS]
    assert results
    for key in results:
        images, ratio_B = input_of(key, tensors, cases), ratios_of(key, tensors, cases)
        part, expected, return_abs = key.rpartition(".")[2], tensors[key], ".abs0." not in key
        high, low = IMPLEMENTATIONS[name](images, ratio_B, return_abs=return_abs, return_low=True)
        output = {"hf": high, "lf": low, "hf_ch3": high[:, CHANNEL : CHANNEL + 1]}[part]
        assert output.dtype == expected.dtype, key
        rtol = 0.0
        if expected.dtype == torch.bfloat16:
            rtol = 2**-7  # of 8 bits: the same number may round to either neighbour
        elif name != "torch_fft" and images.abs().max() > LARGE:
            rtol = 2e-6
        torch.testing.assert_close(
            output, expected, rtol=rtol, atol=ATOL, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_cutoffs(tensors, cases):
    for name, case in cases.items():
        images, ratio_B = input_of(name, tensors, cases), ratios_of(name, tensors, cases)
        if "ratios" in case:
            torch.testing.assert_close(ratio_B, torch.tensor(case["ratios"]), rtol=1e-6, atol=0)
        spectrum = torch.fft.fftshift(torch.fft.fft2(images), dim=(-2, -1))
        magnitude = (spectrum.abs().square() + EPSILON).sqrt().mean(dim=1)
        squared_radius = squared_radius_map(*images.shape[-2:])
        cutoff_B = squared_cutoff(magnitude, squared_radius, ratio_B)
        assert cutoff_B.sqrt().tolist() == case["cutoff_radius"], name
        for cutoff, index in zip(cutoff_B, case["sorted_index"], strict=True):
            # the reference's sort leaves open which bin of the ring it is
            assert (squared_radius < cutoff).sum() <= index < (squared_radius <= cutoff).sum(), name
        if "kept_bins" in case:
            kept = [int((squared_radius >= cutoff).sum()) for cutoff in cutoff_B]
            assert kept == case["kept_bins"], name


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_sums_of_outputs(tensors, cases, name):
    """They stand for the channels that are not stored."""
    described = {case: facts for case, facts in cases.items() if "sumsq" in facts}
    assert described
    for case, facts in described.items():
        images, ratio_B = input_of(case, tensors, cases), ratios_of(case, tensors, cases)
        assert list(images.shape) == facts["shape"], case
        output = IMPLEMENTATIONS[name](images, ratio_B, return_abs=facts["return_abs"]).double()
        assert output.mean().item() == pytest.approx(facts["mean"], rel=0, abs=ATOL), case
        # what an error of ATOL in every element can do to the sum of squares
        slack = 2 * ATOL * output.abs().sum().item()
        assert output.square().sum().item() == pytest.approx(facts["sumsq"], rel=0, abs=slack), case


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("kernel_size", ["1x3x3", "3x3x3"])
@pytest.mark.parametrize("kind", ["train", "sample"])
def test_features_of_a_step(goldens, kind, kernel_size, name):
    """Features of the image frame, which the reference repeats over all frames."""
    step = load_file(goldens / f"{kind}_tiny_{kernel_size}.safetensors")
    images_BCHW, expected = step["start_frame_latents"][:, :, 0], step["fourier_features"]
    if kind == "train":
        ratio_B = cutoff_ratios(step["uniform_draws"], *TRAINING_RATIOS)
    else:
        ratio_B = torch.full((len(images_BCHW),), SAMPLING_RATIO)
    features = high_frequency_features(images_BCHW, ratio_B, IMPLEMENTATIONS[name])
    torch.testing.assert_close(features[:, :, None].expand_as(expected), expected, rtol=0, atol=ATOL)
