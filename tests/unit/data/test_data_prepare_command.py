"""``flashi2v prepare`` as a user meets it: flags, recipes and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_models import make_tiny_text_encoder, make_tiny_tokenizer, make_tiny_vae, make_video

from megatron_flashi2v.cli.main import main
from megatron_flashi2v.config.clips import FilterSettings
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.prepare import PrepareConfig, check_prepare
from megatron_flashi2v.config.recipe import from_values
from megatron_flashi2v.data.prepared import PreparedDataset


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("command")
    make_tiny_vae(root / "vae")
    make_tiny_text_encoder(root / "text_encoder")
    make_tiny_tokenizer(root / "tokenizer")
    make_video(root / "v.mkv", 30, 40, 56)
    entries = [{"path": "v.mkv", "cap": "a dog", "cut": [n, n + 9]} for n in range(5)]
    (root / "meta.json").write_text(json.dumps([*entries, {"path": "gone.mp4", "cap": "x"}]))
    (root / "recipe.yaml").write_text(
        f"vae: {root}/vae\ntext_encoder: {root}/text_encoder\ntokenizer: {root}/tokenizer\n"
        "num_frames: 5\nheight: 16\nwidth: 24\nsamples_per_shard: 2\ntext_length: 6\ndevice: cpu\n"
    )
    return root


def test_recipe_and_flags(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    flags = ["--config", f"{world}/recipe.yaml", "--annotations", f"{world}/meta.json", "--output", f"{tmp_path}/out"]
    assert main(["prepare", *flags, "--samples-per-shard", "3"]) == 0
    shown = capsys.readouterr().out
    assert "kept" in shown and "dropped: missing_file" in shown
    data = PreparedDataset(tmp_path / "out")
    assert len(data) == 5 and data.settings["samples_per_shard"] == 3
    assert main(["prepare", *flags]) == 2  # the recipe's two samples per shard are other settings
    assert "samples_per_shard 3 there, 2 now" in capsys.readouterr().err
    assert main(["prepare", *flags, "--fresh"]) == 0
    (world / "none.json").write_text('[{"path": "gone.mp4", "cap": "x"}]')
    only = [*flags[:2], "--annotations", f"{world}/none.json", "--output", f"{tmp_path}/none"]
    assert main(["prepare", *only]) == 1
    assert "none of 1 annotations was kept (missing_file 1)" in capsys.readouterr().err


def test_help_and_bad_flags_answer_without_torch() -> None:
    code = (
        "import sys\n"
        "from megatron_flashi2v.cli.main import main\n"
        "try:\n"
        "    status = main(sys.argv[1:])\n"
        "except SystemExit as error:\n"
        "    status = error.code\n"
        "assert not {'torch', 'av', 'diffusers', 'transformers'} & set(sys.modules), 'heavy import'\n"
        "sys.exit(status)\n"
    )
    for arguments, status, said in (
        (["--help"], 0, "--samples-per-shard"),
        (["--num-framse", "5"], 2, "--num-frames"),
        (["--num-frames", "five"], 2, "five"),
        (["--num-frames", "0"], 2, "--num-frames is 0; it must be at least 1"),
        ([], 2, "--annotations, --vae, --text-encoder, --tokenizer, --output must be given"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, "prepare", *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == status, done.stderr
        assert said in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"height": 0}, "--height is 0"),
        ({"fps": 0.0}, "--fps is 0.0; it must be above 0"),
        ({"fps": float("nan")}, "--fps is nan"),
        ({"min_aspect": 2.0, "max_aspect": 1.0}, "--max-aspect is 1.0; it must be at least --min-aspect 2"),
        ({"min_pixels": -1}, "--min-pixels is -1"),
        ({"too_long_factor": 0.5}, "--too-long-factor is 0.5"),
        ({"min_motion": 0.6, "max_motion": 0.5}, "--max-motion"),
        ({"samples_per_shard": 0}, "--samples-per-shard is 0"),
    ],
)
def test_impossible_values(values: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_prepare(from_values(PrepareConfig, values))


def test_pixel_floor_follows_the_sample() -> None:
    assert FilterSettings(height=10, width=20).pixel_floor == 200
    assert FilterSettings(height=10, width=20, min_pixels=0).pixel_floor == 0
