"""The commands of examples/README.md, as they stand: each is understood, and each takes what the one before it made."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron_flashi2v import ConvertConfig, PrepareConfig, TrainConfig
from megatron_flashi2v.config.prepare import check_prepare
from megatron_flashi2v.config.recipe import parse
from megatron_flashi2v.config.sample import SampleConfig

ROOT = Path(__file__).parents[3]
CONFIGS: dict[str, Any] = {
    "prepare": PrepareConfig, "train": TrainConfig, "sample": SampleConfig, "convert": ConvertConfig,
}


def parsed_commands(block: str) -> dict[str, Any]:
    """Configurations of a block's commands, whose flags all exist."""
    lines = [shlex.split(line, comments=True) for line in block.replace("\\\n", "").splitlines()]
    parsed = {}
    for words in filter(None, lines):
        if words[0] in ("hf", "sbatch"):
            continue
        place = next(place for place, word in enumerate(words) if word in CONFIGS)
        assert words[:place] in (["flashi2v"], ["flashi2v", "torchrun", "--nproc-per-node", "8"])
        command, *flags = words[place:]
        parsed[command] = parse(CONFIGS[command], flags, prog=command, description="")
    return parsed


def test_the_worked_example_fits_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    block, at_14b = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "examples" / "README.md").read_text(), re.M | re.S)
    assert [*parsed_commands(at_14b)] == ["sample", "convert"]
    parsed = parsed_commands(block)
    assert list(parsed) == list(CONFIGS)
    check_prepare(parsed["prepare"])
    train, sample, convert = parsed["train"], parsed["sample"], parsed["convert"]
    assert [str(parsed["prepare"].output)] == list(train.data.data_path)
    assert train.checkpoint.save == sample.load == convert.source[1]
    assert (train.model.model, sample.weights, convert.weights, convert.verify) == ("1.3b", "ema", "ema", True)
    assert train.model.conditioning == "flashi2v"
    assert str(train.checkpoint.load_weights).startswith("diffusers:weights/wan/")
