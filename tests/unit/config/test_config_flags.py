"""Whatever is wrong with a flag is one line that names it, its value and what it should be."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_flashi2v.config.convert import ConvertConfig
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.evaluate import EvaluateConfig
from megatron_flashi2v.config.fields import flags_of
from megatron_flashi2v.config.prepare import PrepareConfig
from megatron_flashi2v.config.recipe import from_values, parse
from megatron_flashi2v.config.sample import SampleConfig
from megatron_flashi2v.config.train import TrainConfig

FILES = ["--vae", "v", "--text-encoder", "t", "--tokenizer", "t", "--prompt", "p", "--load", "r"]


def read(*flags: str) -> TrainConfig:
    return parse(TrainConfig, flags, prog="flashi2v train", description="")


def sample(*flags: str) -> SampleConfig:
    return parse(SampleConfig, [*FILES, *flags], prog="flashi2v sample", description="")


@pytest.mark.parametrize("flags, words", [
    (["--micro-batch-sise", "2"], ["unknown flag --micro-batch-sise", "did you mean --micro-batch-size?"]),
    (["--micro_batch_sise=2"], ["unknown flag --micro_batch_sise", "did you mean --micro-batch-size?"]),
    (["--confg", "a.yaml"], ["unknown flag --confg", "did you mean --config?"]),
    (["--no-lr"], ["unknown flag --no-lr"]),
    (["--zzzzzz", "1"], ["unknown flag --zzzzzz"]),
    (["--lr", "fast"], ["--lr is 'fast'; it must be a number (see"]),
    (["--train-iters", "1e3"], ["--train-iters is '1e3'; it must be a whole number (see"]),
    (["--save-interval", "1.5"], ["--save-interval is '1.5'; it must be a whole number (see"]),
    (["--device", "tpu"], ["'tpu'", "--device", "'auto', 'cuda', 'npu', 'cpu'"]),
    (["--train-iters"], ["--train-iters: a value is missing; give --train-iters INT"]),
    (["--save", "--lr", "1"], ["--save: a value is missing; give --save PATH"]),
    (["--bf16", "true"], ["unexpected 'true' after --bf16"]),
    (["--lr", "1", "x", "y"], ["unexpected 'x' after --lr 1"]),
    (["--lr=1", "x"], ["unexpected 'x' after --lr=1"]),
    (["recipe.yaml"], ["unexpected 'recipe.yaml'", "--config recipe.yaml"]),
    (["--seed", "1", "2", "--train-iters", "2"], ["unexpected '2' after --seed 1"]),
    (["--train-iters", "2", "--seed", "1", "2"], ["unexpected '2' after --seed 1"]),
    (["--lr", "1", "--lr", "x"], ["--lr", "'x'"]),
])
def test_bad_flag_is_one_line(flags: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as error:
        read(*flags)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert len(message) < 200 and not set("\n│╭─") & set(message)
    assert capsys.readouterr() == ("", "")


def test_a_word_too_many_is_blamed_on_the_flag_before_it() -> None:
    with pytest.raises(ConfigError, match=r"unexpected '2' after --seed 1 "):
        sample("--num-steps", "2", "--output", "a.mp4", "--seed", "1", "2")
    with pytest.raises(ConfigError, match=r"unexpected 'c' after --from wan b "):
        parse(ConvertConfig, ["--from", "wan", "b", "c", "--to", "wan", "c"], prog="convert", description="")


@pytest.mark.parametrize("flag", ["--num-workerz", "--ckpt-fromat", "--batch", "--stage", "--hidden"])
def test_a_far_name_is_not_suggested(flag: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(flag, "1")
    assert str(error.value) == f"unknown flag {flag} (see flashi2v train --help)"


def test_good_flags_in_every_spelling() -> None:
    config = read("--micro_batch_size", "2", "--lr=1e-3", "--no-bf16", "--sequence-parallel", "--save", "a b")
    assert (config.batch.micro_batch_size, config.optimizer.lr, str(config.checkpoint.save)) == (2, 1e-3, "a b")
    assert config.parallel.sequence_parallel
    assert read("--sigma-shift", "3", "--sigma-shift", "None").data.sigma_shift is None  # takes a recipe's back
    assert read("--image-noise-log-mean", "-1.5").data.image_noise_log_mean == -1.5
    assert read("--data-path", "0.7", "a", "0.3", "b").data.data_path == ("0.7", "a", "0.3", "b")
    assert sample("--output=a.mp4", "--negative-prompt=", "--prompt=--no rain").prompt == "--no rain"
    assert sample("--output=a.mp4", "--negative-prompt=").negative_prompt == ""


def test_an_empty_path_is_no_working_directory() -> None:
    for words in (["--save", ""], ["--save="], ["--load", "a", "--save", "", "--lr", "1"]):
        with pytest.raises(ConfigError, match="^--save is empty; it must be a path"):
            read(*words)
    with pytest.raises(ConfigError, match="^--save is empty; it must be a path"):
        from_values(TrainConfig, {"save": ""})
    with pytest.raises(ConfigError, match="^--to is empty"):
        parse(ConvertConfig, ["--from", "wan", "a", "--to", "wan", ""], prog="", description="")
    for flag, value in (("--data-path", ""), ("--load-weights", "wan:")):
        with pytest.raises(ConfigError, match=f"^{flag} is '{value}'; it must be a path that is not empty"):
            read(flag, value)


def test_what_must_be_given_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^--from, --to must be given \(see flashi2v convert --help\)$"):
        parse(ConvertConfig, [], prog="flashi2v convert", description="")


def test_home_is_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = read("--save", "~/x", "--data-path", "0.5", "~/a", "0.5", "b~", "--load-weights", "megatron:~/w")
    assert config.checkpoint.save == Path("/home/me/x")
    assert config.data.data_path == ("0.5", "/home/me/a", "0.5", "b~")
    assert config.checkpoint.load_weights_source == ("megatron", Path("/home/me/w"))
    words = ["--from", "wan", "~/w", "--to", "diffusers", "~/d", "--vae", "OWNER/NAME:~x"]
    convert = parse(ConvertConfig, words, prog="", description="")
    assert (convert.source[1], convert.target[1], convert.vae) == (Path("/home/me/w"), Path("/home/me/d"),
                                                                  "OWNER/NAME:~x")


def test_flags_are_flat_and_have_the_names_that_users_type() -> None:
    for config in (TrainConfig, PrepareConfig, SampleConfig, ConvertConfig, EvaluateConfig):
        names = [flag.name for flag in flags_of(config)]
        assert len(set(names)) == len(names) and "config" not in names
    assert {"from", "to"} <= {flag.name for flag in flags_of(ConvertConfig)}
    assert {flag.name: flag for flag in flags_of(TrainConfig)}["bf16"].kind is bool


def test_sampling_takes_the_layout_of_one_replica_and_no_more_of_training() -> None:
    config = sample("--output", "a.mp4", "--tensor-model-parallel-size", "2", "--sequence-parallel")
    assert config.parallel.tensor_model_parallel_size == 2 and config.parallel.sequence_parallel
    with pytest.raises(ConfigError, match="unknown flag --use-distributed-optimizer"):
        sample("--output", "a.mp4", "--use-distributed-optimizer")
