"""The reference's npu branch: the same DiT for one sample at a time, phi on the repeated frame, and its head's bug.

Its parameters' names are compared in test_golden_key_table.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.reference_weights import GOLDEN_CASES, build_golden_model
from safetensors.torch import load_file
from torch import Tensor

from megatron_flashi2v.conditioning.interface import ConditionedInput
from megatron_flashi2v.models.predict import predict_velocity
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with single_process(resolve_device("cpu")) as groups:
        yield groups


@pytest.fixture(params=GOLDEN_CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def stored(goldens: Path, case: str) -> dict[str, Tensor]:
    return load_file(goldens / f"npu_{case}.safetensors")


@pytest.fixture
def facts(goldens: Path, case: str) -> dict[str, Any]:
    return json.loads((goldens / "npu_branch.json").read_text())[case]


@torch.no_grad()
def plain_forward(model: DiffusionTransformer, goldens: Path, case: str) -> Tensor:
    """The DiT on the stored inputs of the plain forward, whole batch at once."""
    io = load_file(goldens / f"dit_{case}.io.safetensors")
    model.conditioning.forward = lambda *_: ConditionedInput(io["x"], io["fourier_features"])
    return predict_velocity(model, io["x"], io["t"], io["context"], None, None)


def test_a_batch_gives_what_single_samples_give(
    goldens: Path, case: str, stored: dict[str, Tensor], facts: dict[str, Any], groups: Groups
) -> None:
    ours = plain_forward(build_golden_model(goldens, case, groups), goldens, case)
    torch.testing.assert_close(ours, stored["forward_batch1_concatenated"], atol=2e-4, rtol=1e-4)
    assert ours.std().item() == pytest.approx(facts["out_std"], rel=1e-4)
    difference = (ours - stored["forward_batch1_concatenated"]).abs().max().item()
    assert difference == pytest.approx(facts["max_abs_diff_npu_b1_vs_main"], abs=2e-4)


def test_its_joint_batch_is_wrong_in_the_head_alone(
    goldens: Path, case: str, stored: dict[str, Tensor], facts: dict[str, Any], groups: Groups
) -> None:
    """It shifts both samples by the first one's time embedding and scales both by the second one's."""
    model = build_golden_model(goldens, case, groups)
    right = plain_forward(model, goldens, case)
    head = model.head

    def mixed(hidden_SBD: Tensor, time_BD: Tensor) -> Tensor:
        shift_D, scale_D = head.modulation + time_BD
        return head.linear(head.norm(hidden_SBD, shift_D.expand_as(time_BD), scale_D.expand_as(time_BD)))

    head.forward = mixed
    wrong = plain_forward(model, goldens, case)
    torch.testing.assert_close(wrong, stored["forward_batch2_joint"], atol=2e-4, rtol=1e-4)
    difference = (right - stored["forward_batch2_joint"]).abs().max().item()
    assert difference == pytest.approx(facts["max_abs_diff_npu_b2_vs_main"], abs=4e-4)
    assert difference > 0.1


@torch.no_grad()
def test_phi_in_both_orders(
    goldens: Path, case: str, stored: dict[str, Tensor], facts: dict[str, Any], groups: Groups
) -> None:
    image_BC1HW = load_file(goldens / f"train_{case}.safetensors")["start_frame_latents"]
    frames = stored["phi_repeat_then_conv"].shape[2]
    repeated, single = (
        build_golden_model(goldens, case, groups, phi_order=order).conditioning.phi(image_BC1HW, frames)
        for order in ("repeat_then_conv", "conv_then_broadcast")
    )
    torch.testing.assert_close(repeated, stored["phi_repeat_then_conv"], atol=1e-5, rtol=0)
    torch.testing.assert_close(single, stored["phi_single_frame"], atol=1e-5, rtol=0)
    assert single.std().item() == pytest.approx(facts["phi_std"], rel=1e-4)
    per_frame = (repeated - single).abs().amax(dim=(0, 1, 3, 4)).tolist()
    assert per_frame == pytest.approx(facts["phi_repeat_vs_single_maxdiff_per_frame"], rel=1e-4, abs=2e-5)
