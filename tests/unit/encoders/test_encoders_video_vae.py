"""The VAE behind normalised latents: strides from its structure, Wan's normalisation, causality."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_tiny_vae
from safetensors.torch import load_file, save_file

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.encoders.video_vae import VideoVAE

STRIDES = {1: (False, False), 2: (False, True), 4: (True, True)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("vaes")
    return {stride: make_tiny_vae(root / f"vae{stride}", temporal=flags) for stride, flags in STRIDES.items()}


def clip(frames: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 3, frames, 16, 24, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("stride", STRIDES)
def test_strides_and_shapes(folders: dict[int, Path], stride: int) -> None:
    vae = VideoVAE.load(folders[stride], "cpu")
    assert (vae.temporal_stride, vae.spatial_stride, vae.latent_channels) == (stride, 4, 4)
    for latent_frames in (1, 2, 4):
        video_BCTHW = clip(1 + (latent_frames - 1) * stride)
        latents_BCTHW = vae.encode(video_BCTHW)
        assert latents_BCTHW.shape == (2, 4, latent_frames, 4, 6) and latents_BCTHW.dtype == torch.float32
        assert latents_BCTHW.shape[1:] == vae.latent_shape(*video_BCTHW.shape[2:])
        decoded_BCTHW = vae.decode(latents_BCTHW)
        assert decoded_BCTHW.shape == video_BCTHW.shape
        assert decoded_BCTHW.abs().max() <= 1 and not latents_BCTHW.requires_grad


@pytest.mark.parametrize("stride", STRIDES)
def test_first_latent_frame_is_the_image_condition(folders: dict[int, Path], stride: int) -> None:
    vae = VideoVAE.load(folders[stride], "cpu")
    video_BCTHW = clip(9)
    latents_BCTHW = vae.encode(video_BCTHW)
    torch.testing.assert_close(vae.encode(video_BCTHW[:, :, :1]), latents_BCTHW[:, :, :1], atol=1e-6, rtol=0)
    # So is every shorter clip, also one that ends inside diffusers' chunk of four frames.
    if stride < 4:
        shorter_BCTHW = vae.encode(video_BCTHW[:, :, :7])
        torch.testing.assert_close(shorter_BCTHW, latents_BCTHW[:, :, : shorter_BCTHW.shape[2]], atol=1e-6, rtol=0)


def test_normalisation_is_that_of_diffusers_pipelines(folders: dict[int, Path]) -> None:
    from diffusers import AutoencoderKLWan

    vae, model = VideoVAE.load(folders[4], "cpu"), AutoencoderKLWan.from_pretrained(str(folders[4]))
    video_BCTHW = clip(5)
    with torch.no_grad():
        posterior = model.encode(video_BCTHW).latent_dist
        # The steps of diffusers' Wan image-to-video pipeline, before and after the denoising loop.
        mean_1C111 = torch.tensor(model.config.latents_mean).view(1, -1, 1, 1, 1)
        reciprocal_1C111 = 1.0 / torch.tensor(model.config.latents_std).view(1, -1, 1, 1, 1)
        wanted_BCTHW = (posterior.mode() - mean_1C111) * reciprocal_1C111
        decoded_BCTHW = model.decode(wanted_BCTHW / reciprocal_1C111 + mean_1C111, return_dict=False)[0]
    torch.testing.assert_close(vae.encode(video_BCTHW), wanted_BCTHW, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.decode(wanted_BCTHW), decoded_BCTHW, atol=1e-5, rtol=1e-5)


def test_residual_form_with_patches(tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], patch_size=2,
        in_channels=12, out_channels=12, is_residual=True, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        scale_factor_temporal=2, scale_factor_spatial=4,
    )  # fmt: skip
    vae = VideoVAE(model, source="here")
    assert (vae.temporal_stride, vae.spatial_stride) == (2, 4)
    for frames in (1, 7, 9):
        latents_BCTHW = vae.encode(clip(frames))
        assert latents_BCTHW.shape[1:] == vae.latent_shape(frames, 16, 24)
        assert vae.decode(latents_BCTHW).shape == clip(frames).shape
    torch.testing.assert_close(vae.encode(clip(9)[:, :, :7]), vae.encode(clip(9))[:, :, :4], atol=1e-6, rtol=0)


def test_tiles_are_diffusers_own(folders: dict[int, Path]) -> None:
    """Of a frame that is larger than a tile, both ways; the tiles leave their trace."""
    from diffusers import AutoencoderKLWan

    theirs = AutoencoderKLWan.from_pretrained(str(folders[1]))
    whole, tiled = (VideoVAE.load(folders[1], "cpu") for _ in range(2))
    theirs.enable_tiling()
    tiled.enable_tiling()
    latents_BCTHW = torch.randn(1, 4, 1, 4, 72, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(theirs.config[f"latents_{name}"]).view(-1, 1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = theirs.decode(latents_BCTHW * std + mean).sample.clamp(-1, 1)
        image_BCTHW = torch.rand(1, 3, 1, 16, 288, generator=torch.Generator().manual_seed(1)) * 2 - 1
        encoded = (theirs.encode(image_BCTHW).latent_dist.mode() - mean) / std
    assert torch.equal(tiled.decode(latents_BCTHW), expected)
    assert torch.equal(tiled.encode(image_BCTHW), encoded)
    assert not torch.equal(whole.decode(latents_BCTHW), expected)


def test_settings_are_json(folders: dict[int, Path]) -> None:
    settings = json.loads(json.dumps(VideoVAE.load(folders[2], "cpu").settings))
    assert (settings["temporal_stride"], settings["spatial_stride"], settings["posterior"]) == (2, 4, "mean")
    assert settings["config"]["z_dim"] == 4 and len(settings["config"]["latents_std"]) == 4


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((4, 16, 24), "num_frames is 4.*1 \\+ k \\* 2, such as 3 or 5"),
        ((0, 16, 24), "num_frames is 0"),
        ((5, 18, 24), "height is 18.*multiple of 4"),
        ((5, 16, 25), "width is 25"),
    ],
)
def test_sizes_that_do_not_fit(folders: dict[int, Path], sizes: tuple[int, int, int], said: str) -> None:
    vae = VideoVAE.load(folders[2], "cpu")
    with pytest.raises(ConfigError, match=said):
        vae.latent_shape(*sizes)
    if sizes[0]:
        with pytest.raises(ConfigError, match=said):
            vae.encode(torch.zeros(1, 3, *sizes))


def test_folders_that_hold_no_vae(folders: dict[int, Path], tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(folders[2], tmp_path / name))

    with pytest.raises(ConfigError, match="does not exist"):
        VideoVAE.load(tmp_path / "absent", "cpu")
    shutil.copytree(folders[2], tmp_path / "pipeline" / "autoencoder")
    with pytest.raises(ConfigError, match="did you mean its subfolder autoencoder"):
        VideoVAE.load(tmp_path / "pipeline", "cpu")
    weights = "diffusion_pytorch_model.safetensors"
    (copy("none") / weights).unlink()
    with pytest.raises(ConfigError, match="no \\*.safetensors"):
        VideoVAE.load(tmp_path / "none", "cpu")
    (copy("cut") / weights).write_bytes(b"broken")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        VideoVAE.load(tmp_path / "cut", "cpu")
    tensors = load_file(copy("part") / weights)
    tensors.pop("quant_conv.weight")
    save_file(tensors, tmp_path / "part" / weights, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weights are missing.*quant_conv\.weight"):
        VideoVAE.load(tmp_path / "part", "cpu")
    config = copy("other") / "config.json"
    config.write_text(config.read_text().replace("AutoencoderKLWan", "AutoencoderKL"))
    with pytest.raises(ConfigError, match="it must be AutoencoderKLWan"):
        VideoVAE.load(tmp_path / "other", "cpu")
    config = copy("short") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "latents_std": [1.0]}))
    with pytest.raises(ConfigError, match="latents_std has 1 values"):
        VideoVAE.load(tmp_path / "short", "cpu")
