"""Clippers: where they clip, what they learn, and that a run goes on from their saved state."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.layouts import metrics, weights

from megatron_flashi2v.checkpoint.folders import find_checkpoint
from megatron_flashi2v.config.train import OptimizerArguments
from megatron_flashi2v.training.clipping import Clip, Clipper, make_clipper, scale_gradients

Train = Callable[..., int]
ADAPTIVE = ("--clip-grad-method", "adaptive")
NPU = ("--clip-grad-method", "adaptive-npu")


def clipper_of(**arguments: Any) -> Clipper:
    return make_clipper(OptimizerArguments(**arguments))


def clipper_state(save: Path) -> dict[str, Any]:
    """What the run's last checkpoint holds of its clipper."""
    return json.loads((find_checkpoint(save) / "state.json").read_text())["clipper"]


def norms(count: int, seed: int = 0) -> list[float]:
    """Around a half, with some far above."""
    generator = torch.Generator().manual_seed(seed)
    usual = 0.5 + 0.2 * torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.1, 40 * usual, usual).tolist()


@pytest.mark.parametrize("limit", [0.5, 3.0])
def test_fixed_norm_is_torchs_clipping(limit: float) -> None:
    ours = [torch.randn(4, 3), torch.randn(7)]
    theirs = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in ours]
    for parameter, gradient in zip(theirs, ours, strict=True):
        parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_(theirs, limit).item()
    scale_gradients(ours, clipper_of(clip_grad=limit).clip(norm))
    for parameter, gradient in zip(theirs, ours, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_zero_turns_clipping_off() -> None:
    assert clipper_of(clip_grad=0.0).clip(1e9).factor == 1.0


@pytest.mark.parametrize("method", ["adaptive", "adaptive-npu"])
def test_threshold_is_three_deviations_above_the_mean_of_accepted_norms(method: str) -> None:
    clipper = clipper_of(clip_grad_method=method, clip_grad_extreme_norm=1e9, clip_grad_ema_decay=0.9)
    mean, variance = None, 0.0
    for number, norm in enumerate(norms(200)):
        clip = clipper.clip(norm)
        if mean is None:
            mean = 1.0  # --clip-grad; three times the first norm is more
            if method == "adaptive-npu":
                assert clip == Clip(threshold=1.0, factor=1.0)
                continue
        threshold = mean + 3 * variance**0.5
        assert clip.threshold == pytest.approx(threshold, rel=1e-12), number
        assert clip.factor * norm == pytest.approx(min(norm, threshold), rel=1e-5), number
        if norm <= threshold:
            mean = 0.9 * mean + 0.1 * norm
            variance = 0.9 * variance + 0.1 * (mean - norm) ** 2
    assert variance > 0 and mean < 0.7


def test_npu_starts_from_three_times_the_first_norm() -> None:
    clipper = clipper_of(clip_grad_method="adaptive-npu")
    assert clipper.clip(0.125) == Clip(threshold=0.375, factor=1.0)
    assert clipper.clip(0.5).factor == pytest.approx(0.75, rel=1e-5)


@pytest.mark.parametrize("norm, dropped", [(19.0, False), (21.0, True), (math.inf, True), (math.nan, True)])
def test_npu_drops_what_is_extreme(norm: float, dropped: bool) -> None:
    clipper = clipper_of(clip_grad_method="adaptive-npu")
    clipper.clip(0.5)
    before = clipper.state_dict()
    clip = clipper.clip(norm)
    gradients = [torch.tensor([norm, 0.5])]
    scale_gradients(gradients, clip)
    assert (clip.factor == 0.0) == dropped
    assert gradients[0].isfinite().all() and (gradients[0] == 0).all() == dropped
    assert clipper.state_dict() == {**before, "extreme": int(dropped)}


def test_npu_drops_a_first_norm_that_is_not_finite_and_starts_at_the_next() -> None:
    clipper = clipper_of(clip_grad_method="adaptive-npu")
    assert clipper.clip(math.nan).factor == 0.0
    assert clipper.clip(0.25) == Clip(threshold=0.75, factor=1.0)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["norm", "adaptive"])
def test_other_methods_leave_what_is_not_finite_as_it_is(method: str, norm: float) -> None:
    clipper = clipper_of(clip_grad_method=method)
    clipper.clip(0.5)
    before = clipper.state_dict()
    assert clipper.clip(norm).factor == 1.0 and clipper.state_dict() == before


@pytest.mark.parametrize("flags", [ADAPTIVE, (*NPU, "--bf16"), (*NPU, "--use-distributed-optimizer")],
                         ids=lambda flags: "-".join(flags[1:]))
def test_a_resumed_run_clips_like_the_uninterrupted_one(train: Train, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Steps 3 to 6 are clipped to a threshold that steps 1 and 2 have moved."""
    flags = (*flags, "--train-iters", "6", "--clip-grad", "0.9", "--clip-grad-ema-decay", "0.6")
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    assert train("--save", straight, *flags) == 0
    assert train("--save", halves, "--exit-interval", 3, *flags) == 0
    half = clipper_state(halves)
    assert train("--save", halves, "--load", halves, *flags, "--exit-interval", 99) == 0
    assert [row["grad_norm"] for row in metrics(halves)] == [row["grad_norm"] for row in metrics(straight)]
    assert [row["loss"] for row in metrics(halves)] == [row["loss"] for row in metrics(straight)]
    assert half["variance"] > 0 and clipper_state(halves) == clipper_state(straight) != half
    trained = weights(straight)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in weights(halves).items())


def test_adaptive_clipping_reaches_the_weights(train: Train, tmp_path: Path) -> None:
    """Plain SGD moves the weights by the rate times the clipped gradient."""
    sgd = ("--optimizer", "sgd", "--weight-decay", 0, "--train-iters", 1, "--clip-grad", 0.01)
    for name, flags in {"still": ("--lr", 0.0), "moved": ("--lr", 0.1)}.items():
        assert train("--save", tmp_path / name, *sgd, *flags, *ADAPTIVE) == 0
    start, moved = weights(tmp_path / "still"), weights(tmp_path / "moved")
    distance = torch.stack([(moved[key] - start[key]).norm() for key in start]).norm().item()
    assert distance == pytest.approx(0.1 * 0.01, rel=1e-3)
    assert metrics(tmp_path / "moved")[0]["grad_norm"] > 0.1  # it is the norm before clipping


def test_another_method_starts_anew_and_says_so(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--save", tmp_path, *ADAPTIVE, "--exit-interval", 2) == 0
    capsys.readouterr()
    assert train("--save", tmp_path, "--load", tmp_path, *NPU) == 0
    assert "was trained with adaptive: clipping starts anew" in capsys.readouterr().err
    assert clipper_state(tmp_path)["method"] == "adaptive-npu"
