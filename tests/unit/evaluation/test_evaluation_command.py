"""The whole command on folders of small mp4 files: its files, its figures, and what it refuses before any work."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.moving_videos import moving_video, write_videos
from helpers.tiny_models import make_tiny_vae
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from megatron_flashi2v.cli.main import main
from megatron_flashi2v.config.errors import ConfigError, UserError
from megatron_flashi2v.config.evaluate import EvaluateConfig
from megatron_flashi2v.evaluation import evaluate as command
from megatron_flashi2v.evaluation.chunks import divide
from megatron_flashi2v.evaluation.evaluate import evaluate
from megatron_flashi2v.evaluation.features.base import VideoFeatures
from megatron_flashi2v.evaluation.features.latents import LatentFeatures
from megatron_flashi2v.evaluation.features.transnetv2 import TransNetV2Features
from megatron_flashi2v.evaluation.frechet import frechet_distance

TRAINED_VAE = Path(__file__).parents[3] / "examples" / "quickstart" / "models" / "vae"
IMAGES = 6
SCRIPT = "<script>alert(1)<!--"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """References; videos of two seeds, of which those of even images are frozen; and a VAE."""
    root = tmp_path_factory.mktemp("evaluation")
    references = {f"{image:02d}": moving_video(image) for image in range(IMAGES)}
    write_videos(root / "references", references)
    videos = {}
    for image, (name, frames) in enumerate(references.items()):
        still = np.repeat(frames[:1], len(frames), axis=0)
        videos[f"{name}-0"] = still if image % 2 == 0 else moving_video(image, speed=1.2)
        videos[f"{name}-1"] = still if image % 2 == 0 else moving_video(image, speed=2)
    write_videos(root / "videos", videos)
    make_tiny_vae(root / "vae")
    return root


def config_of(folders: Path, output: Path, **changes: Any) -> EvaluateConfig:
    settings: dict[str, Any] = {
        "videos": folders / "videos", "references": folders / "references", "output": output,
        "features": f"latents:{folders / 'vae'}", "chunk_frames": 4, "allow_few": True, "device": "cpu",
        "resamples": 100, "splits": 3, "strips": 2,
    }  # fmt: skip
    return EvaluateConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def evaluated(folders: Path) -> Path:
    """The output of an evaluation."""
    evaluate(config_of(folders, folders / "evaluated", name="first run"))
    return folders / "evaluated"


def strict(path: Path) -> dict[str, Any]:
    """The file as JSON proper, which knows no NaN and no infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_figures_and_files(evaluated: Path) -> None:
    found = strict(evaluated / "evaluation.json")
    assert [chunk["first_frame"] for chunk in found["chunks"]] == [1, 5]
    for chunk in found["chunks"]:
        assert chunk["frechet"] > 0 and chunk["mmd_low"] <= chunk["mmd"] <= chunk["mmd_high"]
        assert chunk["halves"]["samples"] == IMAGES // 2
    motion = found["motion"]
    assert motion["frozen"]["count"] == IMAGES and motion["frozen"]["of"] == 2 * IMAGES
    assert motion["frozen"]["low"] < motion["frozen"]["share"] == 0.5 < motion["frozen"]["high"]
    flow = motion["flow"]
    assert np.mean(flow["videos"]["mean"]) < np.mean(flow["references"]["mean"])
    psnr = found["fidelity"]["psnr"]
    # Half of the videos keep the image, so that they stay nearer to it than the references do.
    assert psnr["videos"]["mean"][-1] > psnr["references"]["mean"][-1] and psnr["references"]["mean"][0] == 100
    diversity = found["diversity"]
    assert diversity["images"] == IMAGES and diversity["pixels"]["mean"][-1] > diversity["pixels"]["mean"][0]
    assert len(found["pairs"]) == 2 * IMAGES and found["videos"]["pairing"] == "names"
    page = (evaluated / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4 + 2 * 2 and "http" not in page


def test_identical_folders(folders: Path, tmp_path: Path) -> None:
    found = evaluate(config_of(folders, tmp_path, videos=folders / "references"))
    for chunk in found["chunks"]:
        assert chunk["frechet"] == chunk["mmd"] == chunk["mmd_low"] == chunk["mmd_high"] == 0
    assert found["motion"]["flow_ratio"] == pytest.approx({"mean": 1, "low": 1, "high": 1})
    assert found["motion"]["frozen"]["share"] == 0 and found["diversity"] is None
    for name in ("psnr", "ssim", "similarity"):
        assert found["fidelity"][name]["videos"]["mean"] == found["fidelity"][name]["references"]["mean"]


def blurred(frames: NDArray[np.uint8], sigma: float) -> NDArray[np.uint8]:
    return gaussian_filter(frames.astype(float), (0, sigma, sigma, 0)).round().astype(np.uint8)


def shuffled(frames: NDArray[np.uint8], swaps: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Frames after the first, with so many random swaps."""
    order = np.arange(len(frames))
    for _ in range(swaps):
        one, other = rng.choice(np.arange(1, len(frames)), 2, replace=False)
        order[[one, other]] = order[[other, one]]
    return frames[order]


@pytest.mark.parametrize("kind", ["latents", "transnetv2"])
def test_the_distance_rises_with_blur_and_with_shuffling(kind: str, request: pytest.FixtureRequest) -> None:
    features: VideoFeatures
    if kind == "latents":
        features = LatentFeatures(TRAINED_VAE, "cpu")
    else:
        features = TransNetV2Features(request.getfixturevalue("transnetv2_folder"), "cpu")
    chunks, rng = divide(7, 6, include_first=False), np.random.default_rng(0)
    videos = [moving_video(seed, frames=7) for seed in range(8)]

    def embedded(changed: list[NDArray[np.uint8]]) -> NDArray[np.float64]:
        rows = [features.of_chunks(torch.from_numpy(frames), chunks)[0] for frames in changed]
        return torch.stack(rows).double().numpy()

    real = embedded(videos)
    blur = [frechet_distance(embedded([blurred(one, sigma) for one in videos]), real) for sigma in (0.5, 1.5)]
    shuffle = [frechet_distance(embedded([shuffled(one, swaps, rng) for one in videos]), real) for swaps in (1, 8)]
    assert 0 < blur[0] < blur[1]
    assert 0 < shuffle[0] < shuffle[1]


def test_names_are_escaped(folders: Path, tmp_path: Path) -> None:
    videos = {f"{SCRIPT}{image}": moving_video(image) for image in range(4)}
    write_videos(tmp_path / "videos", videos)
    write_videos(tmp_path / "references", {f"{name}-5": frames for name, frames in videos.items()})
    output = tmp_path / "out"
    given = {"videos": tmp_path / "videos", "references": tmp_path / "references", "name": f"_{SCRIPT}$x"}
    evaluate(config_of(folders, output, **given))
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and page.count("&lt;script&gt;alert(1)&lt;!--") > 10


def test_again_and_beside(folders: Path, evaluated: Path, tmp_path: Path) -> None:
    """The same settings give the same figures, replace their own files, and may stand side by side; others not."""
    first = strict(evaluated / "evaluation.json")
    config = config_of(folders, tmp_path / "second", strips=0, name="second run", beside=(evaluated,))
    config.output.mkdir()
    for name in ("evaluation.json", "report.html"):
        shutil.copy(evaluated / name, config.output)
    second = evaluate(config)
    assert {**second, "name": "first run"} == first
    assert second == strict(config.output / "evaluation.json")
    page = (config.output / "report.html").read_text(encoding="utf-8")
    assert "first run" in page and "second run" in page
    other = replace(config, output=tmp_path / "third", chunk_frames=8)
    with pytest.raises(ConfigError, match="chunks.count is 1 here and 2 there; chunks.frames is 8 here and 4 there"):
        evaluate(other)
    assert not other.output.exists()


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch) -> str:
    """The one line with which the command refuses before it measures or writes anything."""

    def work(*arguments: object) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr(command, "measure_image", work)
    before = contents(config.output)
    with pytest.raises(UserError) as caught:
        evaluate(config)
    assert contents(config.output) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_too_few_and_too_many_dimensions(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = refused(config_of(folders, tmp_path, allow_few=False), monkeypatch)
    assert message.startswith("6 videos are fewer than the 12 features") and "--allow-few" in message
    few = write_videos(tmp_path / "few", {f"{image:02d}": moving_video(image) for image in range(3)})
    assert "at least 4 are needed" in refused(config_of(folders, tmp_path, videos=few), monkeypatch)


def test_other_lengths_and_sizes(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ({"frames": 8}, {"height": 48}):
        videos = {f"{image:02d}": moving_video(image, **({} if image != 3 else shape)) for image in range(IMAGES)}
        folder = write_videos(tmp_path / str(shape), videos)
        message = refused(config_of(folders, tmp_path, videos=folder), monkeypatch)
        assert "03.mp4" in message and "the reference" in message and "9 frames of 48 x 32 pixels" in message


def test_empty_folders_and_damaged_files(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    for flag in ("videos", "references"):
        for name, words in (("empty", "holds no mp4"), ("none", "there is no such folder")):
            config = config_of(folders, tmp_path, **{flag: tmp_path / name})
            assert f"--{flag} {tmp_path / name}: {words}" in refused(config, monkeypatch)
    videos = write_videos(tmp_path / "videos", {f"{image:02d}": moving_video(image) for image in range(IMAGES)})
    (videos / "04.mp4").write_bytes(b"no video")
    assert "04.mp4: is not a readable video file" in refused(config_of(folders, tmp_path, videos=videos), monkeypatch)


def test_chunks_features_and_outputs(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "have 8 frames after frame 0" in refused(config_of(folders, tmp_path, chunk_frames=9), monkeypatch)
    other = config_of(folders, tmp_path, features=f"videomae:{folders / 'vae'}")
    assert "it must be videomae" in refused(other, monkeypatch)
    (tmp_path / "evaluation.json").write_text('{"accuracy": 1}')
    assert "exists and is no evaluation" in refused(config_of(folders, tmp_path), monkeypatch)
    assert (tmp_path / "evaluation.json").read_text() == '{"accuracy": 1}'
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "report.html").write_text("<p>mine")
    assert "no evaluation's report" in refused(config_of(folders, tmp_path / "page"), monkeypatch)
    assert "is no evaluation" in refused(config_of(folders, tmp_path / "x", beside=(tmp_path,)), monkeypatch)
    assert "is a file" in refused(config_of(folders, tmp_path / "evaluation.json" / "x"), monkeypatch)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"features": "i3d:x.pt"}, "--trust-torchscript"),
        ({"features": "i3d"}, "give i3d:FILE"),
        ({"features": "clip:x"}, "no such features"),
        ({"chunk_frames": 0}, "--chunk-frames is 0; it must be at least 1"),
        ({"frozen_below": 1.5}, "--frozen-below is 1.5"),
    ],
)
def test_flags(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EvaluateConfig(videos=Path("a"), references=Path("b"), output=Path("c"), **changes)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--videos", str(tmp_path), "--references", str(tmp_path), "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("flashi2v evaluate: error: --videos") and error.count("\n") == 1
