"""Text rows: those of diffusers' Wan pipeline, at their real length."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_tiny_text_encoder, make_tiny_tokenizer
from safetensors.torch import load_file, save_file

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.encoders.text import TextEncoder
from megatron_flashi2v.runtime.logging import logging_to_stderr

PROMPTS = ["", "a dog runs", "a red car drives through the street in the blue street the the the the", "zebra"]
LENGTH = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("text")
    return make_tiny_text_encoder(root / "text_encoder"), make_tiny_tokenizer(root / "tokenizer")


def test_rows_are_those_of_diffusers_pipeline(folders: tuple[Path, Path]) -> None:
    from diffusers import WanPipeline
    from transformers import AutoTokenizer, UMT5EncoderModel

    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(str(folders[1])),
        text_encoder=UMT5EncoderModel.from_pretrained(str(folders[0])).eval(),
        vae=None,
        scheduler=None,
    )
    with torch.no_grad():
        wanted_BLD = pipeline._get_t5_prompt_embeds(
            PROMPTS, max_sequence_length=LENGTH, device=torch.device("cpu"), dtype=torch.float32
        )
    rows = TextEncoder.load(*folders, LENGTH, "cpu").encode(PROMPTS)
    assert [len(rows_LD) for rows_LD in rows] == [1, 4, LENGTH, 2]
    for rows_LD, wanted_LD in zip(rows, wanted_BLD, strict=True):
        padded_LD = torch.nn.functional.pad(rows_LD, (0, 0, 0, LENGTH - len(rows_LD)))
        torch.testing.assert_close(padded_LD, wanted_LD, atol=1e-5, rtol=1e-5)


def test_a_prompt_longer_than_the_rows_is_told_once(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = TextEncoder.load(*folders, LENGTH, "cpu")
    capsys.readouterr()
    with logging_to_stderr():
        encoder.encode(PROMPTS[:2] + PROMPTS[3:])
        assert capsys.readouterr().err == ""
        encoder.encode([PROMPTS[2], PROMPTS[2] + " the"])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"longer than the model's {LENGTH} text rows" in said and "'a red car" in said


def test_rows_do_not_depend_on_company(folders: tuple[Path, Path]) -> None:
    encoder = TextEncoder.load(*folders, LENGTH, "cpu")
    together = encoder.encode(PROMPTS)
    assert all(torch.equal(encoder.encode([prompt])[0], rows) for prompt, rows in zip(PROMPTS, together, strict=True))
    assert not torch.equal(together[1][:2], together[3])


def test_dtype_and_settings(folders: tuple[Path, Path]) -> None:
    encoder = TextEncoder.load(*folders, LENGTH, "cpu", torch.bfloat16)
    assert encoder.text_dim == 16
    assert encoder.encode(["a dog"])[0].dtype == torch.bfloat16
    assert json.loads(json.dumps(encoder.settings))["dtype"] == "bfloat16"


def test_folders_that_do_not_fit(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, tokenizer = folders
    with pytest.raises(ConfigError, match="does not exist"):
        TextEncoder.load(tmp_path / "absent", tokenizer, LENGTH, "cpu")
    with pytest.raises(ConfigError, match="tokenizer folder .* does not exist"):
        TextEncoder.load(model, tmp_path / "absent", LENGTH, "cpu")
    with pytest.raises(ConfigError, match="no tokenizer"):
        TextEncoder.load(model, model, LENGTH, "cpu")
    small = make_tiny_text_encoder(tmp_path / "small", vocab_size=8)
    with pytest.raises(ConfigError, match="vocab_size is 8"):
        TextEncoder.load(small, tokenizer, LENGTH, "cpu")
    with pytest.raises(ConfigError, match="text_length is 0"):
        TextEncoder.load(model, tokenizer, 0, "cpu")
    other = Path(shutil.copytree(model, tmp_path / "other"))
    (other / "config.json").write_text((other / "config.json").read_text().replace('"umt5"', '"t5"'))
    with pytest.raises(ConfigError, match="it must be umt5"):
        TextEncoder.load(other, tokenizer, LENGTH, "cpu")
    part = Path(shutil.copytree(model, tmp_path / "part"))
    tensors = load_file(part / "model.safetensors")
    tensors.pop("encoder.block.1.layer.0.SelfAttention.q.weight")
    save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"weights are missing.*SelfAttention\.q"):
        TextEncoder.load(part, tokenizer, LENGTH, "cpu")


def test_a_tokenizer_without_an_end_token_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folders[1], tmp_path / "tokenizer"))
    values = json.loads((broken / "tokenizer.json").read_text())
    values["post_processor"] = None
    (broken / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="no end token"):
        TextEncoder.load(folders[0], broken, LENGTH, "cpu")


def test_truncated_weights_are_one_error_that_names_the_folder(tmp_path: Path) -> None:
    make_tiny_text_encoder(tmp_path / "text_encoder")
    make_tiny_tokenizer(tmp_path / "tokenizer")
    weights = next((tmp_path / "text_encoder").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="text_encoder: cannot be loaded"):
        TextEncoder.load(tmp_path / "text_encoder", tmp_path / "tokenizer", 8, torch.device("cpu"))
