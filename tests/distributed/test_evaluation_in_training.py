"""The figures of ``--evaluation-interval`` are the same at every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.ranks import run_ranks
from helpers.synthetic_data import write_synthetic
from helpers.tiny_models import make_tiny_vae

from megatron_flashi2v.cli.main import main
from megatron_flashi2v.runtime.files import read_jsonl

TP, PP, CP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"
LAYOUTS = {"single": (1, []), "dp2": (2, [])}
LONG = {
    "single": (1, []),
    "dp2-pp2": (4, [PP, "2"]),
    "tp2-sp": (2, [TP, "2", "--sequence-parallel"]),
    "cp2": (2, [CP, "2"]),
    "fsdp2": (2, ["--data-parallel-sharding-strategy", "optim_grads_params"]),
}


def command(rank: int, words: list[str]) -> None:
    assert main(words) == 0


def require_equal(layouts: dict[str, tuple[int, list[str]]], folder: Path) -> None:
    data, valid = (write_synthetic(folder / str(seed), 6, (16, 2, 4, 4), 64, 32, seed=seed) for seed in (3, 4))
    vae = make_tiny_vae(folder / "vae", z_dim=16, temporal=(True, True))
    flags = ["train", "--model", "tiny", "--data-path", str(data), "--device", "cpu", "--train-iters", "2",
             "--micro-batch-size", "1", "--global-batch-size", "2", "--lr", "2e-4", "--valid-data-path", str(valid),
             "--evaluation-interval", "2", "--sample-vae", str(vae), "--sample-count", "3", "--sample-num-steps", "2"]
    for name, (processes, layout) in layouts.items():
        run_ranks(command, processes, folder, [*flags, *layout, "--save", str(folder / name)])
    (want,) = read_jsonl(folder / "single" / "evaluation.jsonl")
    assert want["psnr"] < 50  # the video is not the image
    for layout in layouts:
        save = folder / layout
        (row,) = read_jsonl(save / "evaluation.jsonl")
        assert row.keys() == want.keys()
        for name in row.keys() - {"seconds"}:  # a latent's last bits turn a pixel's level
            assert row[name] == pytest.approx(want[name], rel=1e-3, abs=1e-4), (layout, name)
        videos = json.loads((save / "evaluation" / "iter_0000002.json").read_text())["videos"]
        assert [video["place"] for video in videos] == [0, 1, 2]  # replicas share them
        assert len({video["video"]["psnr"][-1] for video in videos}) == 3
        assert (save / "evaluation" / "curves.png").is_file()


def test_replicas(tmp_path: Path) -> None:
    require_equal(LAYOUTS, tmp_path)


@pytest.mark.long
def test_other_layouts(tmp_path: Path) -> None:
    require_equal(LONG, tmp_path)
