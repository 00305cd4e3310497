"""``train --evaluation-interval``: figures of validation videos, which training does not notice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.layouts import metrics, weights
from helpers.synthetic_data import write_synthetic
from helpers.tiny_models import make_tiny_vae
from helpers.train_command import LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, run_command, synthetic_data, train

from megatron_flashi2v import EvaluationInTraining, Observer
from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.evaluation import in_training
from megatron_flashi2v.runtime.files import read_jsonl

__all__ = ["run_command", "synthetic_data", "train"]

Train = Callable[..., int]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    folder = tmp_path_factory.mktemp("valid")
    valid = write_synthetic(folder / "set", 5, LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, seed=9)
    vae = make_tiny_vae(folder / "vae", z_dim=LATENT_SHAPE[0], temporal=(True, True))
    return ("--valid-data-path", valid, "--sample-vae", vae, "--evaluation-interval", 2, "--sample-count", 3,
            "--sample-num-steps", 2)


def evaluated(save: Path, iteration: int) -> dict:
    return json.loads((save / "evaluation" / f"iter_{iteration:07d}.json").read_text())


class Kept(Observer):
    """Asks for the videos that were measured."""

    def begin_run(self, run) -> None:
        self.videos, self.made = run.videos, {}

    def between_iterations(self, state) -> None:
        if state.iteration == 4:
            self.made = self.videos.make(state)


def decoded(vae: object, latents_BCTHW: torch.Tensor) -> np.ndarray:
    """8-bit frames [T, H, W, C] by diffusers alone."""
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan.from_pretrained(str(vae), local_files_only=True)
    mean, std = (torch.tensor(model.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        pixels = model.decode(latents_BCTHW * std + mean).sample[0].clamp(-1, 1)
    return ((pixels + 1) / 2 * 255 + 0.5).floor().double().permute(1, 2, 3, 0).numpy()


def test_figures_are_the_videos_and_training_does_not_notice(
    train: Train, tmp_path: Path, flags: tuple[object, ...]
) -> None:
    kept = Kept()
    assert train("--save", tmp_path / "with", *flags, observers=[EvaluationInTraining(), kept]) == 0
    assert train("--save", tmp_path / "without") == 0
    found, expected = ([(row["loss"], row["grad_norm"]) for row in metrics(tmp_path / name)]
                       for name in ("with", "without"))
    assert found == expected
    trained, plain = (weights(tmp_path / name) for name in ("with", "without"))
    assert trained.keys() == plain.keys() and all(torch.equal(trained[name], plain[name]) for name in plain)

    names = {"iter_0000002.json", "iter_0000004.json", "curves.png"}
    assert {path.name for path in (tmp_path / "with" / "evaluation").iterdir()} == names
    rows = read_jsonl(tmp_path / "with" / "evaluation.jsonl")
    assert [row["iteration"] for row in rows] == [2, 4] and rows[1]["consumed_samples"] == 16
    last = evaluated(tmp_path / "with", 4)
    assert rows[1].keys() >= last["figures"].keys() >= {"psnr", "reference_ssim", "flow_ratio", "frozen"}
    assert all(rows[1][name] == (value and value["mean"]) for name, value in last["figures"].items())

    assert len(kept.made) == len(last["videos"]) == 3
    means = []
    for place, video in kept.made.items():
        reference, frames = (decoded(flags[3], latents) for latents in (
            video.sample.latents_CTHW.unsqueeze(0), video.latents_BCTHW))
        stored = last["videos"][place]
        for name, pictures in (("video", frames), ("reference", reference)):
            error = ((pictures - reference[0]) ** 2).mean((1, 2, 3))
            want = np.minimum(10 * np.log10(255**2 / np.maximum(error, 1e-9)), 100)
            assert stored[name]["psnr"] == pytest.approx(want, rel=1e-6)
            changes = np.abs(np.diff(pictures, axis=0)).mean((1, 2, 3))
            assert stored[name]["differences"] == pytest.approx(changes, rel=1e-5)
        means.append(np.mean(stored["video"]["psnr"][1:]))
    assert last["figures"]["psnr"]["mean"] == pytest.approx(np.mean(means))
    assert last["figures"]["psnr"]["low"] <= np.mean(means) <= last["figures"]["psnr"]["high"]


def stamped(save: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (save / "evaluation").iterdir()}


def test_a_resumed_run_evaluates_what_is_owed_and_nothing_twice(
    train: Train, tmp_path: Path, flags: tuple[object, ...]
) -> None:
    """By the command, which brings the observer."""
    assert train("--save", tmp_path, *flags, "--exit-interval", 2) == 0
    assert not (tmp_path / "evaluation").exists()
    assert train("--save", tmp_path, *flags, "--exit-interval", 3) == 0
    first = tmp_path / "evaluation" / "iter_0000002.json"
    before = first.stat().st_mtime_ns
    assert train("--save", tmp_path, *flags) == 0
    stamps = stamped(tmp_path)
    assert stamps["iter_0000002.json"] == before and "iter_0000004.json" in stamps
    assert train("--save", tmp_path, *flags) == 0
    assert stamped(tmp_path) == stamps
    assert [row["iteration"] for row in read_jsonl(tmp_path / "evaluation.jsonl")] == [2, 4]


def test_measures_that_fail_do_not_stop_the_run(
    train: Train, tmp_path: Path, flags: tuple[object, ...], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: object) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr(in_training, "measure_image", fail)
    assert train("--save", tmp_path, *flags) == 0
    assert len(metrics(tmp_path)) == 4 and not (tmp_path / "evaluation").exists()
    assert "the evaluation of iteration 2 is left out: MemoryError: none left; the run" in capsys.readouterr().err


@pytest.mark.parametrize("given, message", [
    ((), "--evaluation-interval 2 needs --valid-data-path"),
    (("--valid-data-path", "a"), "--evaluation-interval 2 writes its measures under --save"),
    (("--valid-data-path", "a", "--save", "b"), "--evaluation-interval 2 measures decoded videos; give --sample-vae"),
])
def test_refusals(
    train: Train, capsys: pytest.CaptureFixture[str], given: tuple[object, ...], message: str
) -> None:
    assert train("--evaluation-interval", 2, *given) != 0
    assert message in capsys.readouterr().err


def test_the_flag_and_the_observer_need_each_other(
    train: Train, tmp_path: Path, flags: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--save", tmp_path / "a", *flags, observers=[Observer()]) != 0
    assert "--evaluation-interval 2 is served by an observer: call train(config, obs" in capsys.readouterr().err
    assert train("--save", tmp_path / "b", observers=[EvaluationInTraining()]) != 0
    assert "EvaluationInTraining needs --evaluation-interval" in capsys.readouterr().err
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_clips_that_cannot_be_measured_are_refused() -> None:
    info = SimpleNamespace(height=32, latent_shape=(4, 2, 4, 4))
    for shape in ((4, 1, 4, 4), (4, 2, 1, 4)):
        data = SimpleNamespace(info=info, latent_shapes=((4, 2, 2, 2), shape), name="DATA")
        with pytest.raises(DataError, match="--evaluation-interval: clips of DATA have"):
            in_training._require_measurable(SimpleNamespace(videos=SimpleNamespace(data=data)))


def test_a_still_reference_and_a_frozen_video() -> None:
    series = {name: [100.0, 20.0, 30.0] for name in ("psnr", "ssim", "similarity")}
    video = {"video": {**series, "differences": [1.0, 2.0], "flow": [0.1, 0.3]},
             "reference": {**series, "differences": [3.0, 4.0], "flow": [0.2, 0.2]}}
    figures = in_training.figures_of([{**video, "flow_ratio": ratio} for ratio in (None, 0.2, 1.0)])
    assert figures["psnr"]["mean"] == 25 and figures["differences"]["mean"] == 1.5
    assert figures["frozen"]["mean"] == 0.5 and figures["flow_ratio"]["mean"] == pytest.approx(0.6)
    assert in_training.figures_of([{**video, "flow_ratio": None}])["frozen"] is None
