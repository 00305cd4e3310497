"""Every flag that the tables of Megatron-LM's and other trainers' flags name exists, and so do the values beside it."""

from __future__ import annotations

import re
import typing

import pytest

from megatron_flashi2v.config.convert import ConvertConfig
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.fields import flags_of
from megatron_flashi2v.config.megatron_flags import OTHER_TRAINERS, TABLES
from megatron_flashi2v.config.prepare import PrepareConfig
from megatron_flashi2v.config.recipe import FlagNames, parse
from megatron_flashi2v.config.train import TrainConfig

CONFIGS: dict[str, type[FlagNames]] = {"train": TrainConfig, "prepare": PrepareConfig, "convert": ConvertConfig}


@pytest.mark.parametrize("command, table", [*TABLES.items(), ("train", OTHER_TRAINERS)])
def test_replacements_exist(command: str, table: dict[str, str]) -> None:
    flags = {flag.spelling: flag for flag in flags_of(CONFIGS[command])}
    for name, text in table.items():
        assert f"--{name.replace('_', '-')}" not in flags, f"{name} is a flag here"
        named = re.findall(r"(--[a-z][\w-]*)((?:,? (?:or )?[a-z][\w-]*)*)", text)
        assert named or text.startswith(("leave it out", "the ", "set ", "it is")), text
        for flag, words in named:
            assert flag in flags or flag == "--config", f"{name}: {flag}"
            choices = typing.get_args(flags[flag].kind) if flag in flags else ()
            if choices and all(isinstance(choice, str) for choice in choices) and words:
                first = re.findall(r"[a-z][\w-]*", words)[0]
                assert first in choices, f"{name}: {flag} {first}"


@pytest.mark.parametrize("flag, words", [
    ("--finetune", "--load-weights megatron:PATH"),
    ("--exit-signal-handler", "always on"),
    ("--lr-warmup-fraction", "--lr-warmup-iters"),
    ("--train-samples", "--train-iters"),
    ("--use-flash-attn", "--attention-backend"),
    ("--use_flash_attn", "--attention-backend"),
    ("--ckpt-format", "one format"),
    ("--num-workers", "a thread reads ahead"),
    ("--no-load-optim", "--load-weights"),
    ("--tensorboard-log-interval", "metrics.jsonl"),
])  # fmt: skip
def test_a_flag_of_megatrons_says_what_it_is_here(flag: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(TrainConfig, [flag, "1"], prog="flashi2v train", description="")
    assert str(error.value).startswith(f"unknown flag {flag} (Megatron-LM's); ") and words in str(error.value)


@pytest.mark.parametrize("flag, words", [
    ("--epochs", "--train-iters counts iterations"),
    ("--network-dim", "--lora-rank"),
    ("--target-modules", "--lora-targets"),
    ("--batch-size", "--global-batch-size those of an update"),
    ("--learning-rate", "--lr"),
    ("--resume-from-checkpoint", "--load names others"),
])  # fmt: skip
def test_a_flag_of_another_trainer_says_what_it_is_here(flag: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(TrainConfig, [flag, "1"], prog="flashi2v train", description="")
    assert str(error.value).startswith(f"unknown flag {flag} (other trainers'); ") and words in str(error.value)


def test_a_recipes_key_of_another_trainer_is_explained_too(tmp_path) -> None:
    (tmp_path / "a.yaml").write_text("epochs: 3\n")
    with pytest.raises(ConfigError, match=r"unknown key 'epochs' \(other trainers'\); --train-iters"):
        parse(TrainConfig, ["--config", str(tmp_path / "a.yaml")], prog="flashi2v train", description="")


def test_each_command_has_its_own_table() -> None:
    with pytest.raises(ConfigError, match=r"--input \(Megatron-LM's\); --annotations$"):
        parse(PrepareConfig, ["--input", "a.json"], prog="flashi2v prepare", description="")
    with pytest.raises(ConfigError, match=r"--load-dir \(Megatron-LM's\); --from FORMAT PATH$"):
        parse(ConvertConfig, ["--load-dir", "a"], prog="flashi2v convert", description="")


def test_a_recipes_key_of_megatrons_is_explained_too(tmp_path) -> None:
    (tmp_path / "a.yaml").write_text("finetune: true\n")
    with pytest.raises(ConfigError, match=r"unknown key 'finetune' \(Megatron-LM's\); --load-weights"):
        parse(TrainConfig, ["--config", str(tmp_path / "a.yaml")], prog="flashi2v train", description="")
