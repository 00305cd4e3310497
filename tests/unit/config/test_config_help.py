"""``--help``: everyday flags first, every flag once, no noise, bounds in brief; and a reader that leaves early."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_flashi2v.cli.main import COMMANDS
from megatron_flashi2v.config.convert import ConvertConfig
from megatron_flashi2v.config.evaluate import EvaluateConfig
from megatron_flashi2v.config.fields import field_docstrings, flags_of, spelling
from megatron_flashi2v.config.help import help_text
from megatron_flashi2v.config.prepare import PrepareConfig
from megatron_flashi2v.config.recipe import FlagNames, parse
from megatron_flashi2v.config.sample import SampleConfig
from megatron_flashi2v.config.train import TrainConfig

CONFIGS = (TrainConfig, PrepareConfig, SampleConfig, ConvertConfig, EvaluateConfig)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.command)
def test_every_flag_once_and_the_everyday_ones_first(config: type[FlagNames], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = help_text(config, config.command, "A command.", {})
    shown = re.findall(r"^  (--[\w-]+)", text, flags=re.MULTILINE)
    assert sorted(shown) == sorted(["--config", *(flag.spelling for flag in flags_of(config))])
    assert len(config.everyday) == 7 and shown[:8] == [*map(spelling, config.everyday), "--config"]
    assert "None" not in text and "(default: " not in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.command)
def test_every_flag_is_explained(config: type[FlagNames]) -> None:
    assert [flag.name for flag in flags_of(config) if not flag.help] == []


def test_types_defaults_and_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = " ".join(help_text(TrainConfig, "flashi2v train", "", {"lr": 0.5}).split())
    for words in (
        "--lr NUMBER Peak learning rate. (default 0.5; at least 0)",
        "--micro-batch-size INT Samples in one forward pass of one replica. (default 1)",
        "--clip-grad-method {norm,adaptive,adaptive-npu} ",
        "--data-path PATH ... ",
        "--adam-beta1 NUMBER First moment's decay. (default 0.9; at least 0 and below 1)",
        "--load-weights FORMAT:PATH ",
        "--bf16 Compute",
    ):
        assert words in text, words


def test_docstrings_are_read_from_the_class_that_has_them() -> None:
    assert field_docstrings(SampleConfig)["tokenizer"] == "Folder of the text encoder's tokenizer, likewise."
    assert "command" not in field_docstrings(SampleConfig)


def test_help_shows_the_recipes_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("train_iters: 77\n")
    with pytest.raises(SystemExit) as stop:
        parse(TrainConfig, ["--config", str(tmp_path / "a.yaml"), "--help"], prog="flashi2v train", description="")
    assert stop.value.code == 0 and "(default 77)" in capsys.readouterr().out


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=lambda words: " ".join(words) or "all")
def test_help_is_quick_and_survives_a_reader_that_leaves(command: list[str]) -> None:
    code = (
        "import sys\n"
        "from megatron_flashi2v.cli.main import main\n"
        "try:\n"
        "    status = main(sys.argv[1:])\n"
        "except SystemExit as error:\n"
        "    status = error.code\n"
        "heavy = {'torch', 'tyro', 'numpy', 'av', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(status)\n"
    )
    reader, writer = os.pipe()
    os.close(reader)  # the first write already fails
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *command, "--help"], stdout=writer, stderr=subprocess.PIPE,
                          text=True, check=False)  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    os.close(writer)
    assert done.returncode == 0 and done.stderr == ""
    if not command:
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3
