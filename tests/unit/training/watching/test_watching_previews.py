"""Videos of a model in training: those that sampling makes of its checkpoint; training does not notice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import pytest
import torch
from helpers.layouts import metrics
from helpers.synthetic_data import write_synthetic
from helpers.tiny_models import make_tiny_vae
from helpers.train_command import LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH
from safetensors.torch import load_file

from megatron_flashi2v.checkpoint.folders import find_checkpoint
from megatron_flashi2v.config.train import BatchArguments, DataArguments, TrainConfig
from megatron_flashi2v.config.watch import WatchArguments
from megatron_flashi2v.data.blend import Blend
from megatron_flashi2v.data.prepared import PreparedDataset, pad_text_rows
from megatron_flashi2v.flow.sigmas import shift_sigmas
from megatron_flashi2v.models.predict import predict_velocity
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.sampling.load import load_model
from megatron_flashi2v.sampling.noise import sample_noise
from megatron_flashi2v.training.datasets import VALIDATION_SEED, open_validation_data
from megatron_flashi2v.training.watching.previews import Previews

Train = Callable[..., int]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("valid") / "set", 5, LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, seed=9)


@pytest.fixture
def flags(valid: Path) -> tuple[object, ...]:
    return "--valid-data-path", valid, "--sample-interval", 2, "--sample-count", 3, "--sample-num-steps", 3


def written(save: Path) -> list[str]:
    return sorted(str(path.relative_to(save / "samples")) for path in (save / "samples").rglob("*.*"))


@pytest.mark.parametrize("others", [
    (), ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
], ids=str)
def test_training_does_not_notice(
    train: Train, tmp_path: Path, flags: tuple[object, ...], others: tuple[str, ...]
) -> None:
    assert train("--save", tmp_path / "with", *flags, "--eval-interval", 2, "--eval-iters", 1, *others) == 0
    assert train("--save", tmp_path / "without", *others) == 0
    found, expected = ([(row["loss"], row["grad_norm"]) for row in metrics(tmp_path / name)]
                       for name in ("with", "without"))
    assert found == expected
    assert written(tmp_path / "with") == [
        f"iter_{iteration:07d}/sample_{index:03d}.safetensors" for iteration in (2, 4) for index in range(3)
    ]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_latents_are_those_of_the_saved_model(
    train: Train, tmp_path: Path, valid: Path, flags: tuple[object, ...], scale: float
) -> None:
    """Three Euler steps by hand, from the checkpoint of the same iteration."""
    assert train("--save", tmp_path, *flags, "--sample-guidance-scale", scale) == 0
    config = TrainConfig(
        data=DataArguments(data_path=(str(valid),)), batch=BatchArguments(global_batch_size=4),
        watch=WatchArguments(valid_data_path=(str(valid),)),
    )
    training = Blend([PreparedDataset(valid)], [1.0], batch=4, seed=1)
    path, batch = config.watch.valid_data_path, config.batch.global_batch_size
    (sample,), _ = open_validation_data(path, training, batch=batch, seed=VALIDATION_SEED).read([1])
    latents, empty = sample.latents_CTHW.unsqueeze(0), PreparedDataset(valid).empty_text_rows_LD
    texts = [pad_text_rows(rows, TEXT_LENGTH).unsqueeze(0) for rows in (sample.text_rows_LD, empty)]
    sigmas = shift_sigmas(torch.tensor([1.0, 2 / 3, 1 / 3, 0.0]), 7.0)
    device = resolve_device("cpu")
    state = sample_noise(0, [1], LATENT_SHAPE)
    with single_process(device) as groups, torch.no_grad():
        model = load_model(find_checkpoint(tmp_path), groups, device)
        for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
            with_text, without = (
                predict_velocity(model, state, 1000 * now.view(1), text, latents[:, :, :1],
                                 {"cutoff_ratio": torch.tensor([0.1])})
                for text in texts
            )
            state = state + (without + scale * (with_text - without)) * (then - now)
    found = load_file(tmp_path / "samples" / "iter_0000004" / "sample_001.safetensors")["latents_BCTHW"]
    torch.testing.assert_close(found, state, rtol=1e-4, atol=1e-5)


def test_videos_and_strips_with_a_vae(train: Train, tmp_path: Path, flags: tuple[object, ...]) -> None:
    vae = make_tiny_vae(tmp_path / "vae", z_dim=LATENT_SHAPE[0], temporal=(True, True))
    assert train("--save", tmp_path, *flags, "--sample-vae", vae) == 0
    assert written(tmp_path) == [
        f"iter_{iteration:07d}/sample_{index:03d}.{kind}"
        for iteration in (2, 4) for index in range(3) for kind in ("mp4", "png")
    ]
    with av.open(str(tmp_path / "samples" / "iter_0000004" / "sample_000.mp4")) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 5 and (frames[0].height, frames[0].width) == (16, 16)


def test_what_an_interrupted_run_owes_is_made_up_for(train: Train, tmp_path: Path, flags: tuple[object, ...]) -> None:
    assert train("--save", tmp_path, *flags, "--exit-interval", 2) == 0
    assert not (tmp_path / "samples").exists()
    assert train("--save", tmp_path, "--load", tmp_path, *flags) == 0
    assert {name.split("/")[0] for name in written(tmp_path)} == {"iter_0000002", "iter_0000004"}


def test_videos_that_cannot_be_written_do_not_stop_the_run(
    train: Train, tmp_path: Path, flags: tuple[object, ...], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(Previews, "_write", fail)
    assert train("--save", tmp_path, *flags) == 0
    assert len(metrics(tmp_path)) == 4
    assert "samples of iteration 2 are not written: OSError: the disk is gone" in capsys.readouterr().err


def test_a_vae_of_other_latents_is_refused_at_the_start(
    train: Train, tmp_path: Path, flags: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    vae = make_tiny_vae(tmp_path / "vae", z_dim=8, temporal=(True, True))
    assert train("--save", tmp_path / "run", *flags, "--sample-vae", vae) != 0
    assert "makes latents of 8 channels with temporal stride 4" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("given, message", [
    (("--sample-interval", 2), "--sample-interval 2 needs --valid-data-path"),
    (("--sample-interval", 2, "--valid-data-path", "a"), "--sample-interval writes its videos under --save"),
    (("--sample-vae", "a"), "--sample-vae a requires --sample-interval"),
    (("--sample-num-steps", 0), "--sample-num-steps is 0; it must be at least 1"),
])
def test_refusals(
    train: Train, capsys: pytest.CaptureFixture[str], given: tuple[object, ...], message: str
) -> None:
    assert train(*given) != 0
    assert message in capsys.readouterr().err
