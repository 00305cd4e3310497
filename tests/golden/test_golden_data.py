"""The reference's filter decisions, frame indices, crops, pixels and cleaned captions, reproduced exactly."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_flashi2v.config.clips import FilterSettings
from megatron_flashi2v.data.annotations import Entry, parse_entry
from megatron_flashi2v.data.filters import judge
from megatron_flashi2v.data.frames import choose_window, frame_indices, frame_interval
from megatron_flashi2v.data.transforms import centre_offsets, cover_size, resize_and_crop, to_model_range
from megatron_flashi2v.encoders.text_cleaning import clean_text

# The reference's argument names, and ours.
FILTER_NAMES = {
    "min_hxw": "min_pixels",
    "train_fps": "fps",
    "min_h_div_w_ratio": "min_aspect",
    "max_h_div_w_ratio": "max_aspect",
    "sample_height": "height",
    "sample_width": "width",
    "sample_num_frames": "num_frames",
    "min_motion_value": "min_motion",
    "max_motion_value": "max_motion",
    "too_long_factor": "too_long_factor",
}


@pytest.fixture(scope="module")
def data_filter(goldens: Path) -> dict[str, Any]:
    return json.loads((goldens / "data_filter.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def transforms(goldens: Path) -> dict[str, torch.Tensor]:
    return load_file(goldens / "video_transform.safetensors")


def test_filter_decisions(data_filter: dict[str, Any]) -> None:
    assert data_filter["configs"]
    for name, config in data_filter["configs"].items():
        wanted = {FILTER_NAMES[key]: value for key, value in config["kwargs"].items()}
        settings = FilterSettings(filter_rules="reference", **wanted)
        decisions = [decide(raw, settings) for raw in data_filter["entries"]]
        assert decisions == config["decisions"], name
        assert sum(decision["keep"] for decision in decisions) == config["kept"], name


def decide(raw: dict[str, Any], settings: FilterSettings) -> dict[str, Any]:
    entry = parse_entry(raw, root="/root_dir", index=0, source="entry")
    assert isinstance(entry, Entry), entry
    drop = judge(entry, settings)
    if drop is not None:
        return {"keep": False, "reason": f"cnt_{drop.reason}"}
    return {"keep": True, "start_frame_idx": entry.start_frame, "path": str(entry.file)}


def test_frame_indices(data_filter: dict[str, Any]) -> None:
    assert data_filter["frame_index_cases"]
    for case in data_filter["frame_index_cases"]:
        interval = frame_interval(case["video_fps"], case["train_fps"])
        indices = frame_indices(case["start_frame_idx"], case["meta_num_frames"], interval)
        numbers = random.Random(case["python_random_seed"])
        window = choose_window(indices, case["sample_num_frames"], lambda n: numbers.randint(0, n - 1), "reference")  # noqa: B023
        assert window.tolist() == case["indices"], case


def test_resize_and_crop_sizes(data_filter: dict[str, Any]) -> None:
    assert data_filter["resize_crop_480x832"]
    for case in data_filter["resize_crop_480x832"]:
        size = cover_size(case["h"], case["w"], 480, 832)
        assert list(size) == case["resized"], case
        assert centre_offsets(*size, 480, 832) == (case["crop_top"], case["crop_left"]), case


def test_pixels(transforms: dict[str, torch.Tensor]) -> None:
    names = sorted(name.removesuffix(".resized_u8") for name in transforms if name.endswith(".resized_u8"))
    assert names
    for name in names:
        clip, interpolation = name.split(".")
        wanted_TCHW = transforms[f"{name}.resized_u8"]
        height, width = wanted_TCHW.shape[-2:]
        resized_TCHW = resize_and_crop(transforms[f"{clip}.in"], height, width, interpolation)
        assert resized_TCHW.dtype == torch.uint8
        assert torch.equal(resized_TCHW, wanted_TCHW), name
        out_CTHW = to_model_range(resized_TCHW)
        torch.testing.assert_close(
            out_CTHW.transpose(0, 1), transforms[f"{name}.out"], atol=1e-6, rtol=0, msg=lambda text: f"{name}: {text}"  # noqa: B023
        )


def test_floating_pixels_are_not_rounded(transforms: dict[str, torch.Tensor]) -> None:
    names = sorted(name for name in transforms if name.endswith(".float_in_resized"))
    assert names
    for name in names:
        clip, interpolation, _ = name.split(".")
        wanted_TCHW = transforms[name]
        height, width = wanted_TCHW.shape[-2:]
        resized_TCHW = resize_and_crop(transforms[f"{clip}.in"].float(), height, width, interpolation)
        torch.testing.assert_close(resized_TCHW, wanted_TCHW, atol=1e-3, rtol=0)


def test_text_cleaning(goldens: Path) -> None:
    pairs = json.loads((goldens / "sampler_text.json").read_text(encoding="utf-8"))["text_cleaning"]
    assert pairs
    for pair in pairs:
        assert clean_text(pair["input"], "full") == pair["output"], pair
