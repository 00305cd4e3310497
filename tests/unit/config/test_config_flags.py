"""Whatever is wrong with a flag is one line that names it, its value and what it should be."""

from __future__ import annotations

import pytest
import tyro

from megatron_flashi2v.config.convert import ConvertConfig
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.flags import flag_types, parse_flags
from megatron_flashi2v.config.train import TrainConfig


def read(*flags: str) -> TrainConfig:
    return parse_flags(TrainConfig, flags, prog="flashi2v train", config=(tyro.conf.OmitArgPrefixes,))


@pytest.mark.parametrize("flags, words", [
    (["--micro-batch-sise", "2"], ["unknown flag --micro-batch-sise", "did you mean --micro-batch-size?"]),
    (["--micro_batch_sise=2"], ["unknown flag --micro_batch_sise", "did you mean --micro-batch-size?"]),
    (["--no-lr"], ["unknown flag --no-lr"]),
    (["--zzzzzz", "1"], ["unknown flag --zzzzzz"]),
    (["--lr", "fast"], ["--lr", "'fast'", "float"]),
    (["--save-interval", "1.5"], ["--save-interval", "'1.5'", "INT"]),
    (["--device", "tpu"], ["'tpu'", "--device", "'auto', 'cuda', 'npu', 'cpu'"]),
    (["--train-iters"], ["--train-iters", "Missing value"]),
    (["--bf16", "true"], ["unexpected 'true' after --bf16"]),
    (["--lr", "1", "x", "y"], ["unexpected 'x' after 1"]),
    (["recipe.yaml"], ["unexpected 'recipe.yaml'"]),
])
def test_bad_flag_is_one_line(flags: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as error:
        read(*flags)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert len(message) < 200 and not set("\n│╭─") & set(message)
    assert capsys.readouterr() == ("", "")


def test_good_flags_in_every_spelling() -> None:
    config = read("--micro_batch_size", "2", "--lr=-1e-3", "--no-bf16", "--sequence-parallel", "--save", "a b")
    assert (config.batch.micro_batch_size, config.optimizer.lr, str(config.checkpoint.save)) == (2, -1e-3, "a b")
    assert config.parallel.sequence_parallel


def test_help_is_printed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        read("--help")
    assert not stop.value.code and "--tensor-model-parallel-size" in capsys.readouterr().out


def test_flags_have_the_names_that_users_type() -> None:
    assert {"from", "to"} <= dict(flag_types(ConvertConfig)).keys()
    assert dict(flag_types(TrainConfig))["bf16"] is bool
