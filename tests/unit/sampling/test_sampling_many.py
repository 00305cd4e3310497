"""Many videos in one process: prompts, noise of the user's, names, and what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.sampling_models import make_sampling_models, sample_words
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_flashi2v import SampleConfig, UserError, sample, sample_requests
from megatron_flashi2v.config.recipe import parse
from megatron_flashi2v.encoders.text import TextEncoder
from megatron_flashi2v.encoders.video_vae import VideoVAE
from megatron_flashi2v.parallel.replicas import Replica
from megatron_flashi2v.sampling.noise import sample_noise

SHAPE = (4, 3, 4, 6)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sampling_models(tmp_path_factory.mktemp("models"))


def config(models: Path, output: Path, *flags: object, **row: Any) -> SampleConfig:
    """Of one request, or of those in ``rows``."""
    rows = row.pop("rows", [{"id": "a", "image": str(models / "image0.png"), "prompt": "a dog", "seeds": [0], **row}])
    path = output.parent / f"{output.name}.jsonl"
    path.write_text("\n".join(json.dumps(one) for one in rows))
    words = sample_words(models, output, "--requests", path, "--num-steps", 1, *flags)
    return parse(SampleConfig, words[1:], prog="", description="")


def test_each_prompt_is_encoded_once(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda self, prompts: seen.extend(prompts) or encode(self, prompts))
    prompts = ["a dog", "a car", "a dog", "the street", "a car"]
    rows = [
        {"id": number, "image": str(models / "image0.png"), "prompt": prompt, "seeds": [0, 1]}
        for number, prompt in enumerate(prompts)
    ]
    found = sample_requests(config(models, tmp_path / "out", "--negative-prompt", "red", rows=rows))
    assert [path.name for path in found] == [f"{id}-{seed}.mp4" for id in range(5) for seed in (0, 1)]
    assert all(path.is_file() for path in found)
    assert sorted(seen) == ["a car", "a dog", "red", "the street"]


def test_names_strips_tiles_and_an_id_with_a_dot(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiled: list[VideoVAE] = []
    monkeypatch.setattr(VideoVAE, "enable_tiling", lambda self: tiled.append(self))
    flags = ("--name", "{seed}/{id}", "--strip", "--vae-tiling")
    sample_requests(config(models, tmp_path / "out", *flags, id="b.c", seeds=[4]))
    assert len(tiled) == 1
    files = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*"))
    assert files == ["4", "4/b.c.mp4", "4/b.c.png", "sampling.json"]
    assert Image.open(tmp_path / "out" / "4" / "b.c.png").format == "PNG"


def test_given_noise_takes_the_place_of_the_keyed_one(models: Path, tmp_path: Path) -> None:
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    save_file({"a-0": noise, "a-1": noise.unsqueeze(0).clone(), "a-2": -noise}, tmp_path / "noise.safetensors")
    flags = ("--latents", "--noise", tmp_path / "noise.safetensors")
    sample_requests(config(models, tmp_path / "out", *flags, seeds=[0, 1, 2]))
    made = [load_file(tmp_path / "out" / f"a-{seed}.safetensors")["latents_BCTHW"] for seed in range(3)]
    assert made[0].shape == (1, *SHAPE) and torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    keyed = sample_noise(3, ["a"], SHAPE)
    save_file({"a-3": keyed}, tmp_path / "noise.safetensors")
    for name, given in (("keyed", ()), ("given", flags[1:])):
        sample_requests(config(models, tmp_path / name, "--latents", *given, seeds=[3]))
    first, second = ((tmp_path / name / "a-3.safetensors").read_bytes() for name in ("keyed", "given"))
    assert first == second
    save_file({"any": noise}, tmp_path / "one.safetensors")
    one = ["--image", models / "image0.png", "--prompt", "a dog", "--num-steps", 1, "--seed", 5]
    words = sample_words(models, tmp_path / "a.mp4", *one, "--noise", tmp_path / "one.safetensors")
    video = sample(parse(SampleConfig, words[1:], prog="", description=""))
    assert torch.equal(video.latents_BCTHW, made[0])


def refused(models: Path, output: Path, *flags: object, **row: Any) -> str:
    with pytest.raises(UserError) as error:
        sample_requests(config(models, output, *flags, **row))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("row", "said"), [
    ({"image": None}, "out.jsonl: line 1: id 'a' has no image, but "),
    ({"height": 18}, "out.jsonl: line 1: height is 18; "),
    ({"num_frames": 4}, "out.jsonl: line 1: num_frames is 4; "),
    ({"prompt": "一只猫"}, "out.jsonl: line 1: the prompt '一只猫' is empty after text cleaning full"),
    ({"negative_prompt": "模糊"}, "out.jsonl: line 1: the negative prompt '模糊' is empty after text cleaning full"),
])  # fmt: skip
def test_what_does_not_fit_the_model(models: Path, tmp_path: Path, row: dict[str, Any], said: str) -> None:
    assert said in refused(models, tmp_path / "out", **row)
    assert not (tmp_path / "out").exists()


def test_noise_that_does_not_fit(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "noise.safetensors"
    flags = ("--noise", path)
    assert f"--noise {path}: cannot be read" in refused(models, tmp_path / "out", *flags)
    for tensors, said in (
        ({"b-0": torch.zeros(SHAPE)}, "holds no tensor 'a-0'"),
        ({"a-0": torch.zeros(4, 3, 4, 5)}, "a-0 is F32 [4, 3, 4, 5]; it must be floating [4, 3, 4, 6]"),
        ({"a-0": torch.zeros(SHAPE, dtype=torch.int32)}, "a-0 is I32"),
    ):
        save_file(tensors, path)
        assert said in refused(models, tmp_path / "out", *flags)
    path.write_bytes(b"no safetensors")
    assert "cannot be read" in refused(models, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_folder_keeps_what_is_in_it(models: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "a-0.mp4").write_bytes(b"a user's")
    assert "a-0.mp4: it would be replaced, and flashi2v did not write it" in refused(models, output)
    (output / "a-0.mp4").unlink()
    sample_requests(config(models, output))
    before = (output / "a-0.mp4").read_bytes(), (output / "sampling.json").read_bytes()
    assert "--num-steps 1, and it is 2 now" in refused(models, output, "--num-steps", 2)
    assert "--latents False, and it is True now" in refused(models, output, "--latents")
    assert "it was made with the prompt 'a dog', and the request has 'a car' now" in refused(
        models, output, prompt="a car"
    )
    assert ((output / "a-0.mp4").read_bytes(), (output / "sampling.json").read_bytes()) == before
    sample_requests(config(models, output, id="b"))  # more requests for the same folder
    assert sorted(json.loads((output / "sampling.json").read_text())["videos"]) == ["a-0", "b-0"]
    (output / "sampling.json").write_text('{"kind": "another"}')
    assert "sampling.json is not a record of flashi2v sample" in refused(models, output)


@pytest.mark.parametrize(("words", "said"), [
    ("--output a --prompt x --requests r", "--prompt x belongs to one video"),
    ("--output a --image x --requests r", "--image x belongs to one video"),
    ("--output a.mp4 --requests r", "--output is a.mp4; with --requests it must be a folder"),
    ("--output a --requests r --latents b.safetensors", "--latents b.safetensors names one file"),
    ("--output a --requests r --strip b.png", "--strip b.png names one file"),
    ("--output a.mp4", "--prompt must be given, or --requests FILE"),
    ("--output a.mp4 --prompt x --name {id}", "--name {id} names the videos of --requests"),
    ("--output a.mp4 --prompt x --latents a.safetensors b.safetensors", "--latents names 2 files"),
    ("--output a.mp4 --prompt x --guidance-parallel-size 3", "it must be between 1 and 2"),
    ("--output a.mp4 --prompt x --guidance-parallel-size 2 --guidance-scale 1", "--guidance-scale 1 makes one"),
    ("--output a.mp4 --prompt x --guidance-parallel-size 2 --batched-guidance", "give one of them"),
])  # fmt: skip
def test_flags_of_the_two_forms_are_not_mixed(words: str, said: str) -> None:
    flags = ["--load", "a", "--vae", "b", "--text-encoder", "c", "--tokenizer", "d"] + words.split()
    with pytest.raises(UserError) as error:
        parse(SampleConfig, flags, prog="", description="")
    assert said in str(error.value)


@pytest.mark.parametrize("count", [1, 2, 5, 30])
def test_replicas_share_a_list_evenly(count: int) -> None:
    parts = [Replica(index=index, count=count, is_first=True).share(range(12)) for index in range(count)]
    assert [item for part in parts for item in part] == list(range(12))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_processes_that_the_layout_does_not_take(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 3, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": 1}.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    said = refused(models, tmp_path / "out", "--guidance-parallel-size", 2)
    assert "3 processes were started" in said and "takes 2 for each video; start a multiple of 2" in said
    assert not (tmp_path / "out").exists()
