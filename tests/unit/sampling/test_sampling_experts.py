"""Pairs of experts: which of them a noise level belongs to, where they are, and which two make a pair."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.base_weights import write_base
from helpers.checkpoints import save_checkpoint
from helpers.sampling_models import CONFIG, make_sampling_models, sample_words
from safetensors.torch import load_file
from torch import nn

from megatron_flashi2v import SampleConfig, UserError, sample, sample_requests
from megatron_flashi2v.checkpoint.adapter_record import AdapterRecord
from megatron_flashi2v.checkpoint.adapter_table import adapter_shapes
from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.checkpoint.storage import TensorPiece
from megatron_flashi2v.config.adapter import ATTENTION, AdapterConfig
from megatron_flashi2v.config.recipe import parse
from megatron_flashi2v.conversion.base_fingerprint import base_fingerprint
from megatron_flashi2v.conversion.convert import open_weights
from megatron_flashi2v.conversion.weights import ReadOptions
from megatron_flashi2v.sampling.base import checked_bases
from megatron_flashi2v.sampling.experts import is_low_noise
from megatron_flashi2v.sampling.models import TurnsOnDevice, find_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``checkpoints`` of all noise levels, ``high`` and ``low`` of a part, and those of other kinds."""
    folder = make_sampling_models(tmp_path_factory.mktemp("models"))
    for number, (name, levels, config) in enumerate((
        ("high", {"sigma_min": 0.9}, CONFIG),
        ("low", {"sigma_max": 0.9}, CONFIG),
        ("lower", {"sigma_max": 0.8}, CONFIG),
        ("again", {}, CONFIG),
        ("wide", {"sigma_max": 0.9}, dataclasses.replace(CONFIG, text_dim=24)),
        ("light", {"sigma_max": 0.9}, dataclasses.replace(CONFIG, text_cleaning="light")),
        ("channels", {"sigma_max": 0.9}, dataclasses.replace(CONFIG, latent_channels=8)),
        ("text", {"sigma_max": 0.9}, dataclasses.replace(CONFIG, conditioning="text_to_video")),
    )):  # fmt: skip
        generator = torch.Generator().manual_seed(1 + number)
        save_checkpoint(folder / name, 1, model_config=config, state={"iteration": 1, "config": levels}, pieces=[
            TensorPiece.whole(f"model.{key}", 0.2 * torch.randn(shape, generator=generator))
            for key, shape in parameter_shapes(config).items()
        ])  # fmt: skip
    return folder


def config(models: Path, output: Path, high: str, *flags: object) -> SampleConfig:
    words = sample_words(models, output, "--load", models / high, "--num-frames", 5, "--height", 16, "--width", 24,
                         "--num-steps", 3, *flags)  # fmt: skip
    return parse(SampleConfig, words[1:], prog="", description="")


def test_a_timestep_on_the_boundary_is_the_firsts() -> None:
    for ratio, low in ((0.9, 899), (0.875, 874), (0.9, 899.99)):
        assert not is_low_noise(torch.tensor(1000 * ratio), ratio) and is_low_noise(torch.tensor(float(low)), ratio)
    # As diffusers compares: the boundary in the precision of the timesteps.
    assert not is_low_noise(torch.tensor(1000 * 0.9001, dtype=torch.float32), 0.9001)


