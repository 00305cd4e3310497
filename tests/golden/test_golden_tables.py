"""Rotary tables, the rotation, and the timestep's sinusoid against tensors made by the reference."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flashi2v_kernels.qk_norm_rope.tables import axis_angles, axis_sizes, rope_tables
from flashi2v_kernels.registry import load_entry_point, specs_of
from megatron_flashi2v.flow.sinusoid import timestep_sinusoid

GRID = (3, 4, 5)  # tokens of the rotated example along time, height and width
HEAD_DIM = re.compile(r"rope\.hd(\d+)\..*")
IMPLEMENTATIONS = {spec.name: load_entry_point(spec) for spec in specs_of("qk_norm_rope") if "cpu" in spec.devices}
# torch compiles for longer than all other goldens take together.
CASES = [pytest.param(name, marks=pytest.mark.long) if name == "inductor" else name for name in IMPLEMENTATIONS]


@pytest.fixture(scope="module")
def tables(goldens: Path) -> dict[str, torch.Tensor]:
    return load_file(goldens / "flow_and_tables.safetensors")


def head_dims(tables: dict[str, torch.Tensor]) -> list[int]:
    found = sorted({int(match[1]) for match in map(HEAD_DIM.fullmatch, tables) if match})
    assert found
    return found


def ulp(values: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(values.abs(), torch.full_like(values, torch.inf)) - values.abs()


def assert_within_one_ulp(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    assert ((actual - expected).abs() <= ulp(expected)).all(), what


def test_rotary_split(goldens, tables):
    described = json.loads((goldens / "flow_and_tables.json").read_text())
    for head_dim in head_dims(tables):
        split = described[f"rope.hd{head_dim}"]
        assert list(axis_sizes(head_dim)) == split["real_split"]
        assert [size // 2 for size in axis_sizes(head_dim)] == split["complex_split"]


def test_rotary_table(tables):
    """The reference's table has the angles of one position on every axis, side by side."""
    for head_dim in head_dims(tables):
        real = tables[f"rope.hd{head_dim}.table_first64_real_fp64"]
        imaginary = tables[f"rope.hd{head_dim}.table_first64_imag_fp64"]
        angles = torch.cat([axis_angles(len(real), size) for size in axis_sizes(head_dim)], dim=1)
        assert_within_one_ulp(angles.cos(), real, f"cosines of head size {head_dim}")
        assert_within_one_ulp(angles.sin(), imaginary, f"sines of head size {head_dim}")


def rotated(name: str, x_SBhD: torch.Tensor, cos_SR: torch.Tensor, sin_SR: torch.Tensor) -> torch.Tensor:
    """An implementation's rotation alone: with these sums and weights its norm divides and multiplies by exactly 1."""
    width = x_SBhD.shape[2] * x_SBhD.shape[3]
    ones = {"sum_of_squares": x_SBhD.new_full(x_SBhD.shape[:2], width), "full_width": width}
    return IMPLEMENTATIONS[name](x_SBhD, x_SBhD.new_ones(width), cos_SR, sin_SR, 0.0, **ones)


@pytest.mark.parametrize("name", CASES)
def test_rotation_in_fp64_rounds_to_the_reference(tables, name):
    for head_dim in head_dims(tables):
        x_SBhD = tables[f"rope.hd{head_dim}.x"].transpose(0, 1).double()
        turned = rotated(name, x_SBhD, *rope_tables(GRID, head_dim, dtype=torch.float64))
        expected = tables[f"rope.hd{head_dim}.y"]
        assert_within_one_ulp(turned.transpose(0, 1).float(), expected, f"head size {head_dim}")


@pytest.mark.parametrize("name", CASES)
def test_rotation_in_fp32(tables, name):
    """The model rotates in fp32: three roundings, which the pair's length measures."""
    for head_dim in head_dims(tables):
        x_SBhD, expected = tables[f"rope.hd{head_dim}.x"].transpose(0, 1), tables[f"rope.hd{head_dim}.y"]
        turned = rotated(name, x_SBhD, *rope_tables(GRID, head_dim)).transpose(0, 1)
        length = expected.unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, dim=-1)
        assert ((turned - expected).abs() <= 2 * ulp(length)).all(), f"head size {head_dim}"


def test_sinusoid(tables):
    found = [key for key in tables if key.startswith("time.sinusoid")]
    assert found
    for key in found:
        timesteps, dim = tables["time.t"], tables[key].shape[1]
        assert_within_one_ulp(timestep_sinusoid(timesteps, dim, dtype=tables[key].dtype), tables[key], key)
        assert_within_one_ulp(timestep_sinusoid(timesteps, dim), tables[key].float(), key)


def test_every_key_is_compared(tables):
    known = {"time.t"} | {key for key in tables if key.startswith("time.sinusoid")}
    for head_dim in head_dims(tables):
        parts = ("x", "y", "table_first64_real_fp64", "table_first64_imag_fp64")
        known |= {f"rope.hd{head_dim}.{part}" for part in parts}
    assert {key for key in tables if key.startswith(("rope.", "time."))} == known
