"""Adapters train at every layout as in one process, beside a base that stays as it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers.base_weights import write_base
from helpers.layouts import (
    Layout,
    assert_ranks_agree,
    assert_same_gradients,
    assert_same_metrics,
    assert_same_velocity,
    assert_same_weights,
    metrics,
    run_layouts,
    tensors,
    weights,
)
from helpers.synthetic_data import write_synthetic
from safetensors.torch import save_file

from megatron_flashi2v.checkpoint.folders import find_checkpoint, load_state
from megatron_flashi2v.config.adapter import IMAGE_BRANCH, LINEARS
from megatron_flashi2v.config.model import ModelConfig

CONFIG = ModelConfig(
    num_layers=3, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, latent_channels=4, text_dim=8,
    text_length=8,
)
IMAGE = dataclasses.replace(CONFIG, conditioning="wan_i2v", image_dim=20, image_rows=5)
LATENTS = (4, 2, 6, 10)  # 2 x 3 x 5 tokens
TP, PP, CP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"
SP, ALGO, RECOMPUTE = "--sequence-parallel", "--context-parallel-algo", "--recompute-granularity"
DISTRIBUTED = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
ITERATIONS = 20

LAYOUTS = [
    Layout("tp2-sp-pp2", 4, (TP, "2", SP, PP, "2")),
    Layout("started-tp2-sp", 2, (TP, "2", SP)),  # from an adapter of another program's
]
LONG_LAYOUTS = [
    Layout("tp2", 2, (TP, "2")),
    Layout("tp4-sp", 4, (TP, "4", SP)),
    Layout("pp3", 3, (PP, "3")),
    Layout("cp2-ulysses", 2, (CP, "2")),
    Layout("tp2-sp-cp2", 4, (TP, "2", SP, CP, "2", ALGO, "ring")),
    Layout("dp2-distributed", 2, DISTRIBUTED),
    Layout("tp2-sp-dp2-distributed", 4, (TP, "2", SP, *DISTRIBUTED)),
    Layout("tp2-sp-full", 2, (TP, "2", SP, RECOMPUTE, "full")),
    Layout("tp2-sp-skip-attention", 2, (TP, "2", SP, RECOMPUTE, "skip_attention")),
    Layout("tp2-selective", 2, (TP, "2", RECOMPUTE, "selective")),
    # The first stage trains nothing; its backward runs all the same.
    Layout("head-pp2", 2, ("--train-only", "head", PP, "2")),
    Layout("head-tp2-sp-pp2", 4, ("--train-only", "head", TP, "2", SP, PP, "2")),
    Layout("started-tp2-sp-pp2", 4, (TP, "2", SP, PP, "2")),
    Layout("accumulating-dp2", 2, ("--global-batch-size", "4", *DISTRIBUTED)),
    # The keys and values of an image encoder's rows, and averages of adapters.
    Layout("image-tp2-sp", 2, (TP, "2", SP)),
    Layout("image-tp2-sp-pp2", 4, (TP, "2", SP, PP, "2")),
]
LORA = ("--lora-rank", "3", "--lora-alpha", "7", "--lora-targets", "all", "--train-only", "phi")


REFERENCES = {
    "head": ("--train-only", "head"),
    "accumulating": (*LORA, "--global-batch-size", "4"),
    "image": (
        *LORA, "--train-only", "img_emb", "--conditioning", "wan_i2v", "--image-embed-dim", "20", "--ema-decay", "0.5",
    ),
    "started": LORA,
    "single": LORA,
}
"""Runs of one process, and flags that they share with their layouts."""


def reference_of(layout: Layout) -> str:
    kind = layout.name.partition("-")[0]
    return kind if kind in REFERENCES else "single"


def common_flags(folder: Path) -> list[str]:
    """Of all runs, whose data and bases are written to a folder."""
    inputs = {"grey_clip": LATENTS, "image_rows": (IMAGE.image_rows, IMAGE.image_dim)}
    data = write_synthetic(folder / "set", 6, LATENTS, CONFIG.text_dim, CONFIG.text_length, seed=3, inputs=inputs)
    write_base(folder / "base", CONFIG)
    write_adapter(folder / "adapter.safetensors")
    return [
        "--model", "tiny", "--num-layers", "3", "--hidden-size", "32", "--ffn-hidden-size", "48",
        "--num-attention-heads", "4", "--text-dim", "8", "--text-length", "8", "--latent-channels", "4",
        "--data-path", str(data), "--device", "cpu", "--train-iters", str(ITERATIONS), "--seed", "7",
        "--micro-batch-size", "1", "--global-batch-size", "2", "--lr", "3e-3", "--adam-eps", "1e-5",
        "--load-weights", f"megatron:{folder / 'base'}",
    ]  # fmt: skip


def write_adapter(path: Path) -> None:
    """Pairs beside every linear under original names, from which runs start."""
    torch.manual_seed(9)
    held = {}
    for block in range(CONFIG.num_layers):
        for name in LINEARS:
            if name in IMAGE_BRANCH:
                continue
            inputs, outputs = {"ffn.0": (32, 48), "ffn.2": (48, 32)}.get(name, (32, 32))
            stem = f"diffusion_model.blocks.{block}.{name}"
            held[f"{stem}.lora_A.weight"], held[f"{stem}.alpha"] = torch.randn(3, inputs) / 6, torch.tensor(7.0)
            held[f"{stem}.lora_B.weight"] = torch.randn(outputs, 3) / 30
    save_file(held, path)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Iterations of two samples, in microbatches of one; only the layouts that tests ask for."""
    folder = tmp_path_factory.mktemp("adapters")
    common = common_flags(folder)
    write_base(folder / "image-base", IMAGE)
    beside = (item for item in request.session.items if item.path == request.path and hasattr(item, "callspec"))
    wanted = {item.callspec.params["layout"].name for item in beside if "layout" in item.callspec.params}
    layouts = [layout for layout in (*LAYOUTS, *LONG_LAYOUTS) if layout.name in wanted]
    references = sorted({reference_of(layout) for layout in layouts})
    layouts += [Layout(name, 1) for name in references]
    image = ("--load-weights", f"megatron:{folder / 'image-base'}")
    start = ("--load-adapter", str(folder / "adapter.safetensors"))
    more = {"image": image, "started": start}
    layouts = [
        Layout(layout.name, layout.world, (
            *REFERENCES[reference_of(layout)], *more.get(reference_of(layout), ()), *layout.flags,
        ))
        for layout in layouts
    ]  # fmt: skip
    return run_layouts(layouts, folder, common)


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.long) for layout in LONG_LAYOUTS)],
    ids=lambda layout: layout.name,
)
def test_a_layout_trains_like_one_process(runs: dict[str, Path], layout: Layout) -> None:
    run, single = runs[layout.name], runs[reference_of(layout)]
    rows = metrics(single)
    assert len(rows) == ITERATIONS and rows[-1]["loss"] < 0.95 * rows[0]["loss"]
    assert [row["loss"] for row in metrics(run)] == pytest.approx([row["loss"] for row in rows], rel=1e-6)
    assert_same_metrics(run, single)
    assert_same_velocity(run, single)
    assert_same_weights(run, single)
    assert weights(run), "nothing was trained"
    averages, expected = (tensors(find_checkpoint(folder), "ema.") for folder in (run, single))
    assert averages.keys() == expected.keys() and bool(averages) == (reference_of(layout) == "image")
    for name, average in averages.items():
        torch.testing.assert_close(average, expected[name], rtol=1e-4, atol=1e-6)
    if DISTRIBUTED[0] not in layout.flags:  # which leaves each replica its own part of the gradients
        assert_same_gradients(run, single)
        assert_ranks_agree(run)


def test_a_run_goes_on_in_one_process(tmp_path: Path) -> None:
    """All that a checkpoint holds comes back bit for bit, also from a first stage that trained nothing."""
    common = [*common_flags(tmp_path), "--train-iters", "2"]
    flags = {"pairs": (*LORA, "--bf16", "--ema-decay", "0.5"), "head": REFERENCES["head"]}
    divided = (TP, "2", SP, PP, "2")
    before = run_layouts([Layout(name, 4, (*kind, *divided)) for name, kind in flags.items()], tmp_path, common)
    after = run_layouts([
        Layout(f"{name}-again", 1, (*kind, "--load", str(before[name])), saves_again=True)
        for name, kind in flags.items()
    ], tmp_path, common)  # fmt: skip
    for name in flags:
        found, expected = (tensors(find_checkpoint(run), "") for run in (after[f"{name}-again"], before[name]))
        assert found.keys() == expected.keys() and any(key.startswith("optimizer.exp_avg.") for key in found)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        states = [load_state(find_checkpoint(run))["optimizer"] for run in (after[f"{name}-again"], before[name])]
        assert states == [{"step": 2}] * 2
