"""A bf16 run beside its fp32 twin: the same draws, fp32 states, and losses that stay near."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from helpers.layouts import metrics, tensors

from megatron_flashi2v.checkpoint.folders import find_checkpoint
from megatron_flashi2v.training import step

Train = Callable[..., int]
# Of the losses of 50 iterations, relative; measured 0.0023 and 0.0004.
WORST, AVERAGE = 0.005, 0.001


def test_losses_stay_near_those_of_fp32(train: Train, tmp_path: Path) -> None:
    losses = {}
    for name, flags in {"fp32": (), "bf16": ("--bf16",)}.items():
        assert train("--save", tmp_path / name, "--train-iters", 50, "--lr", "1e-3", *flags) == 0
        losses[name] = [row["loss"] for row in metrics(tmp_path / name)]
    distances = [abs(bf16 / fp32 - 1) for bf16, fp32 in zip(losses["bf16"], losses["fp32"], strict=True)]
    assert mean(losses["fp32"][-10:]) < 0.9 * mean(losses["fp32"][:10])  # it learns, so there is something to follow
    assert 0 < max(distances) < WORST and mean(distances) < AVERAGE, (max(distances), mean(distances))


def test_what_the_flow_draws_is_the_same_and_in_fp32(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, seen = step.forward_step, {}

    def keep(spec: Any, batches: Any, model: Any) -> Any:
        batch = next(batches)
        seen[spec.dtype].append(batch)
        return forward(spec, iter([batch]), model)

    monkeypatch.setattr(step, "forward_step", keep)
    for dtype, flags in {torch.float32: (), torch.bfloat16: ("--bf16",)}.items():
        seen[dtype] = []
        assert train("--train-iters", 2, *flags) == 0
    assert len(seen[torch.bfloat16]) == 4  # two microbatches each
    for rounded, exact in zip(seen[torch.bfloat16], seen[torch.float32], strict=True):
        for name in ("latents_BCTHW", "noise_BCTHW", "sigma_B"):
            ours, expected = getattr(rounded, name), getattr(exact, name)
            assert ours.dtype == torch.float32 and torch.equal(ours, expected), name
            assert not torch.equal(expected.bfloat16().float(), expected), f"{name} does not tell"


@pytest.mark.parametrize("flags", [(), ("--use-distributed-optimizer",)])
def test_masters_moments_and_gradients_are_in_fp32(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    apply, gradients = step.TrainingStep.apply, []

    def keep(self: step.TrainingStep, grad_norm: float) -> None:
        gradients.extend(parameter.main_grad.dtype for parameter in self.stages[0].parameters())
        apply(self, grad_norm)

    monkeypatch.setattr(step.TrainingStep, "apply", keep)
    assert train("--save", tmp_path, "--bf16", "--train-iters", 2, *flags) == 0
    stored = tensors(find_checkpoint(tmp_path), prefix="")
    states = {name: tensor.dtype for name, tensor in stored.items() if name.startswith("optimizer.")}
    assert {name.split(".")[1] for name in states} == {"master", "exp_avg", "exp_avg_sq"}
    assert {*states.values(), *gradients} == {torch.float32}
    # The weights that compute in fp32 have no master: they are one.
    model = {name.removeprefix("model."): tensor for name, tensor in stored.items() if name.startswith("model.")}
    with_master = {name.removeprefix("optimizer.master.") for name in states if ".master." in name}
    assert with_master == {name for name, tensor in model.items() if tensor.dtype == torch.bfloat16}
    for kept in ("modulation", "norm_", "time_embedding", "conditioning.phi", "head."):
        assert any(kept in name for name in model) and not any(kept in name for name in with_master), kept
    assert all(math.isfinite(row["loss"]) for row in metrics(tmp_path))
