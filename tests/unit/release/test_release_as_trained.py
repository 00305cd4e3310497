"""Sampling treats text and pictures as training did: data set, checkpoint and release record how."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.releases import CONFIG, release, sampled, train
from helpers.tiny_corpus import make_corpus
from PIL import Image
from torch.nn import functional

from megatron_flashi2v import FlashI2VPipeline, UserError
from megatron_flashi2v.cli.main import main
from megatron_flashi2v.config.sample import SampleConfig
from megatron_flashi2v.data.description import read_description
from megatron_flashi2v.sampling import run, session
from megatron_flashi2v.sampling.pipeline import ImageToVideoPipeline
from megatron_flashi2v.sampling.prompts import DEFAULT_NEGATIVE_PROMPT

SIZE = (16, 24)


def resized(path: Path, mode: str) -> torch.Tensor:
    """By torch alone: a picture of 40 x 20 covers 24 x 16 pixels as one of 32 x 16, of which the middle is left."""
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
    wide = functional.interpolate(pixels, size=(16, 32), mode=mode, align_corners=False, antialias=True)
    return wide[0, :, :, 4:28]


def convert(form: str, source: Path, to: str, target: Path, *flags: str) -> Path:
    assert main(["convert", "--from", form, str(source), "--to", to, str(target), *flags]) == 0
    return target


def state_of(converted: Path) -> dict[str, Any]:
    return json.loads((converted / "iter_0000000" / "state.json").read_text())


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Pictures as every pipeline got them fitted."""
    seen: list[torch.Tensor] = []
    prepare = ImageToVideoPipeline.prepare

    def watched(self: ImageToVideoPipeline, *inputs: Any) -> Any:
        prompts, images = prepare(self, *inputs)
        seen.append(images[0])
        return prompts, images

    monkeypatch.setattr(ImageToVideoPipeline, "prepare", watched)
    return seen


def test_resizing_is_the_data_sets_own(
    parts: Path, tmp_path: Path, run_command: Callable[..., int], fitted: list[torch.Tensor]
) -> None:
    image = parts / "image.png"
    expected = {mode: resized(image, mode) for mode in ("bicubic", "bilinear")}
    assert (expected["bicubic"].int() - expected["bilinear"].int()).abs().max() > 3
    (tmp_path / "corpus").mkdir()
    flags = make_corpus(tmp_path / "corpus", 2, z_dim=4, text_dim=16)
    for mode in expected:
        data = tmp_path / mode / "data"
        assert main(["prepare", *flags, "--output", str(data), "--seed", "3", "--interpolation", mode]) == 0
        assert read_description(data).info.interpolation == mode
        assert "interpolation" not in json.loads((data / "dataset.json").read_text())["info"]  # as it always was
    assert run_command(
        "--model", "tiny", "--num-layers", 1, "--hidden-size", 24, "--ffn-hidden-size", 24, "--num-attention-heads", 2,
        "--latent-channels", 4, "--text-dim", 16, "--train-iters", 1, "--device", "cpu",
        "--data-path", tmp_path / "bilinear" / "data", "--save", tmp_path / "bilinear" / "run",
    ) == 0  # fmt: skip
    folder = release(tmp_path / "bilinear", parts)
    size = ("--image", str(image), "--num-frames", "5", "--height", "16", "--width", "24")
    for load in (tmp_path / "bilinear" / "run", folder):
        sampled(load, parts, tmp_path, *size)
        sampled(load, parts, tmp_path, *size, "--interpolation", "bicubic")
        assert torch.equal(fitted[-2], expected["bilinear"]) and torch.equal(fitted[-1], expected["bicubic"])
    pipeline = FlashI2VPipeline.from_pretrained(folder)
    # By place, as of version 0.1: the ninth is the number of videos.
    found = pipeline(Image.open(image), "a", None, 16, 24, 5, 1, 1.0, 2).frames
    assert len(found) == 2 and torch.equal(fitted[-1], expected["bilinear"])
    back = convert("diffusers", folder, "megatron", tmp_path / "back")
    recorded = json.loads((tmp_path / "bilinear" / "data" / "dataset.json").read_text())["info"]
    assert state_of(back) == {"iteration": 0, "consumed_samples": 0, "data": {
        "frames": recorded["frames"], "height": recorded["height"], "width": recorded["width"],
        "fps": recorded["fps"], "interpolation": "bilinear",
    }}  # fmt: skip


