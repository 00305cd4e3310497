"""The exported folder as a diffusers pipeline: it loads, and gives what ``flashi2v sample`` gives."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from helpers.paradigms import PARADIGMS
from helpers.releases import CONFIG, PARTS, image_encoder, release, sampled, train
from helpers.tiny_models import make_tiny_text_encoder
from PIL import Image

from megatron_flashi2v import FlashI2VPipeline
from megatron_flashi2v.cli.main import main
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.encoders.video_vae import VideoVAE
from megatron_flashi2v.release.image_conditioning import FlashI2VImageConditioning


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_the_pipeline_gives_what_sample_gives(paradigm: str, parts: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, conditioning=paradigm)
    rows, flags = {}, ()
    if paradigm == "wan_i2v":  # diffusers takes the last 512 rows for the text's
        config = dataclasses.replace(config, text_length=512)
        rows, flags = image_encoder(parts), ("--image-encoder", str(parts / "image_encoder"))
    train(tmp_path / "run", config)
    folder = release(tmp_path, parts, "--verify", "--report", str(tmp_path / "report.json"))
    transformer, info = WanTransformer3DModel.from_pretrained(folder / "transformer", output_loading_info=True)
    assert not any(info.values()) and transformer.config.num_attention_heads == 3
    pipeline = FlashI2VPipeline.from_pretrained(folder, **rows)
    uses_image = paradigm != "text_to_video"
    image = Image.open(parts / "image.png") if uses_image else None
    settings = {"prompt": "a dog runs", "num_inference_steps": 3, "guidance_scale": 3.0}
    generator = torch.Generator().manual_seed(7)
    latents = pipeline(image=image, **settings, generator=generator, output_type="latent").frames
    frames = pipeline(image=image, **settings, generator=generator).frames
    given = ("--image", str(parts / "image.png")) if uses_image else ()
    expected = sampled(tmp_path / "run", parts, tmp_path, *given, *flags)
    assert expected.std() > 0.3
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)
    decoded_BCTHW = VideoVAE.load(parts / "vae", "cpu").decode(expected)
    assert frames.shape == (1, 5, 16, 24, 3)
    torch.testing.assert_close(
        torch.from_numpy(frames), decoded_BCTHW.permute(0, 2, 3, 4, 1) / 2 + 0.5, atol=1e-4, rtol=0
    )
    forward = json.loads((tmp_path / "report.json").read_text())["forward"]
    assert forward.startswith("forward pass (2 of 2 blocks, fp32; the source in our model, the target in diffusers'")


def test_usual_options(released: Path, parts: Path) -> None:
    pipeline = FlashI2VPipeline.from_pretrained(released)
    assert isinstance(pipeline, DiffusionPipeline)
    image = Image.open(parts / "image.png")
    settings = {"image": image, "prompt": "a dog runs", "num_inference_steps": 2, "guidance_scale": 1.0}

    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    one = pipeline(**settings, generator=generator(3), output_type="pt").frames
    assert one.shape == (1, 5, 3, 16, 24) and 0 <= one.min() < one.max() <= 1
    pictures = pipeline(**settings, generator=generator(3), output_type="pil", return_dict=False)[0]
    assert len(pictures) == 1 and len(pictures[0]) == 5 and pictures[0][0].size == (24, 16)
    # A video's noise is its own: two at once are those that each seed or place gives alone.
    two = pipeline(**settings, num_videos_per_prompt=2, generator=[generator(3), generator(4)], output_type="pt").frames
    assert torch.allclose(two[:1], one, atol=1e-5) and (two[1] - two[0]).abs().max() > 0.05
    other = pipeline(**settings, generator=generator(4), output_type="pt").frames
    assert torch.allclose(two[1:], other, atol=1e-5)
    assert not torch.equal(pipeline(**settings, output_type="pt").frames, pipeline(**settings, output_type="pt").frames)
    size = {"height": 24, "width": 32, "num_frames": 3}
    assert pipeline(**settings, **size, generator=generator(3)).frames.shape == (1, 3, 24, 32, 3)
    sharper = pipeline(**settings, generator=generator(3), cutoff_ratio=0.9, output_type="pt").frames
    assert (sharper - one).abs().max() > 1e-3
    with pytest.raises(ValueError, match="1 generators for 2 videos"):
        pipeline(**settings, num_videos_per_prompt=2, generator=[generator(1)])


def test_callback_sees_and_replaces_latents(released: Path, parts: Path) -> None:
    pipeline = FlashI2VPipeline.from_pretrained(released)
    seen = []

    def callback(pipe: object, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        assert pipe is pipeline
        seen.append((step, float(timestep)))
        pipeline._interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = pipeline(
        image=Image.open(parts / "image.png"), prompt="a dog", num_inference_steps=4, output_type="latent",
        callback_on_step_end=callback,
    ).frames  # fmt: skip
    assert [step for step, _ in seen] == [0, 1] and seen[0][1] == 1000 > seen[1][1]
    assert not latents.any()
    with pytest.raises(ConfigError, match="has \\['image_latents'\\]; known are"):
        pipeline(prompt="", callback_on_step_end_tensor_inputs=["image_latents"])


def test_another_scheduler_takes_its_place(released: Path, parts: Path) -> None:
    image = Image.open(parts / "image.png")
    settings = {"image": image, "prompt": "a dog", "num_inference_steps": 3, "output_type": "latent"}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipelines = [FlashI2VPipeline.from_pretrained(released, **given) for given in ({}, {"scheduler": scheduler})]
    first, second = (
        pipeline(**settings, generator=torch.Generator().manual_seed(1)).frames for pipeline in pipelines
    )
    assert (first - second).abs().max() > 1e-2


def test_saved_again_it_loads_again(released: Path, parts: Path, tmp_path: Path) -> None:
    settings = {"image": Image.open(parts / "image.png"), "prompt": "a dog", "num_inference_steps": 2}
    pipeline = FlashI2VPipeline.from_pretrained(released)
    pipeline.save_pretrained(tmp_path / "again")
    again = FlashI2VPipeline.from_pretrained(tmp_path / "again")
    expected, found = (
        pipe(**settings, generator=torch.Generator().manual_seed(1)).frames for pipe in (pipeline, again)
    )
    assert np.array_equal(expected, found)
    assert main(["convert", "--from", "diffusers", str(tmp_path / "again"), "--to", "wan", str(tmp_path / "wan")]) == 0


def test_bfloat16_keeps_phi_in_fp32(released: Path, parts: Path) -> None:
    pipeline = FlashI2VPipeline.from_pretrained(released, dtype=torch.bfloat16)
    assert pipeline.transformer.patch_embedding.weight.dtype == torch.bfloat16
    dtypes = {name: parameter.dtype for name, parameter in pipeline.image_conditioning.named_parameters()}
    assert dtypes == {
        f"{module}.{kind}": dtype
        for module, dtype in (
            ("learnable_proj.proj.0", torch.float32), ("learnable_proj.proj.2", torch.float32),
            ("fourier_embedding.0", torch.bfloat16), ("fourier_embedding.1", torch.bfloat16),
        )
        for kind in ("weight", "bias")
    }  # fmt: skip
    frames = pipeline(
        image=Image.open(parts / "image.png"), prompt="a dog", num_inference_steps=2,
        generator=torch.Generator().manual_seed(1),
    ).frames  # fmt: skip
    assert np.isfinite(frames).all()


def test_the_components_configuration_is_the_models() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    component = FlashI2VImageConditioning(**CONFIG.to_json())
    assert component.model_config == CONFIG
    held = {key for key in component.config if not key.startswith("_")}
    assert held == set(fields)


def test_release_folder_and_card(released: Path, parts: Path) -> None:
    assert {path.name for path in released.iterdir()} == {
        "transformer", "image_conditioning", "scheduler", "model_index.json", "README.md", *PARTS,
    }  # fmt: skip
    endings = {path.suffix for path in released.rglob("*") if path.is_file()}
    assert endings <= {".json", ".safetensors", ".md"}
    for name in PARTS:
        for path in (parts / name).iterdir():
            assert (released / name / path.name).read_bytes() == path.read_bytes()
    card = (released / "README.md").read_text()
    for words in (
        "| paradigm | flashi2v |", "kernel 3x3x3, order repeat_then_conv", "| steps | 30 |", "| commit | 0123abcd |",
        "12 clips of 5 frames of 16 x 24 pixels at 8.0 per second", "tensor 2, pipeline 2", "| seed | 5 |",
        "library_name: megatron_flashi2v\n", "license: apache-2.0\n", "base_model: Wan-AI/Wan2.1-T2V-1.3B-Diffusers\n",
        'pip install "megatron-flashi2v>=', "`apache-2.0`, as whoever made this release states",
        "| initial weights | `Wan`, format diffusers |",
    ):  # fmt: skip
        assert words in card, words
    index = json.loads((released / "model_index.json").read_text())
    assert (index["num_frames"], index["height"], index["width"], index["fps"]) == (5, 16, 24, 8.0)


def test_components_by_reference(parts: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", CONFIG)
    folder = release(tmp_path, parts, "--components", "reference")
    assert not any((folder / name).exists() for name in PARTS)
    settings = {"image": Image.open(parts / "image.png"), "prompt": "a dog", "num_inference_steps": 2}
    pipeline = FlashI2VPipeline.from_pretrained(folder)
    assert pipeline(**settings).frames.shape == (1, 5, 16, 24, 3)
    assert str(parts / "vae") in (folder / "README.md").read_text()
    command = ["convert", "--from", "megatron", str(tmp_path / "run"), "--to", "diffusers", str(tmp_path / "hub")]
    assert main([*command, "--vae", "owner/name:vae"]) == 0
    index = json.loads((tmp_path / "hub" / "model_index.json").read_text())
    assert index["_component_sources"] == {"vae": "owner/name:vae"}
    # What is given in the call takes the place of what is named.
    taken = {name: getattr(pipeline, name) for name in PARTS}
    assert FlashI2VPipeline.from_pretrained(tmp_path / "hub", **taken).vae is pipeline.vae


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--vae", "absent"), "--vae absent: no such folder"),
        (("--vae", "{parts}/text_encoder"), "it must be AutoencoderKLWan"),
        (("--text-encoder", "{parts}/vae"), "it must be umt5"),
        (("--tokenizer", "{parts}/vae"), "tokenizer folder"),
        (("--license", "GPL 3"), "--license is 'GPL 3'; it must be an identifier such as apache-2.0"),
        (("--base-model", "Wan"), "--base-model is 'Wan'; it must be OWNER/NAME"),
        (("--report", "{parts}/vae.json/a.json"), "--report {parts}/vae.json/a.json cannot be written"),
    ],
)
def test_a_wrong_part_is_named_before_the_work(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, str], words: str
) -> None:
    train(tmp_path / "run", CONFIG)
    (parts / "vae.json").write_text("")
    command = ["convert", "--from", "megatron", str(tmp_path / "run"), "--to", "diffusers", str(tmp_path / "out")]
    assert main([*command, flags[0], flags[1].format(parts=parts)]) == 2
    assert words.format(parts=parts) in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_belongs_to_a_release_alone(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wan = ["convert", "--from", "megatron", str(tmp_path / "run"), "--to", "wan", str(tmp_path / "out")]
    for flags in (("--vae", str(parts / "vae")), ("--license", "mit"), ("--base-model", "a/b")):
        assert main([*wan, *flags]) == 2
        assert f"{flags[0]} {flags[1]}: only `--to diffusers` makes a release" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latent_channels": 8}, "vae does not fit the model: its z_dim is 4, the model's latent_channels 8"),
        ({"text_dim": 24}, "text_encoder does not fit the model: its d_model is 16, the model's text_dim 24"),
        ({"conditioning": "inpainting", "mask_channels": 4}, "its temporal stride is 2, the model's mask_channels 4"),
        ({}, "tokenizer gives tokens up to 15, but .* knows 9"),
    ],
)
@pytest.mark.parametrize("components", ["copy", "reference"])
def test_parts_that_do_not_fit_the_model_are_named_before_the_work(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], words: str,
    components: str,
) -> None:  # fmt: skip
    train(tmp_path / "run", dataclasses.replace(CONFIG, **changes))
    places = {name: parts / name for name in PARTS}
    if not changes:
        places["text_encoder"] = make_tiny_text_encoder(tmp_path / "few_words", vocab_size=9)
    command = ["convert", "--from", "megatron", str(tmp_path / "run"), "--to", "diffusers", str(tmp_path / "out")]
    flags = [word for name, place in places.items() for word in (f"--{name.replace('_', '-')}", str(place))]
    assert main([*command, *flags, "--components", components, "--verify"]) == 2
    assert re.search(words, capsys.readouterr().err) and not list(tmp_path.glob("*out*"))


def test_a_release_needs_no_megatron_core(released: Path, parts: Path) -> None:
    code = """
import sys
sys.modules["megatron"] = None  # importing it fails
import torch
from PIL import Image
from megatron_flashi2v import FlashI2VPipeline
pipeline = FlashI2VPipeline.from_pretrained(sys.argv[1])
image = Image.open(sys.argv[2])
print(tuple(pipeline(image=image, prompt="a dog", num_inference_steps=1, output_type="latent").frames.shape))
"""
    command = [sys.executable, "-c", code, str(released), str(parts / "image.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "(1, 4, 3, 4, 6)", done.stderr
