"""Every layout, batch and length that cannot work is refused, naming the flag and the nearest valid choice."""

from __future__ import annotations

import pytest

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.recipe import parse
from megatron_flashi2v.config.rules import check_tokens, check_train, num_microbatches
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.models.presets import resolve_model


def check(*argv: str, world: int = 1) -> TrainConfig:
    config = parse(TrainConfig, argv, prog="test", description="")
    check_train(config, resolve_model(config.model), world)
    return config


@pytest.mark.parametrize("argv, world, words", [
    (["--tensor-model-parallel-size", "3"], 3, ["--tensor-model-parallel-size 3", "num_attention_heads 8", "choose 2"]),
    (["--pipeline-model-parallel-size", "3"], 3, ["--pipeline-model-parallel-size 3", "num_layers 4", "choose 2"]),
    (["--tensor-model-parallel-size", "2"], 3, ["3 processes", "multiple of 2"]),
    (["--global-batch-size", "3"], 2, ["--global-batch-size 3", "2 data-parallel", "choose 4"]),
    (["--global-batch-size", "4", "--micro-batch-size", "3"], 1, ["--global-batch-size 4", "choose 3"]),
    (["--context-parallel-size", "2"], 2, ["--context-parallel-size", "not available yet"]),
    (["--train-iters", "0"], 1, ["--train-iters is 0", "at least 1"]),
    (["--cutoff-ratio-min", "0.9", "--cutoff-ratio-max", "0.1"], 1, ["--cutoff-ratio-min 0.9"]),
    (["--image-noise-log-mean", "nan"], 1, ["--image-noise-log-mean is nan"]),
    (["--image-noise-log-std", "-1"], 1, ["--image-noise-log-std is -1.0"]),
    (["--min-lr", "1.0"], 1, ["--min-lr 1.0"]),
    (["--optimizer", "sgd", "--use-distributed-optimizer"], 1, ["adam only"]),
    (["--sigma-shift", "0"], 1, ["--sigma-shift is 0"]),
    (["--adam-beta1", "2"], 1, ["--adam-beta1 is 2"]),
    (["--clip-grad", "-1"], 1, ["--clip-grad is -1"]),
    (["--clip-grad", "0", "--clip-grad-method", "adaptive"], 1, ["--clip-grad is 0", "method adaptive starts from it"]),
    (["--clip-grad-rules", "reference"], 1, ["--clip-grad-rules reference", "adaptive-npu, not to norm"]),
    (["--clip-grad-ema-decay", "1"], 1, ["--clip-grad-ema-decay is 1"]),
    (["--clip-grad-extreme-norm", "0"], 1, ["--clip-grad-extreme-norm is 0"]),
    (["--lr", "-1"], 1, ["--lr is -1.0; it must be at least 0"]),
    (["--lr", "inf"], 1, ["--lr is inf; it must be a finite number"]),
    (["--sigma-shift", "nan"], 1, ["--sigma-shift is nan; it must be a finite number"]),
    (["--distributed-timeout-minutes", "0"], 1, ["--distributed-timeout-minutes is 0"]),
    (["--overlap-param-gather"], 1, ["--use-distributed-optimizer"]),
    (["--lr-warmup-iters", "200"], 1, ["--lr-warmup-iters is 200"]),
    (["--model", "2b"], 1, ["--model 2b", "tiny, 130m", "1.3b, 3b, 7b, 14b"]),
    (["--hidden-size", "100"], 1, ["hidden_size 100", "num_attention_heads 8"]),
])
def test_refused(argv: list[str], world: int, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check(*argv, world=world)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert error.value.exit_code == 2


def test_accepted_layout_and_its_microbatches() -> None:
    config = check("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2",
                   "--global-batch-size", "24", "--micro-batch-size", "2", world=8)
    assert num_microbatches(config, 8) == 6


def test_tokens_must_divide_into_patches_and_over_sequence_parallel_ranks() -> None:
    config = parse(TrainConfig, ["--tensor-model-parallel-size", "4", "--sequence-parallel"], prog="t", description="")
    model = resolve_model(config.model)
    check_tokens(model, config.parallel, (3, 8, 12))
    with pytest.raises(ConfigError, match="do not divide into patches"):
        check_tokens(model, config.parallel, (3, 7, 12))
    with pytest.raises(ConfigError, match="54 visual tokens .* choose 3"):
        check_tokens(model, config.parallel, (3, 6, 12))
