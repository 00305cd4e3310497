"""Our table of names against the parameters of both branches of the reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.reference_weights import GOLDEN_CASES, golden_config, golden_facts
from safetensors import safe_open

from megatron_flashi2v.checkpoint.key_table import mappings, parameter_count
from megatron_flashi2v.config.model import ModelConfig


def shapes_in_table(config: ModelConfig, external_format: str) -> dict[str, list[int]]:
    return {
        name: list(entry.external_shape)
        for entry in mappings(config, external_format)
        for name in entry.external
    }


@pytest.mark.parametrize("variant", GOLDEN_CASES)
def test_main_branch(goldens: Path, variant: str) -> None:
    config = golden_config(goldens, variant)
    assert parameter_count(config) == golden_facts(goldens, variant)["params"]
    with safe_open(goldens / f"dit_{variant}.weights.safetensors", framework="pt") as weights:
        names = list(weights.keys())
        shapes = {name: weights.get_slice(name).get_shape() for name in names}
    assert shapes_in_table(config, "wan") == shapes


@pytest.mark.parametrize("variant", GOLDEN_CASES)
def test_npu_branch(goldens: Path, variant: str) -> None:
    config = golden_config(goldens, variant)
    stored = json.loads((goldens / "npu_branch.json").read_text())[variant]["npu_keys"]
    assert shapes_in_table(config, "flashi2v_npu") == stored
