"""Where a frozen model is found: in its folder, in a release, in the Hub's cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.tiny_models import make_tiny_text_encoder, make_tiny_tokenizer, make_tiny_vae

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.data.fingerprint import folder_hash
from megatron_flashi2v.encoders.folders import model_folder
from megatron_flashi2v.encoders.text import TextEncoder
from megatron_flashi2v.encoders.video_vae import VideoVAE, read_strides
from megatron_flashi2v.release.components import find_component

PARTS = {"VAE": "vae", "text encoder": "text_encoder", "tokenizer": "tokenizer"}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("release")
    make_tiny_vae(root / "vae")
    make_tiny_text_encoder(root / "text_encoder")
    make_tiny_tokenizer(root / "tokenizer")
    (root / "model_index.json").write_text("{}")
    return root


@pytest.mark.parametrize(("what", "name"), PARTS.items())
def test_a_release_gives_its_parts(release: Path, what: str, name: str) -> None:
    assert model_folder(release, what) == release / name == model_folder(release / name, what)
    assert folder_hash(release, what) == folder_hash(release / name, what)
    assert find_component(name, str(release)).folder == release / name


def test_models_are_loaded_from_a_release(release: Path) -> None:
    assert VideoVAE.load(release, "cpu").latent_channels == 4
    assert read_strides(release) == read_strides(release / "vae")
    assert TextEncoder.load(release, release, 6, "cpu").text_dim == 16


def test_a_folder_that_holds_the_model_itself_is_taken_as_it_is(release: Path, tmp_path: Path) -> None:
    """Also where it has a subfolder of the same name, or model and tokenizer lie together."""
    both = Path(shutil.copytree(release / "text_encoder", tmp_path / "both"))
    shutil.copytree(release / "tokenizer", both, dirs_exist_ok=True)
    shutil.copytree(release / "tokenizer", both / "tokenizer")
    assert model_folder(both, "text encoder") == model_folder(both, "tokenizer") == both
    with pytest.raises(ConfigError, match="no config.json in it"):
        VideoVAE.load(tmp_path, "cpu")


def test_a_hub_repository_that_cannot_be_reached_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"VAE Owner/Name:vae: there is no such folder, the Hugging Face Hub's cache"):
        VideoVAE.load("Owner/Name:vae", "cpu")
    for place in ("Owner/Name", "a/b/c:vae", "vae", "/a/b:vae"):  # a mistyped path is not looked for elsewhere
        with pytest.raises(ConfigError, match="does not exist"):
            VideoVAE.load(place, "cpu")
    for place, is_repository in (("Owner/Name", True), ("tests/Name", False), ("a/b/c", False)):
        with pytest.raises(ConfigError) as error:
            folder_hash(Path(place), "VAE")
        assert str(error.value).endswith(f"is given as {place}:SUBFOLDER") == is_repository


def test_a_hub_repository_is_read_from_the_cache(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laid out as the Hub's own client does."""
    snapshot = tmp_path / "models--Owner--Name" / "snapshots" / "0123"
    shutil.copytree(release, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert model_folder(Path("Owner/Name:vae"), "VAE") == snapshot / "vae"
    assert TextEncoder.load("Owner/Name:text_encoder", "Owner/Name:tokenizer", 6, "cpu").text_dim == 16
