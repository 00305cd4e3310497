"""Every paradigm from ``--conditioning NAME`` to a sample: trained, resumed, exported, imported, sampled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import av
import pytest
import torch
from helpers.layouts import metrics, weights
from helpers.paradigms import PARADIGMS
from helpers.tiny_models import (
    make_tiny_image_encoder,
    make_tiny_text_encoder,
    make_tiny_tokenizer,
    make_tiny_vae,
    make_video,
)

from megatron_flashi2v.checkpoint.folders import find_checkpoint, load_model_config
from megatron_flashi2v.cli.main import main

Train = Callable[..., int]
# Of the training fixtures' model: 4 latent channels; the data's temporal stride is 4.
INPUT_CHANNELS = {"flashi2v": 4, "repeat_concat": 8, "zero_pad_concat": 8, "inpainting": 12, "wan_i2v": 12,
                  "text_to_video": 4}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE with strides 4 and 4, a text encoder of the data's width, and a video whose first frame is the image."""
    folder = tmp_path_factory.mktemp("encoders")
    make_tiny_vae(folder / "vae", temporal=(True, True))
    make_tiny_text_encoder(folder / "text_encoder", text_dim=8)
    make_tiny_tokenizer(folder / "tokenizer")
    make_tiny_image_encoder(folder / "image_encoder")
    make_video(folder / "image.mp4", frames=1, height=16, width=16)
    return folder


def sample(checkpoint: Path, encoders: Path, output: Path, *flags: object) -> int:
    return main([
        "sample", "--load", str(checkpoint), "--prompt", "a dog runs", "--output", str(output), "--device", "cpu",
        "--num-steps", "2", "--num-frames", "5", "--height", "16", "--width", "16",
        *(part for name in ("vae", "text_encoder", "tokenizer", "image_encoder")
          for part in (f"--{name.replace('_', '-')}", str(encoders / name))),
        *map(str, flags),
    ])


@pytest.mark.parametrize("name", PARADIGMS)
def test_trains_resumes_exports_and_samples(train: Train, encoders: Path, tmp_path: Path, name: str) -> None:
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    flags = ("--conditioning", name, "--train-iters", 20)
    assert train(*flags, "--save", straight) == 0
    assert train(*flags, "--save", halves, "--exit-interval", 10) == 0
    assert train(*flags, "--save", halves, "--load", halves) == 0
    losses = [row["loss"] for row in metrics(straight)]
    assert [row["loss"] for row in metrics(halves)] == losses and len(losses) == 20
    trained = weights(straight)
    assert all(torch.equal(tensor, trained[key]) for key, tensor in weights(halves).items())
    # What the paradigm added started at zero and has learnt.
    embedding = trained["model.patch_embedding.weight"].view(32, INPUT_CHANNELS[name], 4)
    assert embedding.any(dim=0).all()

    export, back = tmp_path / "export", tmp_path / "back"
    assert main(["convert", "--from", "megatron", str(straight), "--to", "diffusers", str(export)]) == 0
    assert main(["convert", "--from", "diffusers", str(export), "--to", "megatron", str(back)]) == 0
    assert json.loads((export / "transformer" / "config.json").read_text())["in_channels"] == INPUT_CHANNELS[name]
    card = (export / "README.md").read_text()
    assert all(words in card for words in ("| steps | 20 |", "| samples seen | 80 |", "processes 1, tensor 1", name))
    returned = weights(back)
    assert returned.keys() == trained.keys()
    assert all(torch.equal(tensor, trained[key]) for key, tensor in returned.items())
    assert load_model_config(find_checkpoint(back)) == load_model_config(find_checkpoint(straight))

    image = () if name == "text_to_video" else ("--image", encoders / "image.mp4")
    assert sample(back, encoders, tmp_path / "a.mp4", *image) == 0
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert len(list(container.decode(video=0))) == 5
    if image:
        assert sample(back, encoders, tmp_path / "b.mp4") == 2  # it needs the image


def test_first_losses_are_those_of_text_to_video(train: Train, tmp_path: Path) -> None:
    """The same draws and the same start; later losses tell the paradigms apart."""
    losses = {}
    for name in PARADIGMS:
        assert train("--conditioning", name, "--save", tmp_path / name) == 0
        losses[name] = [row["loss"] for row in metrics(tmp_path / name)]
    for name, values in losses.items():
        assert values[0] == pytest.approx(losses["text_to_video"][0], rel=1e-6), name
    assert len({tuple(values) for values in losses.values()}) == len(PARADIGMS)


