"""Every layout, batch and length that cannot work is refused, naming the flag and the nearest valid choice."""

from __future__ import annotations

import pytest

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.layout import ring_degree, stage_layer_counts, ulysses_degree
from megatron_flashi2v.config.recipe import parse
from megatron_flashi2v.config.rules import check_tokens, check_train, hang_timeout_s, num_microbatches
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.models.presets import resolve_model

VIRTUAL = ["--num-virtual-stages-per-pipeline-rank", "2"]
CP, ALGO, DEGREE = "--context-parallel-size", "--context-parallel-algo", "--ulysses-degree"
USP = (ALGO, "usp")
STRATEGY, INSTANCES = "--data-parallel-sharding-strategy", "--num-distributed-optimizer-instances"
BESIDE = ("--load-weights", "wan:weights")
UNIT = "--suggested-communication-unit-size"


def check(*argv: str, world: int = 1) -> TrainConfig:
    config = parse(TrainConfig, argv, prog="test", description="")
    check_train(config, resolve_model(config.model), world)
    return config


@pytest.mark.parametrize("argv, world, words", [
    (["--tensor-model-parallel-size", "3"], 3, ["--tensor-model-parallel-size 3", "num_attention_heads 8", "choose 2"]),
    (["--pipeline-model-parallel-size", "5"], 5, ["5 stages of num_layers 4", "choose at most 4"]),
    ([*VIRTUAL, "--pipeline-model-parallel-size", "3"], 3,
     ["6 stages of num_layers 4", "choose 2 pipeline ranks, or leave"]),
    (VIRTUAL, 1, ["--pipeline-model-parallel-size is 1", "leave it out, or choose 2 pipeline"]),
    ([*VIRTUAL, "--pipeline-model-parallel-size", "2", "--global-batch-size", "2"], 4,
     ["at least as many microbatches", "choose at least 4"]),
    (["--pipeline-model-parallel-size", "2", "--pipeline-layer-split", "1,1,2"], 2,
     ["names 3 stages", "has 2", "such as 2,2"]),
    (["--pipeline-model-parallel-size", "2", "--pipeline-layer-split", "1,2"], 2, ["adds up to 3", "the model has 4"]),
    (["--pipeline-model-parallel-size", "2", "--pipeline-layer-split", "4,0"], 2, ["needs at least 1"]),
    (["--pipeline-model-parallel-size", "2", "--pipeline-layer-split", "a,b"], 2, ["whole numbers", "such as 2,2"]),
    (["--recompute-granularity", "selective", "--recompute-num-layers", "2"], 1,
     ["--recompute-num-layers 2 belongs to", "leave --recompute-num-layers out"]),
    (["--recompute-num-layers", "2"], 1, ["--recompute-num-layers 2", "granularity full, which is not given; add it"]),
    (["--recompute-method", "block"], 1, ["--recompute-method block", "granularity full, which is not given; add it"]),
    (["--recompute-granularity", "skip_attention", "--recompute-method", "block"], 1,
     ["--recompute-method block", "skip_attention covers every block"]),
    (["--tensor-model-parallel-size", "2"], 3, ["3 processes", "multiple of 2"]),
    (["--global-batch-size", "3"], 2, ["--global-batch-size 3", "2 data-parallel", "choose 4"]),
    (["--global-batch-size", "4", "--micro-batch-size", "3"], 1, ["--global-batch-size 4", "choose 3"]),
    (["--tensor-model-parallel-size", "8", "--sequence-parallel", "--text-length", "36"], 8,
     ["text_length 36", "--tensor-model-parallel-size 8", "choose 4"]),
    ([CP, "3"], 3, ["ulysses divides the 8 heads", f"{CP} 3", "choose 2", "ring", f"{DEGREE} 1"]),
    ([CP, "6", "--tensor-model-parallel-size", "2"], 12, ["the 4 heads", f"{CP} 6", "choose 4", f"{DEGREE} 2"]),
    ([CP, "4", *USP], 4, ["usp needs --ulysses-degree", "choose 4"]),
    ([CP, "6", *USP, DEGREE, "3"], 6, [f"{DEGREE} 3", f"{CP} 6", "8 heads", "choose 2"]),
    ([CP, "6", *USP, DEGREE, "4"], 6, [f"{DEGREE} 4", f"{CP} 6", "8 heads", "choose 2"]),
    ([CP, "4", *USP, DEGREE, "0"], 4, [f"{DEGREE} is 0; it must be at least 1"]),
    ([CP, "4", ALGO, "ring", DEGREE, "2"], 4, [f"{DEGREE} 2 belongs to {ALGO} usp, not to ring"]),
    (["--fp8-format", "hybrid"], 1, ["--fp8-format hybrid", "--transformer-impl transformer_engine and --bf16"]),
    (["--fp8-format", "e4m3", "--bf16", "--transformer-impl", "transformer_engine", "--recompute-granularity", "full"],
     1, ["--fp8-format e4m3", "--recompute-granularity full", "leave one"]),
    (["--hccl-buffer-sizes", "tq:200"], 1, ["--hccl-buffer-sizes tq:200", "no group 'tq'"]),
    (["--train-iters", "0"], 1, ["--train-iters is 0", "at least 1"]),
    (["--sigma-min", "0.9", "--sigma-max", "0.9"], 1, ["--sigma-min 0.9 must be below --sigma-max 0.9"]),
    (["--sigma-min", "0.9", "--sigma-logit-std", "0"], 1, ["--sigma-logit-std 0 draws one noise level"]),
    (["--sigma-max", "0.9", "--save", "r", "--valid-data-path", "v", "--sample-interval", "5"], 1,
     ["--sample-interval 5 samples from pure noise to none", "--sigma-max 0.9"]),
    (["--cutoff-ratio-min", "0.9", "--cutoff-ratio-max", "0.1"], 1,
     ["--cutoff-ratio-min 0.9 must be at most --cutoff-ratio-max 0.1"]),
    (["--image-noise-log-mean", "nan"], 1, ["--image-noise-log-mean is nan"]),
    (["--image-noise-log-std", "-1"], 1, ["--image-noise-log-std is -1.0"]),
    (["--min-lr", "1.0"], 1, ["--min-lr 1.0"]),
    (["--optimizer", "sgd", "--use-distributed-optimizer"], 1, ["requires --optimizer adam"]),
    (["--optimizer", "sgd", STRATEGY, "optim_grads"], 1, [f"{STRATEGY} optim_grads", "requires --optimizer adam"]),
    ([STRATEGY, "optim_grads_params", "--pipeline-model-parallel-size", "2"], 2,
     [f"{STRATEGY} optim_grads_params cannot", "--pipeline-model-parallel-size 2", "all ranks", f"{STRATEGY} optim"]),
    ([STRATEGY, "optim_grads", "--transformer-impl", "transformer_engine"], 1, ["optim_grads has not been tried"]),
    ([STRATEGY, "optim_grads", "--use-mindspeed", "--device", "npu"], 1, ["not been tried with --use-mindspeed"]),
    ([INSTANCES, "2"], 2, [f"{INSTANCES} 2", f"add {STRATEGY} optim"]),
    ([INSTANCES, "4", STRATEGY, "optim", "--global-batch-size", "6"], 6, [f"{INSTANCES} 4", "6 ranks", "choose 3"]),
    ([UNIT, "9", STRATEGY, "optim"], 1, [f"{UNIT} 9 belongs to {STRATEGY} optim_grads", "not to optim"]),
    ([UNIT, "0"], 1, [f"{UNIT} is 0; it must be at least 1"]),
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
    (["--use-mindspeed"], 1, ["--use-mindspeed", "--device is auto", "add --device npu"]),
    (["--model", "2b"], 1, ["--model 2b", "tiny, 130m", "1.3b, 3b, 7b, 14b"]),
    (["--hidden-size", "100"], 1, ["hidden_size 100", "num_attention_heads 8"]),
    (["--lora-alpha", "8"], 1, ["--lora-alpha 8.0 belongs to --lora-rank"]),
    (["--lora-targets", "q", "ffn"], 1, ["--lora-targets q ffn belongs to --lora-rank"]),
    (["--lora-rank", "4"], 1, ["--lora-rank 4 needs the weights that stay frozen", "--load-weights FORMAT:PATH"]),
    (["--train-only", "phi"], 1, ["--train-only needs the weights that stay frozen"]),
    ([*BESIDE, "--lora-rank", "4", STRATEGY, "optim_grads"], 1, ["--lora-rank 4", f"choose {STRATEGY} optim"]),
    ([*BESIDE, "--train-only", "phi", "--bf16", "--transformer-impl", "transformer_engine", "--fp8-format", "hybrid"],
     1, ["--train-only needs megatron-core's own linears; leave out --transformer-impl transformer_engine and --fp8"]),
    ([*BESIDE, "--train-only", "(phi"], 1, ["--train-only '(phi' is no regular expression"]),
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


@pytest.mark.parametrize("argv, layers, counts", [
    (["--pipeline-model-parallel-size", "2"], 40, (20, 20)),
    (["--pipeline-model-parallel-size", "3"], 4, (1, 2, 1)),
    (["--pipeline-model-parallel-size", "4"], 30, (7, 8, 8, 7)),
    (["--pipeline-model-parallel-size", "4"], 31, (7, 8, 8, 8)),
    (["--pipeline-model-parallel-size", "2"], 5, (2, 3)),
    (["--pipeline-model-parallel-size", "2", *VIRTUAL], 6, (1, 2, 2, 1)),
    (["--pipeline-model-parallel-size", "2", "--pipeline-layer-split", "3,1"], 4, (3, 1)),
])
def test_blocks_of_every_stage(argv: list[str], layers: int, counts: tuple[int, ...]) -> None:
    config = parse(TrainConfig, argv, prog="test", description="")
    assert stage_layer_counts(config.parallel, layers) == counts


@pytest.mark.parametrize("flags, ulysses, ring", [
    ((), 1, 1),
    ((CP, "4"), 4, 1),
    ((CP, "3", ALGO, "ring"), 1, 3),
    ((CP, "6", *USP, DEGREE, "2"), 2, 3),
    ((CP, "8", *USP, DEGREE, "8"), 8, 1),
])
def test_degrees_of_context_parallelism(flags: tuple[str, ...], ulysses: int, ring: int) -> None:
    parallel = check(*flags, world=ulysses * ring).parallel
    assert (ulysses_degree(parallel), ring_degree(parallel)) == (ulysses, ring)


def test_latents_must_divide_into_patches() -> None:
    model = resolve_model(parse(TrainConfig, [], prog="t", description="").model)
    check_tokens(model, (3, 6, 12))
    with pytest.raises(ConfigError, match="do not divide into patches"):
        check_tokens(model, (3, 7, 12))


@pytest.mark.parametrize(("minutes", "world", "seconds"), [("60", 8, 600), ("10", 8, 120), ("60", 1, 0)])
def test_a_hang_is_told_before_collectives_fail(minutes: str, world: int, seconds: float) -> None:
    config = check("--distributed-timeout-minutes", minutes, "--global-batch-size", "8", world=world)
    assert hang_timeout_s(config, world) == seconds


def test_a_hang_timeout_that_collectives_do_not_wait_for() -> None:
    flags = ("--hang-timeout-s", "900", "--global-batch-size", "2")
    with pytest.raises(ConfigError, match="--hang-timeout-s is 900; it must be at most 720, .* set that to 75 or more"):
        check(*flags, world=2)
    check(*flags)
    check(*flags, "--distributed-timeout-minutes", "75", world=2)
