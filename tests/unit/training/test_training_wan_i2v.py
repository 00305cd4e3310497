"""Wan's image-to-video paradigm from videos to a run: prepared, encoded while training, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from helpers.layouts import metrics
from helpers.tiny_corpus import make_corpus
from helpers.tiny_models import make_tiny_image_encoder
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from megatron_flashi2v.cli.main import main
from megatron_flashi2v.conditioning.wan_i2v import GREY_CLIP, IMAGE_ROWS
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.data.prepared import PreparedDataset
from megatron_flashi2v.data.transforms import resize_and_crop
from megatron_flashi2v.data.video import Video
from megatron_flashi2v.training.datasets import fit_model_to_data, require_fitting

Train = Callable[..., int]
MODEL = (
    "--model", "tiny", "--num-layers", 1, "--hidden-size", 16, "--ffn-hidden-size", 16, "--num-attention-heads", 2,
    "--latent-channels", 4, "--text-dim", 16, "--train-iters", 2, "--global-batch-size", 4, "--micro-batch-size", 2,
    "--conditioning", "wan_i2v",
)
ROWS = ("--image-embed-dim", 12)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    flags = make_corpus(folder, 4, z_dim=4, text_dim=16)
    (folder / "flags.json").write_text(json.dumps(flags))
    make_tiny_image_encoder(folder / "image_encoder")
    return folder


def flags_of(corpus: Path) -> list[str]:
    return json.loads((corpus / "flags.json").read_text())


@pytest.fixture(scope="module")
def prepared(corpus: Path) -> Iterator[dict[str, Path]]:
    """The same clips as an older version prepared them, with the grey clip, and with CLIP's rows too."""
    found = {}
    for name, more in (("plain", ()), ("grey", ("--grey-clip",)),
                       ("rows", ("--image-encoder", str(corpus / "image_encoder")))):  # fmt: skip
        found[name] = corpus / name
        assert main(["prepare", *flags_of(corpus), "--output", str(found[name]), "--seed", "3", *more]) == 0
    return found


