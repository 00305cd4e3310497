"""``flashi2v sample`` from files to files, with tiny models; and its errors."""

import re
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from helpers.checkpoints import save_checkpoint
from helpers.tiny_models import make_tiny_text_encoder, make_tiny_tokenizer, make_tiny_vae, make_video
from PIL import Image

from megatron_flashi2v.checkpoint.adapter_record import AdapterRecord
from megatron_flashi2v.checkpoint.adapter_table import adapter_shapes
from megatron_flashi2v.checkpoint.folders import find_checkpoint
from megatron_flashi2v.checkpoint.model_state import model_pieces
from megatron_flashi2v.checkpoint.storage import TensorPiece
from megatron_flashi2v.cli.main import main
from megatron_flashi2v.config.adapter import ATTENTION, AdapterConfig
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.sample import SampleConfig
from megatron_flashi2v.conversion.base_fingerprint import base_fingerprint
from megatron_flashi2v.conversion.formats.megatron import open_weights
from megatron_flashi2v.conversion.weights import ReadOptions
from megatron_flashi2v.models.build import build_model
from megatron_flashi2v.parallel.placement import ShardGrid
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.sampling.session import VideoShape, video_shape

CONFIG = ModelConfig(
    num_layers=1,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=2,
    latent_channels=4,
    freq_dim=16,
    text_dim=16,
    text_length=8,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A checkpoint that recorded its data's size, a VAE (strides 2 and 4), a text encoder and an image."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny_vae(folder / "vae")
    make_tiny_text_encoder(folder / "text_encoder")
    make_tiny_tokenizer(folder / "tokenizer")
    device = resolve_device("cpu")
    with single_process(device) as groups:
        model = build_model(CONFIG, groups, device)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        save_checkpoint(
            folder / "checkpoints",
            2,
            pieces=model_pieces(model.named_parameters(), ShardGrid()),
            model_config=CONFIG,
            state={"iteration": 2, "data": {"frames": 5, "height": 16, "width": 24, "fps": 8.0}},
        )
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    return folder


def flags(models, output, **changes):
    values = {
        "load": models / "checkpoints",
        "vae": models / "vae",
        "text-encoder": models / "text_encoder",
        "tokenizer": models / "tokenizer",
        "image": models / "image.png",
        "prompt": "a dog runs",
        "output": output,
        "num-steps": 2,
        "device": "cpu",
        **changes,
    }
    return [
        "sample",
        *(word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))),
    ]


def test_size_is_the_flags_then_the_checkpoints_then_the_released_models():
    required = {name: Path("x") for name in ("load", "vae", "text_encoder", "tokenizer")}
    config = SampleConfig(**required, prompt="", output=Path("a.mp4"), width=640)
    recorded = {"data": {"frames": 5, "height": 16, "width": 24, "fps": 8.0}}
    assert video_shape(config, recorded) == VideoShape(num_frames=5, height=16, width=640, fps=8.0)
    assert video_shape(config, {}) == VideoShape(num_frames=49, height=480, width=640, fps=16.0)