@pytest.mark.parametrize(("high", "flags", "said"), [
    ("high", (), "high was trained on noise levels from 0.9 to 1 alone, and sampling goes from 1 to 0; give both"),
    ("low", (), "low was trained on noise levels from 0 to 0.9 alone"),
    ("low", ("--low-noise", "high"), "were they swapped?"),
    ("high", ("--low-noise", "lower"), "--boundary-ratio must be given"),
    ("checkpoints", ("--low-noise", "checkpoints"), "a pair has two experts"),
    ("checkpoints", ("--low-noise", "again"), "--boundary-ratio must be given"),
    ("checkpoints", ("--boundary-ratio", 0.9), "--boundary-ratio 0.9 divides a pair of experts, but --load "),
    ("checkpoints", ("--guidance-scale-2", 3), "guidance_scale_2 is 3, which is for the second of a pair"),
    ("high", ("--low-noise", "wide"), "its text_dim is 24, but that of --load "),
    ("high", ("--low-noise", "light"), "its text_cleaning is 'light', but that of --load "),
    ("high", ("--low-noise", "channels"), "its latent_channels is 8, but that of --load "),
    ("high", ("--low-noise", "text"), "its conditioning is 'text_to_video', but that of --load "),
    ("high", ("--low-noise", "none"), "does not exist; give a folder"),
    ("high", ("--low-noise", "low", "--boundary-ratio", 1.5), "--boundary-ratio"),
])  # fmt: skip
def test_what_is_no_pair_is_told_before_the_work(
    models: Path, tmp_path: Path, high: str, flags: tuple[Any, ...], said: str
) -> None:
    before = ("", *flags[:-1])
    words = [models / word if flag == "--low-noise" else word for flag, word in zip(before, flags, strict=bool(flags))]
    with pytest.raises(UserError) as error:
        sample(config(models, tmp_path / "a.mp4", high, "--image", models / "image0.png", "--prompt", "a", *words))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_boundary_beside_the_trained_ones_is_told(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = find_models(models / "high", low_noise=models / "low")
    assert found.low_noise is not None and found.low_noise.boundary_ratio == 0.9 and not caplog.records
    find_models(models / "high", low_noise=models / "lower", boundary_ratio=0.85)
    assert "the boundary ratio is 0.85, but the experts were trained on noise levels from 0.9 and up to 0.8" in (
        caplog.text
    )


def test_requests_take_a_pair_and_record_it(models: Path, tmp_path: Path) -> None:
    pair = ("--low-noise", models / "low", "--guidance-scale", 3, "--guidance-scale-2", 1)
    rows = [{"id": name, "image": str(models / "image0.png"), "prompt": "a dog", "seeds": [0]} for name in "ab"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def many(*flags: object) -> dict[str, torch.Tensor]:
        given = config(models, tmp_path / "out", "high", *pair, "--requests", tmp_path / "rows.jsonl", "--latents",
                       *flags)  # fmt: skip
        return {path.stem: load_file(path.with_suffix(".safetensors"))["latents_BCTHW"]
                for path in sample_requests(given)}  # fmt: skip

    made = many()
    assert (made["a-0"] - made["b-0"]).abs().max() > 0.1
    # The second video is what it is alone, although the experts had changed places.
    (tmp_path / "out" / "b-0.mp4").unlink()
    assert torch.equal(many()["b-0"], made["b-0"])
    for flags, said in ((("--boundary-ratio", 0.85), "with --boundary-ratio 0.9, and it is 0.85 now"),
                        (("--low-noise", models / "lower", "--boundary-ratio", 0.9), "with --low-noise "),
                        (("--guidance-scale-2", 2), "with --guidance-scale-2 1.0, and it is 2.0 now")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            many(*flags)


def write_adapter(root: Path, base: Path, seed: int, **levels: float) -> None:
    adapter = AdapterConfig(rank=2, alpha=8.0, targets=ATTENTION)
    record = AdapterRecord(
        adapter=adapter, trained=(), base=f"megatron:{base}", base_weights="model",
        base_fingerprint=base_fingerprint(open_weights("megatron", base, ReadOptions())),
    )
    generator = torch.Generator().manual_seed(seed)
    pieces = [TensorPiece.whole(f"model.{name}", torch.randn(shape, generator=generator))
              for name, shape in adapter_shapes(CONFIG, adapter).items()]  # fmt: skip
    save_checkpoint(
        root, 1, pieces=pieces, model_config=CONFIG, state={"iteration": 1, "config": levels}, adapter=record
    )


def test_adapters_of_two_bases_are_sampled_when_these_have_moved(models: Path, tmp_path: Path) -> None:
    for seed, name, levels in ((1, "high", {"sigma_min": 0.9}), (2, "low", {"sigma_max": 0.9})):
        write_base(tmp_path / f"{name}-base", CONFIG, seed)
        write_adapter(tmp_path / name, tmp_path / f"{name}-base", seed, **levels)
    write_adapter(tmp_path / "sister", tmp_path / "high-base", 3, sigma_max=0.9)

    def latents(name: str, *flags: object, high: Path = tmp_path / "high", low: str = "low") -> torch.Tensor:
        file = tmp_path / f"{name}.safetensors"
        words = ("--low-noise", tmp_path / low, "--image", models / "image0.png", "--prompt", "a", "--latents", file)
        sample(config(models, tmp_path / f"{name}.mp4", str(high), *words, *flags))
        return load_file(file)["latents_BCTHW"]

    before = latents("before")
    for name in ("high-base", "low-base"):
        shutil.move(tmp_path / name, tmp_path / f"moved-{name}")
    high, low = (f"megatron:{tmp_path}/moved-{name}-base" for name in ("high", "low"))
    assert torch.equal(latents("after", "--base", high, "--low-noise-base", low), before)
    whole = models / "high"  # of a whole model and an adapter, the latter alone has a base
    mixed = latents("mixed", "--low-noise-base", low, "--adapter-scale", 0.5, high=whole)
    assert not torch.equal(mixed, latents("full", "--low-noise-base", low, high=whole))
    gone = ("--vae", tmp_path / "gone")  # told before anything is loaded
    for flags, said in (
        ((), "high-base does not exist; give these weights as --base FORMAT:PATH"),
        (("--base", high), "low-base does not exist; give these weights as --low-noise-base FORMAT:PATH"),
        (("--base", high, "--low-noise-base", "low"), "--low-noise-base is 'low'; give FORMAT:PATH"),
        (("--base", high, "--low-noise-base", low, "--low-noise", models / "low"), "--low-noise-base megatron:"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            latents("x", *gone, *flags)
    with pytest.raises(UserError, match=r"beside other weights than .* as --low-noise-base FORMAT:PATH"):
        latents("x", "--base", high, "--low-noise-base", high)
    with pytest.raises(UserError, match="--low-noise-base megatron:x is the base of the second of a pair"):
        SampleConfig.from_flags(load="a", prompt="a", output="a.mp4", low_noise_base="megatron:x")
    # Two that were trained beside the same weights need them once.
    sisters = find_models(tmp_path / "high", low_noise=tmp_path / "sister")
    assert checked_bases(sisters, high, None, 0.5) == (("megatron", tmp_path / "moved-high-base"),) * 2


class Stage(nn.Module):
    """Writes down where it is sent."""

    def __init__(self, name: str, seen: list[str]) -> None:
        super().__init__()
        self.name, self.seen = name, seen

    def to(self, place: Any) -> Stage:  # type: ignore[override]
        self.seen.append(f"{self.name} to {place}")
        return self


def test_one_of_two_is_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(
        "megatron_flashi2v.sampling.models.velocity_of",
        lambda stages: lambda *inputs: seen.append(f"{stages[0].name} computes"),
    )

    def load(name: str) -> list[Stage]:
        seen.append(f"{name} is loaded")
        return [Stage(name, seen)]

    turns = TurnsOnDevice(torch.device("meta"))
    low = turns.add(lambda: load("low"))
    high = turns.add(lambda: load("high"))
    for velocity in (high, high, low, low, high):
        velocity()
    assert seen == [
        "low is loaded", "low to meta", "low to cpu", "high is loaded", "high to meta", "high computes",
        "high computes", "high to cpu", "low to meta", "low computes", "low computes", "low to cpu", "high to meta",
        "high computes",
    ]  # fmt: skip
