"""Weights into a divided run and out of it: what every rank reads, and what they write together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import checkpoint
from helpers.layouts import Layout, run_layouts, weights
from helpers.synthetic_data import write_synthetic

from megatron_flashi2v.conversion.convert import FORMATS, convert
from megatron_flashi2v.conversion.torch_distributed_checkpoint import METADATA_NAME
from megatron_flashi2v.models.presets import PRESETS

ANY_PARADIGM = tuple(name for name in FORMATS if name != "comfyui")
"""Formats that hold every model."""

DIVIDED = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--sequence-parallel")
TINY = dataclasses.replace(PRESETS["tiny"], text_cleaning="full")
OWN = "model.conditioning."


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One iteration that changes nothing (a learning rate of zero) from weights in a file; two launches in all."""
    folder = tmp_path_factory.mktemp("conversion")
    data = write_synthetic(folder / "data", 6, (16, 3, 8, 12), 64, 32, seed=3)
    for name, conditioning in (("flashi2v", "flashi2v"), ("t2v", "text_to_video")):
        checkpoint(folder / name, dataclasses.replace(TINY, conditioning=conditioning))
        convert(("megatron", folder / name), ("wan", folder / f"{name}-wan"), max_shard_bytes=3_000_000)
    common = ["--model", "tiny", "--data-path", str(data), "--device", "cpu", "--train-iters", "1", "--seed", "7",
              "--micro-batch-size", "2", "--global-batch-size", "4", "--optimizer", "sgd", "--lr", "0",
              "--load-weights"]  # fmt: skip
    started = [f"wan:{folder / 'flashi2v-wan'}"]
    from_t2v = [f"wan:{folder / 't2v-wan'}"]
    saves = run_layouts(
        [
            Layout("single", 1, tuple(started)), Layout("divided", 4, (*started, *DIVIDED)),
            Layout("t2v-single", 1, tuple(from_t2v)), Layout("t2v-divided", 4, (*from_t2v, *DIVIDED)),
        ],
        folder, common,
    )  # fmt: skip
    return {**saves, "source": folder / "flashi2v", "t2v-source": folder / "t2v"}


def test_a_divided_run_starts_from_the_files_weights(runs: dict[str, Path]) -> None:
    for prefix in ("", "t2v-"):
        expected = weights(runs[f"{prefix}source"])
        for layout in ("single", "divided"):
            found = weights(runs[prefix + layout])
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), layout
            added = found.keys() - expected.keys()
            assert added == ({name for name in found if name.startswith(OWN)} if prefix else set())
        # What the paradigm adds starts as without the file: a zero last layer, so that the model is the file's.
        assert not prefix or not found[f"{OWN}phi.conv_out.weight"].any()


@pytest.mark.parametrize("name", ANY_PARADIGM)
def test_the_export_of_a_divided_run_is_that_of_one_process(runs: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Byte for byte, also where tensors were stored in slices."""
    for layout in ("single", "divided"):
        convert(("megatron", runs[layout]), (name, tmp_path / layout), verify=True)
    files = [path.relative_to(tmp_path / "single") for path in (tmp_path / "single").rglob("*") if path.is_file()]
    assert files
    for path in files:
        if path.name == METADATA_NAME:  # holds a random number of its save
            continue
        assert (tmp_path / "single" / path).read_bytes() == (tmp_path / "divided" / path).read_bytes(), path