def test_image_and_prompt_become_mp4_and_strip_of_the_trained_size(models, tmp_path):
    assert main(flags(models, tmp_path / "out" / "a.mp4")) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.mp4", "a.png"]
    with av.open(str(tmp_path / "out" / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 8
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.stack(frames).shape == (5, 16, 24, 3)
    assert Image.open(tmp_path / "out" / "a.png").format == "PNG"


def test_names_and_prompts_that_are_not_utf8_stop_nothing(models, tmp_path):
    """As the shell hands them over: ``os.fsdecode`` of bytes in another encoding."""
    output = tmp_path / "caf\udce9.mp4"
    assert main(flags(models, output, prompt="a dog \udce9", **{"negative-prompt": "\udcff blurry"})) == 0
    assert output.stat().st_size and output.with_suffix(".png").stat().st_size


def test_prompts_that_cleaning_empties_are_refused_before_work(models, tmp_path, capsys):
    for name in ("prompt", "negative-prompt"):
        arguments = flags(models, tmp_path / "a.mp4", **{name: "一只猫", "vae": tmp_path / "absent"})
        assert main(arguments) == 2
        assert f"the {name.replace('-', ' ')} '一只猫' is empty after text cleaning full" in capsys.readouterr().err


def test_prompts_that_lose_most_of_their_letters_are_told(models, tmp_path, capsys):
    arguments = flags(models, tmp_path / "a.mp4", prompt="一只猫在跑 cat", vae=tmp_path / "absent")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "more than half of the letters of the prompt: '一只猫在跑 cat' becomes 'cat'" in error
    assert main(flags(models, tmp_path / "a.mp4", prompt="a cat 猫", vae=tmp_path / "absent")) == 2
    assert "half of the letters" not in capsys.readouterr().err


def test_flags_win_over_the_recorded_size_and_a_video_gives_the_image(models, tmp_path):
    video = make_video(tmp_path / "source.mp4", frames=2, height=32, width=32)
    arguments = flags(
        models,
        tmp_path / "a.mp4",
        image=video,
        fps=12,
        strip=tmp_path / "frames.png",
        **{"num-frames": 3, "height": 24, "width": 32, "negative-prompt": "", "seed": 4},
    )
    assert main([*arguments, "--bf16", "--batched-guidance"]) == 0
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 12
        assert np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).shape == (
            3,
            24,
            32,
            3,
        )
    assert (tmp_path / "frames.png").is_file() and not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "absent.png"}, "image absent.png: no such file"),
        ({"image": None}, "image is not given"),
        ({"load": "absent"}, "absent does not exist"),
        ({"vae": "absent"}, "absent does not exist"),
        ({"num-frames": 4}, "num_frames is 4"),
        ({"height": 20}, "height is 20"),
        ({"num-steps": 0}, "--num-steps is 0; it must be at least 1"),
        ({"fps": -1}, "--fps is -1.0; it must be above 0"),
        ({"output": "a.gif"}, "--output is a.gif; it must be a file that ends in .mp4"),
        ({"strip": "a.jpg"}, "--strip is a.jpg; it must be a file that ends in .png"),
        ({"attention-backend": "none"}, "none"),
        ({"tensor-model-parallel-size": 0}, "--tensor-model-parallel-size is 0; it must be at least 1"),
        ({"context-parallel-size": -1}, "--context-parallel-size is -1; it must be at least 1"),
    ],
)
def test_one_line_names_what_is_wrong(changes, message, models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(flags(models, **{"output": tmp_path / "a.mp4", **changes})) != 0
    error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(error) == 1 and message in error[0]
    assert list(tmp_path.iterdir()) == []


def test_file_that_is_no_image_is_named(models, tmp_path, capsys):
    (tmp_path / "note.txt").write_text("not an image")
    assert main(flags(models, tmp_path / "a.mp4", image=tmp_path / "note.txt")) == 1
    assert "note.txt: neither a picture nor a video" in capsys.readouterr().err


def test_a_release_brings_its_own_frozen_models(models, tmp_path, capsys):
    parts = [word for name in ("vae", "text_encoder", "tokenizer")
             for word in (f"--{name.replace('_', '-')}", str(models / name))]  # fmt: skip
    for name, options in (("whole", []), ("naming", ["--components", "reference"])):
        source, target = str(models / "checkpoints"), str(tmp_path / name)
        assert main(["convert", "--from", "megatron", source, "--to", "diffusers", target, *parts, *options]) == 0
    main(["convert", "--from", "megatron", source, "--to", "diffusers", str(tmp_path / "bare")])
    absent = {"vae": None, "text-encoder": None, "tokenizer": None}
    given = flags(models, tmp_path / "given.mp4", latents=tmp_path / "given.safetensors")
    assert main(given) == 0
    for name in ("whole", "naming"):
        latents = tmp_path / f"{name}.safetensors"
        assert main(flags(models, tmp_path / f"{name}.mp4", load=tmp_path / name, latents=latents, **absent)) == 0
        assert latents.read_bytes() == (tmp_path / "given.safetensors").read_bytes()
    # What a flag names is taken in place of the release's.
    changed = flags(models, tmp_path / "a.mp4", load=tmp_path / "whole", **{**absent, "vae": tmp_path / "no_vae"})
    assert main(changed) == 2 and "no_vae does not exist" in capsys.readouterr().err
    for load, why in ((tmp_path / "bare", "is a release without these parts"),
                      (models / "checkpoints", "is no release, which holds them")):  # fmt: skip
        assert main(flags(models, tmp_path / "a.mp4", load=load, **{**absent, "vae": models / "vae"})) == 2
        error = capsys.readouterr().err
        assert f"error: --text-encoder, --tokenizer must be given: --load {load} {why}" in error
    assert not (tmp_path / "a.mp4").exists()


def test_output_that_could_not_be_written_is_refused_before_the_work(models, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    for output, message in (
        (tmp_path / "file" / "a.mp4", "is no folder"),
        (tmp_path / "folder.mp4", "is a folder"),
    ):
        assert main(flags(models, output, load="absent")) == 2
        assert message in capsys.readouterr().err


def test_vae_of_another_width_is_refused(models, tmp_path, capsys):
    make_tiny_vae(tmp_path / "vae", z_dim=6)
    assert main(flags(models, tmp_path / "a.mp4", vae=tmp_path / "vae")) == 2
    assert "6 channels, the model's latent_channels is 4" in capsys.readouterr().err


@pytest.mark.parametrize("changes, said", [
    ({"output": "cat.mp4"}, "name the strip with --strip"),  # the strip beside it would be the image
    ({"output": "other.mp4", "strip": "cat.png"}, "--strip {folder}/cat.png is the file of --image too"),
    ({"output": "photo.mp4"}, "would replace {folder}/photo.png, which flashi2v did not write"),
])  # fmt: skip
def test_no_output_replaces_what_the_command_does_not_own(models, tmp_path, capsys, changes, said):
    for name in ("cat.png", "photo.png"):
        Image.open(models / "image.png").save(tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    paths = {name: tmp_path / value for name, value in changes.items()}
    assert main(flags(models, paths.pop("output"), image=tmp_path / "cat.png", **paths)) == 2
    assert said.format(folder=tmp_path) in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_sample_wrote_it_writes_anew(models, tmp_path):
    for _ in range(2):
        assert main(flags(models, tmp_path / "cat.mp4", **{"num-steps": 1})) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.mp4", "cat.png"]


def test_an_adapter_is_sampled_beside_a_base_that_moved(models, tmp_path, capsys):
    shutil.copytree(models / "checkpoints", tmp_path / "moved")
    base = find_checkpoint(models / "checkpoints")
    adapter = AdapterConfig(rank=2, alpha=8.0, targets=ATTENTION)
    record = AdapterRecord(
        adapter=adapter, trained=(), base=f"megatron:{tmp_path / 'gone'}", base_weights="model",
        base_fingerprint=base_fingerprint(open_weights(base, ReadOptions())),
    )
    generator = torch.Generator().manual_seed(1)
    pieces = [
        TensorPiece.whole(f"model.{name}", torch.randn(shape, generator=generator))
        for name, shape in adapter_shapes(CONFIG, adapter).items()
    ]
    state = {"iteration": 3, "data": {"frames": 5, "height": 16, "width": 24, "fps": 8.0}}
    save_checkpoint(tmp_path / "adapter", 3, pieces=pieces, model_config=CONFIG, state=state, adapter=record)

    def sample(name, **changes):
        latents = tmp_path / f"{name}.safetensors"
        return main(flags(models, tmp_path / f"{name}.mp4", latents=latents, **changes)), latents

    adapted = {"load": tmp_path / "adapter"}
    assert sample("gone", **adapted)[0] == 1
    assert "does not exist; give these weights as --base FORMAT:PATH" in capsys.readouterr().err
    adapted["base"] = f"megatron:{tmp_path / 'moved'}"
    whole, full, half, none = (
        sample(name, **changes) for name, changes in (
            ("whole", {}), ("full", adapted), ("half", {**adapted, "adapter-scale": 0.5}),
            ("none", {**adapted, "adapter-scale": 0}),
        )
    )
    assert [code for code, _ in (whole, full, half, none)] == [0] * 4
    contents = [latents.read_bytes() for _, latents in (whole, full, half, none)]
    assert contents[0] == contents[3] and len(set(contents)) == 3
    for changes, words in (
        ({"base": adapted["base"]}, "--base megatron:.* is for adapters, and .* holds a whole model"),
        ({"adapter-scale": 2}, "--adapter-scale 2.0 is for adapters"),
        ({**adapted, "base": "moved"}, "--base is 'moved'; give FORMAT:PATH"),
        ({**adapted, "adapter-scale": "nan"}, "--adapter-scale is nan"),
    ):
        capsys.readouterr()
        assert sample("refused", **changes)[0] == 2
        assert re.search(words, capsys.readouterr().err)
