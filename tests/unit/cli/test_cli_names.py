"""Names that no file can have are refused by every command, before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_flashi2v.cli.main import main

LONG = "n" * 256
MODELS = ("--vae", "v", "--text-encoder", "t", "--tokenizer", "k")

COMMANDS = {
    "sample": ("sample", "--load", "r", *MODELS, "--prompt", "a", "--output", f"{LONG}.mp4"),
    "sample's latents": ("sample", "--load", "r", *MODELS, "--prompt", "a", "--output", "a.mp4",
                         "--latents", f"{LONG}.safetensors"),
    "sample's image": ("sample", "--load", "r", *MODELS, "--prompt", "a", "--output", "a.mp4", "--image", LONG),
    "train": ("train", "--model", "tiny", "--data-path", "d", "--save", f"runs/{LONG}/a"),
    "train's weights": ("train", "--model", "tiny", "--data-path", "d", "--load-weights", f"wan:{LONG}"),
    "prepare": ("prepare", "--annotations", "a.json", *MODELS, "--output", LONG),
    "convert": ("convert", "--from", "wan", "a", "--to", "diffusers", LONG),
    "convert's report": ("convert", "--from", "wan", "a", "--to", "wan", "b", "--report", f"{LONG}.json"),
    "convert's part": ("convert", "--from", "wan", "a", "--to", "diffusers", "b", "--vae", LONG),
    "evaluate": ("evaluate", "--videos", "v", "--references", "r", "--output", LONG),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_that_no_file_can_have(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(list(COMMANDS[command])) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "each name in it of at most 255" in lines[0], lines
    assert list(tmp_path.iterdir()) == []