@pytest.fixture
def text_to_video(train: Train, tmp_path: Path) -> Path:
    """A trained text-to-video checkpoint, whose head is no longer zero."""
    assert train("--conditioning", "text_to_video", "--save", tmp_path / "t2v") == 0
    return tmp_path / "t2v"


def test_every_paradigm_starts_from_text_to_video_weights(train: Train, text_to_video: Path, tmp_path: Path) -> None:
    losses = {}
    for name in PARADIGMS:
        save = tmp_path / name
        assert train("--conditioning", name, "--load-weights", f"megatron:{text_to_video}", "--train-iters", 3,
                     "--seed", 9, "--save", save) == 0
        losses[name] = [row["loss"] for row in metrics(save)]
    for name, values in losses.items():
        assert values[0] == pytest.approx(losses["text_to_video"][0], rel=1e-6), name
    # From the second step on the image counts: with a head that is not zero, gradients reach all that was added.
    assert len({values[1] for values in losses.values()}) == len(PARADIGMS)
    assert train("--conditioning", "text_to_video", "--train-iters", 1, "--seed", 9, "--save", tmp_path / "new") == 0
    assert abs(metrics(tmp_path / "new")[0]["loss"] - losses["text_to_video"][0]) > 1e-3


def test_a_resumed_run_does_not_start_from_the_given_weights_again(
    train: Train, text_to_video: Path, tmp_path: Path
) -> None:
    flags = ("--conditioning", "inpainting", "--load-weights", f"megatron:{text_to_video}")
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    assert train(*flags, "--save", straight) == 0
    assert train(*flags, "--save", halves, "--exit-interval", 2) == 0
    assert train(*flags, "--save", halves, "--load", halves) == 0
    assert [row["loss"] for row in metrics(halves)] == [row["loss"] for row in metrics(straight)]


def test_weights_of_another_model_are_refused(
    train: Train, text_to_video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ("--load-weights", f"megatron:{text_to_video}")
    assert train(*start, "--hidden-size", 64, "--ffn-hidden-size", 96) != 0
    error = capsys.readouterr().err
    for words in ("hidden_size is 32 in the checkpoint, 64", "ffn_hidden_size is 48 in the checkpoint, 96"):
        assert words in error
    assert train("--load-weights", f"megatron:{tmp_path / 'none'}") != 0
    assert "none holds no checkpoint" in capsys.readouterr().err
    assert train("--conditioning", "inpainting", "--train-iters", 1, "--save", tmp_path / "run") == 0
    capsys.readouterr()
    assert train("--conditioning", "flashi2v", "--load-weights", f"megatron:{tmp_path / 'run'}") != 0
    assert "conditioning is inpainting in the checkpoint, text_to_video was asked for" in capsys.readouterr().err
    # Its own paradigm serves as a start as well.
    own = ("--conditioning", "inpainting", "--load-weights", f"megatron:{tmp_path / 'run'}")
    assert train(*own, "--train-iters", 1) == 0


@pytest.mark.parametrize("stored, wanted", [
    ("text_to_video", "inpainting"), ("repeat_concat", "zero_pad_concat"), ("inpainting", "flashi2v"),
])
def test_another_paradigms_checkpoint_is_refused_with_what_differs(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], stored: str, wanted: str
) -> None:
    save = tmp_path / "run"
    assert train("--conditioning", stored, "--train-iters", 1, "--save", save) == 0
    capsys.readouterr()
    assert train("--conditioning", wanted, "--train-iters", 2, "--load", save, "--save", tmp_path / "other") != 0
    error = capsys.readouterr().err
    assert f"conditioning is {stored} in the checkpoint, {wanted} was asked for" in error
    assert not list((tmp_path / "other").glob("iter_*"))


def test_other_widths_are_refused_by_name(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save, t2v = tmp_path / "run", ("--conditioning", "text_to_video")
    assert train(*t2v, "--train-iters", 1, "--save", save) == 0
    capsys.readouterr()
    assert train(*t2v, "--load", save, "--hidden-size", 64, "--ffn-hidden-size", 96) != 0
    error = capsys.readouterr().err
    for words in ("hidden_size is 32 in the checkpoint, 64", "ffn_hidden_size is 48 in the checkpoint, 96"):
        assert words in error
