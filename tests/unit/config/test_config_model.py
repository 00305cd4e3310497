"""The model's configuration round-trips through JSON and refuses what cannot be built."""

from __future__ import annotations

import json

import pytest

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.models.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name: str) -> None:
    text = json.dumps(PRESETS[name].to_json())
    assert ModelConfig.from_json(json.loads(text), source="x") == PRESETS[name]


@pytest.mark.parametrize("change, word", [
    ({"depth": 3}, "unknown keys depth"),
    ({"num_layers": 0}, "num_layers is 0"),
    ({"phi_order": "both"}, "phi_order is 'both'"),
    ({"phi_kernel_size": [2, 3, 3]}, "odd"),
    ({"phi_kernel_size": 3}, "phi_kernel_size is 3; it must be three"),
    ({"patch_size": [2, 2]}, r"patch_size is \(2, 2\); it must be three"),
    ({"patch_size": [1, "2", 2]}, "patch_size is '2'; it must be a whole number"),
    ({"hidden_size": "192"}, "hidden_size is '192'"),
    ({"conditioning": 3}, "conditioning is 3"),
])
def test_refused(change: dict, word: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model_config\.json: .*{word}"):
        ModelConfig.from_json({**PRESETS["tiny"].to_json(), **change}, source="model_config.json")


def test_missing_key_names_the_file() -> None:
    values = PRESETS["tiny"].to_json()
    del values["hidden_size"]
    with pytest.raises(ConfigError, match=r"model_config\.json: missing keys hidden_size"):
        ModelConfig.from_json(values, source="model_config.json")