def test_what_is_stored_is_what_the_encoders_make(corpus: Path, prepared: dict[str, Path]) -> None:
    data = {name: PreparedDataset(folder) for name, folder in prepared.items()}
    versions = {name: json.loads((folder / "dataset.json").read_text())["version"] for name, folder in prepared.items()}
    assert versions == {"plain": 1, "grey": 2, "rows": 2}
    assert not {"grey_clip", "image_encoder"} & data["plain"].settings.keys()
    assert "inputs" not in json.loads((prepared["plain"] / "dataset.json").read_text())["info"]
    vae = AutoencoderKLWan.from_pretrained(corpus / "vae")
    mean, std = (torch.tensor(vae.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    clip = CLIPVisionModel.from_pretrained(corpus / "image_encoder")
    processor = CLIPImageProcessorPil.from_pretrained(corpus / "image_encoder")
    for index in range(len(data["plain"])):
        plain, grey, rows = (data[name][index] for name in ("plain", "grey", "rows"))
        assert torch.equal(plain.latents_CTHW, rows.latents_CTHW) and not plain.inputs
        assert grey.inputs.keys() == {"grey_clip"} and rows.inputs.keys() == {"grey_clip", "image_rows"}
        assert torch.equal(grey.inputs["grey_clip"], rows.inputs["grey_clip"])
        # The image, by our decoder; what is made of it, by the libraries alone.
        record = data["rows"].record(index)
        with Video(corpus / Path(record["source"]).name) as video:
            image_CHW = resize_and_crop(video.read(record["frames"][:1]), 16, 24)[0]
        with torch.no_grad():
            pixels = processor(images=Image.fromarray(image_CHW.permute(1, 2, 0).numpy()), return_tensors="pt")
            states = clip(pixels["pixel_values"], output_hidden_states=True).hidden_states
            levels_BCTHW = torch.cat([image_CHW[None, :, None] / 255 * 2 - 1, torch.zeros(1, 3, 4, 16, 24)], dim=2)
            expected = (vae.encode(levels_BCTHW).latent_dist.mode()[0] - mean) / std
        torch.testing.assert_close(rows.inputs["grey_clip"], expected, atol=1e-4, rtol=1e-4)
        assert (expected - plain.latents_CTHW).abs().max() > 0.01  # the video goes on, grey does not
        assert rows.inputs["image_rows"].dtype == torch.bfloat16
        assert torch.equal(rows.inputs["image_rows"], states[-2][0].bfloat16())
        assert not torch.equal(states[-2], states[-1])


def test_prepared_and_online_runs_are_the_same(
    run_command: Train, corpus: Path, prepared: dict[str, Path], tmp_path: Path
) -> None:
    losses = {}
    online = [*flags_of(corpus), "--online-encoding", "--seed", 3]
    for name, flags in {
        "prepared": ("--data-path", prepared["rows"], "--seed", 3, "--device", "cpu", "--text-length", 32, *ROWS),
        "online": (*online, *ROWS, "--image-encoder", corpus / "image_encoder", "--encoding-cache", tmp_path / "c"),
        "cached": (*online, *ROWS, "--image-encoder", corpus / "image_encoder", "--encoding-cache", tmp_path / "c"),
        "without": ("--data-path", prepared["grey"], "--seed", 3, "--device", "cpu", "--text-length", 32,
                    "--image-embed-dim", 0),
        "without-online": (*online, "--image-embed-dim", 0),
    }.items():  # fmt: skip
        assert run_command(*MODEL, *flags, "--save", tmp_path / name) == 0
        losses[name] = [row["loss"] for row in metrics(tmp_path / name)]
    assert losses["prepared"] == losses["online"] == losses["cached"] and len(losses["prepared"]) == 2
    assert losses["without"] == losses["without-online"]
    model = json.loads((tmp_path / "prepared" / "iter_0000002" / "model_config.json").read_text())
    assert (model["image_dim"], model["image_rows"], model["mask_channels"]) == (12, 17, 2)
    # Data with more than a paradigm takes train it as older data do.
    for name in ("plain", "rows"):
        flags = ("--conditioning", "inpainting", "--data-path", prepared[name], "--seed", 3, "--device", "cpu",
                 "--text-length", 32)  # fmt: skip
        assert run_command(*MODEL, *flags, "--save", tmp_path / f"light-{name}") == 0
    assert [row["loss"] for row in metrics(tmp_path / "light-plain")] == [
        row["loss"] for row in metrics(tmp_path / "light-rows")
    ]


def test_mock_data_have_what_the_paradigm_takes(run_command: Train, tmp_path: Path) -> None:
    flags = ("--mock-data", "--num-frames", 5, "--height", 16, "--width", 16, "--device", "cpu")
    assert run_command(*MODEL, *flags, "--save", tmp_path / "run") == 0
    assert len(metrics(tmp_path / "run")) == 2


def test_data_without_are_refused_in_a_line(
    run_command: Train, corpus: Path, prepared: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, words in (
        ((prepared["plain"],), "plain holds no grey_clip, which --conditioning wan_i2v takes; prepare it again with"),
        ((prepared["grey"],), "grey holds no image_rows, which --conditioning wan_i2v takes"),
        ((0.5, prepared["rows"], 0.5, prepared["plain"]), "plain holds no grey_clip"),
        ((prepared["rows"], "--image-embed-dim", 40), "are (17, 12), the model takes (17, 40); set --image-embed-dim"),
    ):
        assert run_command(*MODEL, *ROWS, "--device", "cpu", "--text-length", 32, "--data-path", *flags) == 2
        assert words in capsys.readouterr().err
    assert run_command(*MODEL, *ROWS, *flags_of(corpus), "--online-encoding") == 2
    assert "--image-encoder must be given" in capsys.readouterr().err
    command = ["prepare", *flags_of(corpus), "--output", str(corpus / "x"), "--seed", "3", "--image-encoder"]
    assert main([*command, str(corpus / "vae")]) == 2
    assert "must be clip_vision_model" in (told := capsys.readouterr().err) or "preprocessor_config.json" in told
    assert not (corpus / "x").exists() or not list((corpus / "x").glob("dataset.json"))


def test_rows_of_two_image_encoders_are_not_mixed() -> None:
    model = ModelConfig(
        num_layers=1, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, latent_channels=4, text_dim=5,
        text_length=7, conditioning="wan_i2v", mask_channels=4, image_dim=6, image_rows=3,
    )

    def blend(name: str, rows: int, *layers: int) -> Any:
        shape = (4, 3, 4, 6)
        sets = [
            SimpleNamespace(name=f"{name}{number}", info=SimpleNamespace(
                latent_shape=shape, text_dim=5, text_cleaning="full", temporal_stride=4, text_length=7,
                inputs={GREY_CLIP: shape, IMAGE_ROWS: (rows, 6)}, image_encoder={"num_layers": count},
            )) for number, count in enumerate(layers)
        ]
        return SimpleNamespace(datasets=sets, info=sets[0].info, name=name, text_length=7, latent_shapes=[shape])

    training = blend("training", 3, 2, 2)
    assert fit_model_to_data(model, training).image_rows == 3
    with pytest.raises(ConfigError, match="mixed1 has rows of the image encoder .*'num_layers': 9.* mixed of .*: 2"):
        fit_model_to_data(model, blend("mixed", 3, 2, 9))
    for rows, layers, message in ((5, 2, "valid holds 5 rows .*training 3"), (3, 9, "valid has rows of the image")):
        valid = blend("valid", rows, layers)
        with pytest.raises(ConfigError, match=message):
            require_fitting(fit_model_to_data(model, valid), model, training, valid)
