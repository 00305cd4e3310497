"""Adaptive gradient clipping against both branches of the reference: every stored number of every step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_flashi2v.config.train import OptimizerArguments
from megatron_flashi2v.training.clipping import Clip, Clipper, make_clipper, scale_gradients

Row = dict[str, Any]
RELATIVE, ABSOLUTE = 1e-5, 1e-6  # the reference computes in fp32, its npu branch in all of it
# How the reference was run; every number but the patch file's is our default.
SECTIONS = {
    "main_branch": {"clip_grad_method": "adaptive"},
    "npu_core_distributed_optimizer": {"clip_grad_method": "adaptive-npu", "clip_grad_rules": "reference"},
    "npu_core_nan_sequence": {"clip_grad_method": "adaptive-npu", "clip_grad_rules": "reference"},
    "npu_patch_file_variant": {
        "clip_grad_method": "adaptive-npu", "clip_grad_rules": "reference-patch", "clip_grad_extreme_norm": 5.0,
    },
}


@dataclass(frozen=True)
class Step:
    """One step of ours: the clipper after it, and what it did."""

    norm: float
    clip: Clip
    gradient: Tensor
    clipper: Clipper
    is_extreme: bool

    @property
    def norm_after(self) -> float:
        return self.gradient.norm().item()

    @property
    def squared_distance(self) -> float:
        """Of the norm to the mean that it has just moved."""
        return (self.clipper.statistics.mean - self.norm) ** 2


@pytest.fixture(scope="module")
def sequences(goldens: Path) -> dict[str, list[Row]]:
    return json.loads((goldens / "adaptive_clip.json").read_text())


def same(found: Any, expected: Any) -> bool:
    """Equal within the tolerance; NaN equals NaN. The file writes what is not finite as text, or as JSON's NaN."""
    return found == pytest.approx(float(expected), rel=RELATIVE, abs=ABSOLUTE, nan_ok=True)


def gradients_of(rows: list[Row]) -> list[Tensor]:
    """The gradient before each step: the direction is the same in all of them, and its length is given."""
    stored = (torch.tensor([float(value) for value in row["grads_after"]]) for row in rows)
    direction = next(gradient for gradient in stored if 0 < gradient.norm() < math.inf)
    return [direction / direction.norm() * float(row["norm_in"]) for row in rows]


def run(rows: list[Row], arguments: dict[str, Any]) -> list[Step]:
    """Our clipper over a sequence; the clipper is restored from its state, as on a resume, before each step."""
    steps, state = [], None
    for gradient in gradients_of(rows):
        clipper = make_clipper(OptimizerArguments(**arguments))
        if state is not None:
            clipper.load_state_dict(json.loads(json.dumps(state)))
        before = state["extreme"] if state and "extreme" in state else 0
        norm = gradient.norm().item()
        clip = clipper.clip(norm)
        scale_gradients([gradient], clip)
        state = clipper.state_dict()
        steps.append(Step(norm, clip, gradient, clipper, state.get("extreme", 0) > before))
    return steps


def main_branch_state(step: Step, previous: Row) -> Row:
    """The reference's names for our numbers; what a step leaves alone keeps its value of the step before."""
    inside = step.norm <= step.clip.threshold
    return {
        "clip_grad_ema_decay": step.clipper.statistics.decay,
        "moving_avg_max_grad_norm": step.clipper.statistics.mean,
        "moving_avg_max_grad_norm_var": step.clipper.statistics.variance,
        "grad_norm_before_clip": step.norm,
        "grad_norm_after_clip": step.norm_after,
        "max_grad_norm": step.clip.threshold,
        "max_grad_norm_var": step.squared_distance if inside else previous["max_grad_norm_var"],
    }


def npu_state(step: Step, previous: Row) -> Row:
    """As :func:`main_branch_state`; the flag for extreme norms is never taken back."""
    first, inside = not previous, step.norm <= step.clip.threshold
    ignored = step.is_extreme and step.clipper.rules == "reference-patch"  # it counts, and does nothing else
    coefficient = 1.0 if inside or first else step.norm / step.clip.threshold
    return {
        "moving_avg_max_grad_norm": step.clipper.statistics.mean,
        "moving_avg_max_grad_norm_var": step.clipper.statistics.variance,
        "max_grad_norm": step.norm,
        "max_grad_norm_after_clip": previous["max_grad_norm_after_clip"] if ignored else step.norm_after,
        "max_norm": step.clip.threshold,
        "max_grad_norm_var": 0.0 if first else step.squared_distance if inside else previous["max_grad_norm_var"],
        "clip_coef": previous["clip_coef"] if ignored else -1.0 if step.is_extreme else coefficient,
        "nan_norm_flag": float(not math.isfinite(step.norm)),
        "extreme_error_flag": float(step.clipper.extreme > 0),
    }


STATES: dict[str, Callable[[Step, Row], Row]] = {
    "adaptive": main_branch_state, "adaptive-npu": npu_state,
}


def test_every_section_is_compared(sequences: dict[str, list[Row]]) -> None:
    assert sequences.keys() == SECTIONS.keys()


@pytest.mark.parametrize("section", SECTIONS)
def test_the_references_rules(sequences: dict[str, list[Row]], section: str) -> None:
    rows, arguments = sequences[section], SECTIONS[section]
    assert rows
    state: Row = {}
    for number, (row, step) in enumerate(zip(rows, run(rows, arguments), strict=True)):
        state = STATES[arguments["clip_grad_method"]](step, state)
        assert row.keys() == {"norm_in", "returned", "grads_after"} | state.keys()
        assert same(step.norm, row["norm_in"]), number
        assert same(step.norm_after, row["returned"]), number
        for name, value in state.items():
            assert same(value, row[name]), f"step {number}: {name} is {value}, the reference's {row[name]}"
        for value, expected in zip(step.gradient.tolist(), row["grads_after"], strict=True):
            assert same(value, expected), f"step {number}: {step.gradient.tolist()}, not {row['grads_after']}"


@pytest.mark.parametrize("section", [name for name, flags in SECTIONS.items() if "clip_grad_rules" in flags])
def test_corrected_rules_differ_only_where_the_reference_is_wrong(
    sequences: dict[str, list[Row]], section: str
) -> None:
    """The same statistics and thresholds; but every norm ends at its threshold, or, if extreme, at zero."""
    rows, reference = sequences[section], SECTIONS[section]
    corrected = {name: value for name, value in reference.items() if name != "clip_grad_rules"}
    for number, (row, step) in enumerate(zip(rows, run(rows, corrected), strict=True)):
        for name, value in (("moving_avg_max_grad_norm", step.clipper.statistics.mean),
                            ("moving_avg_max_grad_norm_var", step.clipper.statistics.variance),
                            ("max_norm", step.clip.threshold)):
            assert same(value, row[name]), f"step {number}: {name}"
        if step.is_extreme:
            assert step.gradient.tolist() == [0.0] * len(step.gradient), number
        elif number and step.norm > step.clip.threshold:
            assert step.norm_after == pytest.approx(step.clip.threshold, rel=1e-5), number
        else:
            assert step.clip.factor == 1.0, number