def test_weights_of_flashi2vs_branches_sample_as_their_branches_do(
    parts: Path, tmp_path: Path, fitted: list[torch.Tensor]
) -> None:
    """Light cleaning on both; bilinear on npu. An own checkpoint keeps what it was trained with."""
    train(tmp_path / "run", dataclasses.replace(CONFIG, freq_dim=256))
    image = parts / "image.png"
    size = ("--image", str(image), "--num-frames", "5", "--height", "16", "--width", "24")
    for name, mode in (("flashi2v-npu", "bilinear"), ("flashi2v-gpu", "bicubic")):
        root = tmp_path / name
        flags = ["convert", "--from", "megatron", str(tmp_path / "run"), "--to", name, str(root / "theirs")]
        assert main(flags) == 0
        ours = state_of(convert(name, root / "theirs", "megatron", root / "ours"))
        assert "data" not in ours  # our own export: the branch's resizing is not the model's
        (root / "theirs" / "model_config.json").unlink()
        back = ["convert", "--from", name, str(root / "theirs"), "--num-attention-heads", "3", "--phi-order",
                "repeat_then_conv", "--to", "megatron"]  # fmt: skip
        assert main([*back, str(root / "run")]) == 0
        assert main([*back, str(root / "full"), "--text-cleaning", "full"]) == 0
        found = {kind: json.loads((root / kind / "iter_0000000" / "model_config.json").read_text())["text_cleaning"]
                 for kind in ("run", "full")}  # fmt: skip
        assert found == {"run": "light", "full": "full"}
        sampled(root / "run", parts, tmp_path, *size)
        assert torch.equal(fitted[-1], resized(image, mode))
    again = convert("megatron", tmp_path / "flashi2v-npu" / "run", "flashi2v-gpu", tmp_path / "again")
    assert state_of(convert("flashi2v-gpu", again, "megatron", tmp_path / "last"))["data"] == {
        "interpolation": "bilinear"
    }
    assert main(["convert", "--from", "megatron", str(tmp_path / "run"), "--to", "wan", str(tmp_path / "wan")]) == 0
    assert json.loads((tmp_path / "wan" / "model_config.json").read_text())["text_cleaning"] == "full"


def test_text_cleaning_and_negative_prompts(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    encode = session.RecentRows.encode
    monkeypatch.setattr(session.RecentRows, "encode", lambda self, texts: seen.extend(texts) or encode(self, texts))
    train(tmp_path / "run", CONFIG)
    (tmp_path / "worst.txt").write_text("Blurred, GREY\n", encoding="utf-8")
    worst = f"@{tmp_path / 'worst.txt'}"
    folder = release(tmp_path, parts, "--negative-prompt", worst, "--text-cleaning", "light")
    words = ("--image", str(parts / "image.png"), "--prompt", "A  DOG")
    back = convert("diffusers", folder, "megatron", tmp_path / "back")
    index = json.loads((folder / "model_index.json").read_text())
    again = json.loads((convert("diffusers", folder, "diffusers", tmp_path / "again") / "model_index.json").read_text())
    for key in ("negative_prompt", "num_frames", "height", "width", "fps"):
        assert again[key] == index[key], key
    for load, flags, expected in (
        (tmp_path / "run", (), ["a dog", DEFAULT_NEGATIVE_PROMPT]),
        (tmp_path / "run", ("--text-cleaning", "light", "--negative-prompt", worst), ["A DOG", "Blurred, GREY"]),
        (folder, (), ["A DOG", "Blurred, GREY"]),
        (back, (), ["A DOG", "Blurred, GREY"]),
        (folder, ("--text-cleaning", "full"), ["a dog", "blurred, grey"]),
        (folder, ("--negative-prompt", ""), ["A DOG", ""]),
    ):
        seen.clear()
        sampled(load, parts, tmp_path, *words, *flags)
        assert seen == expected, flags
    pipeline = FlashI2VPipeline.from_pretrained(folder)
    taken, default, ours = (
        pipeline.encode_prompt("a", negative)[1] for negative in ("Blurred, GREY", None, DEFAULT_NEGATIVE_PROMPT)
    )
    assert torch.equal(taken, default) and not torch.equal(taken, ours)
    with ImageToVideoPipeline.from_checkpoint(folder, device="cpu") as opened:
        assert opened.negative_prompt == "Blurred, GREY"
    config = SampleConfig.from_flags(
        load=folder, image=parts / "image.png", prompt="a", output=tmp_path / "b.mp4", negative_prompt="@none.txt"
    )
    with pytest.raises(UserError, match="--negative-prompt @none.txt: cannot be read .* after @ give a file of text"):
        run.sample(config)
    command = ["convert", "--from", "megatron", str(tmp_path / "run"), "--to", "wan", str(tmp_path / "x")]
    assert main([*command, "--negative-prompt", "grey"]) == 2


def test_a_negative_prompt_that_cleaning_empties_is_not_released(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", CONFIG)
    command = ["convert", "--from", "megatron", str(tmp_path / "run"), "--to", "diffusers", str(tmp_path / "release")]
    assert main([*command, "--negative-prompt", "模糊"]) == 2
    assert "the negative prompt '模糊' is empty after text cleaning full" in capsys.readouterr().err
    assert not (tmp_path / "release").exists()
    assert main([*command, "--negative-prompt", "模糊", "--text-cleaning", "light"]) == 0
    # Nor one that the release carries, if it is to be cleaned otherwise.
    command[2:4] = "diffusers", str(tmp_path / "release")
    assert main([*command[:-1], str(tmp_path / "other"), "--text-cleaning", "full"]) == 2
    assert "the negative prompt '模糊' is empty after text cleaning full" in capsys.readouterr().err


def test_an_unknown_interpolation_is_told_before_weights_are_loaded(released: Path) -> None:
    folder = released.parent / "nearest"
    folder.mkdir()
    for path in released.iterdir():
        if path.name != "model_index.json":
            (folder / path.name).symlink_to(path)
    index = json.loads((released / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "interpolation": "nearest"}))
    config = SampleConfig.from_flags(load=folder, image=folder / "a.png", prompt="a", output=folder / "b.mp4")
    with pytest.raises(UserError, match="interpolation is recorded as 'nearest'; give --interpolation, one of"):
        session.Source.find(config)
    assert session.Source.find(dataclasses.replace(config, interpolation="bilinear")).interpolation == "bilinear"
