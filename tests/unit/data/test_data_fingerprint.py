"""The settings of a prepared data set are those that version 0.1.0 wrote, so that its data sets stay valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.prepare import EncodingConfig
from megatron_flashi2v.config.recipe import from_values
from megatron_flashi2v.data import fingerprint
from megatron_flashi2v.data.fingerprint import data_settings, settings_hash

# Written by commit b1c9d9c, from the folders below.
RECORDED = {
    "pipeline_version": 2, "num_frames": 9, "height": 48, "width": 80, "fps": 12.0, "min_aspect": 0.2,
    "max_aspect": 2.0, "too_long_factor": 5.0, "min_motion": 0.0, "max_motion": 1.0, "filter_rules": "corrected",
    "interpolation": "bicubic", "text_cleaning": "full", "text_encoder_dtype": "float32", "text_length": 32, "seed": 7,
    "min_pixels": 3840,
    "vae": "48888fdc510f53ea16f7a647eb4550faf84fa29902217292db67d62290afb716",
    "text_encoder": "2f8140fd13a5618ce4a52b8d9b83159ac64510ba1e4c4441eea323f5dcb8c2b3",
    "tokenizer": "67d8ec18b9a786381441f64dd2128b921c9923a7140c85015d8db2db39532e65",
    "entries": 0, "annotations": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
}
RECORDED_BY_PREPARE = "609e0ca5ceec371b0cd34a16155cbfaebe1df5f5a4b0466334151d1529a950ed"
RECORDED_ONLINE = "4c9cb21ba295d7ff266a2729d31a97bd5c6f90f464111876b45e0e3f0c0e2aef"


def config_of(folder: Path, **changes: Any) -> EncodingConfig:
    values: dict[str, Any] = {"annotations": folder / "meta.json"}
    for name in ("vae", "text_encoder", "tokenizer"):
        values[name] = folder / name
        values[name].mkdir(exist_ok=True)
        (values[name] / "config.json").write_text(name)
    values |= {"height": 48, "width": 80, "num_frames": 9, "fps": 12.0, "min_aspect": 0.2, "text_length": 32, "seed": 7}
    values |= fingerprint.LATER_FIELDS  # at what earlier versions did
    return from_values(EncodingConfig, values | changes)


def test_settings_are_those_of_earlier_versions(tmp_path: Path) -> None:
    settings = data_settings(config_of(tmp_path), [], [])
    assert settings == RECORDED
    assert settings_hash(settings | {"samples_per_shard": 3}) == RECORDED_BY_PREPARE
    assert settings_hash(data_settings(config_of(tmp_path, min_pixels=5), [], [])) == RECORDED_ONLINE


def test_what_changes_no_sample_changes_no_settings(tmp_path: Path) -> None:
    changed = config_of(tmp_path, decode_workers=7, decode_timeout_s=3.0, annotations=tmp_path / "elsewhere.json")
    assert data_settings(changed, [], []) == RECORDED
    assert data_settings(config_of(tmp_path, min_pixels=48 * 80), [], []) == RECORDED


def test_a_later_field_counts_once_it_changes_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fingerprint.LATER_FIELDS, "interpolation", "bicubic")
    assert "interpolation" not in data_settings(config_of(tmp_path), [], [])
    assert data_settings(config_of(tmp_path, interpolation="bilinear"), [], [])["interpolation"] == "bilinear"
    assert data_settings(config_of(tmp_path, frame_picking="time"), [], [])["frame_picking"] == "time"
    assert data_settings(config_of(tmp_path, vae_dtype="bfloat16"), [], [])["vae_dtype"] == "bfloat16"


def test_a_path_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--vae must be given"):
        data_settings(config_of(tmp_path, vae=None), [], [])
