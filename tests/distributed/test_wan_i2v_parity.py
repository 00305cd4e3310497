"""Wan's image-to-video model trains at every layout as in one process, from weights with which the image counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.layouts import (
    Layout,
    assert_ranks_agree,
    assert_same_gradients,
    assert_same_metrics,
    assert_same_velocity,
    assert_same_weights,
    run_layouts,
)
from helpers.reference_weights import random_weights
from helpers.synthetic_data import write_synthetic
from safetensors.torch import save_file

from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.conversion.formats.original_config import wan_config

CONFIG = ModelConfig(
    num_layers=3, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, text_dim=16, text_length=8,
    conditioning="wan_i2v", image_dim=20, image_rows=5,
)
LATENTS = (16, 2, 6, 10)  # 2 x 3 x 5 tokens
TP, PP, CP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"
SP, ALGO, STRATEGY = "--sequence-parallel", "--context-parallel-algo", "--data-parallel-sharding-strategy"
RECOMPUTE, WITHOUT = "--recompute-granularity", ("--image-embed-dim", "0")
ADAM = ("--optimizer", "adam", "--lr", "1e-4", "--adam-eps", "1e-5")

# Five rows of the image over two ranks: one is padding.
LAYOUTS = [
    Layout("tp2-sp-pp2", 4, (TP, "2", SP, PP, "2")),
    Layout("cp2-ring", 2, (CP, "2", ALGO, "ring")),
    Layout("params", 2, (STRATEGY, "optim_grads_params", *ADAM)),
]
LONG_LAYOUTS = [
    Layout("tp2", 2, (TP, "2")),
    Layout("tp4-sp", 4, (TP, "4", SP)),
    Layout("pp3", 3, (PP, "3")),
    Layout("cp2-ulysses", 2, (CP, "2")),
    Layout("tp2-sp-cp2", 4, (TP, "2", SP, CP, "2")),
    Layout("tp2-sp-full", 2, (TP, "2", SP, RECOMPUTE, "full")),
    Layout("tp2-sp-skip-attention", 2, (TP, "2", SP, RECOMPUTE, "skip_attention")),
    Layout("tp2-sp-selective", 2, (TP, "2", SP, RECOMPUTE, "selective")),
    Layout("params-tp2-sp", 4, (STRATEGY, "optim_grads_params", TP, "2", SP, *ADAM)),
    Layout("without-tp2-sp-pp2", 4, (*WITHOUT, TP, "2", SP, PP, "2")),
    Layout("without-cp2", 2, (*WITHOUT, CP, "2")),
]


def reference_of(layout: Layout) -> str:
    return "adam" if layout.name.startswith("params") else "without" if layout.name.startswith("without") else "single"


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three iterations of four samples, in microbatches of two; only the layouts that tests ask for."""
    folder = tmp_path_factory.mktemp("wan_i2v")
    inputs = {"grey_clip": LATENTS, "image_rows": (CONFIG.image_rows, CONFIG.image_dim)}
    data = write_synthetic(folder / "set", 6, LATENTS, CONFIG.text_dim, CONFIG.text_length, seed=3, inputs=inputs)
    for name, config in (("weights", CONFIG), ("weights-without", ModelConfig.from_json(
        {**CONFIG.to_json(), "image_dim": 0}, source="test",
    ))):  # fmt: skip
        (folder / name).mkdir()
        save_file(random_weights(config, "wan", torch.Generator().manual_seed(5)), folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps(wan_config(config)))
    common = [
        "--model", "tiny", "--num-layers", "3", "--hidden-size", "64", "--ffn-hidden-size", "96",
        "--num-attention-heads", "4", "--text-dim", "16", "--text-length", "8", "--conditioning", "wan_i2v",
        "--image-embed-dim", "20", "--data-path", str(data), "--device", "cpu", "--train-iters", "3", "--seed", "7",
        "--micro-batch-size", "2", "--global-batch-size", "4", "--optimizer", "sgd", "--lr", "0.05",
        "--load-weights", f"wan:{folder / 'weights'}",
    ]  # fmt: skip
    wanted = {item.callspec.params["layout"].name for item in request.session.items
              if item.fspath == request.fspath and "layout" in item.callspec.params}  # fmt: skip
    layouts = [layout for layout in (*LAYOUTS, *LONG_LAYOUTS) if layout.name in wanted]
    references = {reference_of(layout) for layout in layouts}
    flags = {"single": (), "adam": ADAM, "without": WITHOUT}
    layouts += [Layout(name, 1, flags[name]) for name in sorted(references)]
    other = ("--load-weights", f"wan:{folder / 'weights-without'}")
    layouts = [
        Layout(layout.name, layout.world, (*layout.flags, *other)) if layout.name.startswith("without") else layout
        for layout in layouts
    ]
    return run_layouts(layouts, folder, common)


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.long) for layout in LONG_LAYOUTS)],
    ids=lambda layout: layout.name,
)
def test_a_layout_trains_like_one_process(runs: dict[str, Path], layout: Layout) -> None:
    run, single = runs[layout.name], runs[reference_of(layout)]
    assert_same_metrics(run, single)
    assert_same_velocity(run, single)
    assert_same_weights(run, single)
    assert_ranks_agree(run)
    if not layout.name.startswith("params"):
        assert_same_gradients(run, single)
