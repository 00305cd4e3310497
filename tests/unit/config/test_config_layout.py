"""Whatever layout is refused, what the error suggests is accepted."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.layout import check_layout, model_ranks
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.rules import check_train
from megatron_flashi2v.config.train import BatchArguments, ParallelArguments, TrainConfig
from megatron_flashi2v.models.presets import PRESETS

TENSOR, PIPELINE, CONTEXT = (f"{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "context"))
VIRTUAL, SPLIT, ALGO, DEGREE = (
    "num_virtual_stages_per_pipeline_rank", "pipeline_layer_split", "context_parallel_algo", "ulysses_degree"
)
GLOBAL = "global_batch_size"
CURES = {
    r"^--tensor-model-parallel-size \d+ must divide .*; choose (\d+)": TENSOR,
    r"^--sequence-parallel shards .*; choose (\d+), or leave": TENSOR,
    r"or leave --(sequence-parallel) out": "sequence_parallel",
    r"choose at most (\d+) pipeline ranks": PIPELINE,
    r"choose (?:2 to )?(\d+) pipeline ranks": PIPELINE,
    r"choose (2) (?:to \d+ )?pipeline ranks": PIPELINE,
    r"choose (?:2 to )?(\d+) virtual stages": VIRTUAL,
    r"choose (2) (?:to \d+ )?virtual stages": VIRTUAL,
    r"^--(num-virtual)-.* is 1; leave it out": VIRTUAL,
    r"leave --(num-virtual)-stages-per-pipeline-rank out$": VIRTUAL,
    r"leave --num-virtual-stages-per-pipeline-rank out with at most (\d+)": f"{VIRTUAL} {PIPELINE}",
    r"such as ([\d,]+)$": SPLIT,
    r"^--context-parallel-algo ulysses .*; choose (\d+)": CONTEXT,
    r"or --context-parallel-algo (ring)": ALGO,
    r"or usp with --ulysses-degree (\d+)": f"{ALGO} {DEGREE}",
    r"^--context-parallel-algo usp needs .*; choose (\d+)": DEGREE,
    r"^--ulysses-degree \d+ must divide .*; choose (\d+)": DEGREE,
    r"^--ulysses-degree \d+ (belongs) to .* leave it out": DEGREE,
    r"^--ulysses-degree \d+ belongs to .* or choose (usp)": ALGO,
    r"--global-batch-size \d+ must be a multiple of .*; choose (\d+)": GLOBAL,
    r"the interleaved schedule .* choose at least (\d+)": GLOBAL,
}
"""What an error can suggest, and the fields that it would have the user set."""


def cures(message: str) -> Iterator[dict[str, Any]]:
    """Every change that the error suggests, as fields and their values."""
    for pattern, fields in CURES.items():
        found = re.search(pattern, message)
        if found:
            first, *second = fields.split()
            text = found[1]
            value = int(text) if text.isdigit() and fields != SPLIT else text if fields in (SPLIT, ALGO) else None
            if fields == "sequence_parallel":
                value = False
            yield {first: value} if not second else {first: "usp" if first == ALGO else None, second[0]: value}


def refused(parallel: ParallelArguments, global_batch: int, model: ModelConfig, replicas: int) -> str | None:
    """The error of so many replicas of this layout."""
    config = TrainConfig(parallel=parallel, batch=BatchArguments(global_batch_size=global_batch))
    try:
        check_train(config, model, model_ranks(parallel) * replicas)
    except ConfigError as error:
        return str(error)
    return None


def follow(
    parallel: ParallelArguments, global_batch: int, model: ModelConfig, replicas: int, settled: frozenset[str]
) -> int:
    """Follow every suggestion to the end; how many there were. None is about a field that one before gave a value."""
    message = refused(parallel, global_batch, model, replicas)
    if message is None:
        return 0
    count = 0
    for cure in cures(message):
        case = f"{parallel}, batch {global_batch}: {message}: {cure}"
        values = {name for name, value in cure.items() if value}  # what is left out may be suggested later
        assert not settled & values, case
        fields = {name: value for name, value in cure.items() if name != GLOBAL}
        count += 1 + follow(
            dataclasses.replace(parallel, **fields), cure.get(GLOBAL, global_batch), model, replicas,
            settled | values,
        )
    assert count, f"{parallel}: {message}: suggests nothing"
    return count


def bad_layouts(seed: str, count: int) -> Iterator[tuple[ParallelArguments, int, int]]:
    """Layouts, most of which break several rules, with a global batch and replicas."""
    draw = random.Random(seed)
    for _ in range(count):
        algo = draw.choice(("ulysses", "ring", "usp"))
        yield ParallelArguments(
            tensor_model_parallel_size=draw.choice((1, 2, 3, 4, 5, 8, 12, 64)),
            sequence_parallel=draw.random() < 0.5,
            pipeline_model_parallel_size=draw.choice((1, 1, 2, 3, 4, 7, 16, 50)),
            num_virtual_stages_per_pipeline_rank=draw.choice((None, None, 2, 3, 4, 16, 50)),
            pipeline_layer_split=draw.choice((None, None, None, "1,2", "7,8,8,7", "0,4", "2,x")),
            context_parallel_size=draw.choice((1, 1, 2, 3, 4, 6, 8, 20)),
            context_parallel_algo=algo,
            ulysses_degree=draw.choice((None, 1, 2, 3, 8) if algo == "usp" else (None, None, None, 2)),
        ), draw.choice((1, 2, 7, 64)), draw.choice((1, 2, 3))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("text_length", [36, 512])
def test_every_suggestion_leads_to_a_layout_that_is_accepted(name: str, text_length: int) -> None:
    model = dataclasses.replace(PRESETS[name], text_length=text_length)
    followed = [
        follow(parallel, global_batch, model, replicas, frozenset())
        for parallel, global_batch, replicas in bad_layouts(name, 100)
    ]
    assert sum(map(bool, followed)) > 66


@pytest.mark.parametrize("model", [
    ModelConfig(num_layers=4, hidden_size=192, ffn_hidden_size=510, num_attention_heads=8),
    ModelConfig(num_layers=1, hidden_size=240, ffn_hidden_size=90, num_attention_heads=12),
    ModelConfig(num_layers=7, hidden_size=420, ffn_hidden_size=1001, num_attention_heads=21, text_length=33),
])
def test_suggestions_for_dimensions_with_little_in_common(model: ModelConfig) -> None:
    for parallel, global_batch, replicas in bad_layouts(str(model), 100):
        follow(parallel, global_batch, model, replicas, frozenset())


@pytest.mark.parametrize(("parallel", "suggests"), [
    ({TENSOR: 8, "sequence_parallel": True}, "divide ffn_hidden_size 510; choose 2"),  # 4 divides only the heads
    ({TENSOR: 3, CONTEXT: 8}, "divide num_attention_heads 8; choose 1"),  # 2 would leave 4 heads for 8 ranks
    ({PIPELINE: 1, VIRTUAL: 3}, "pipeline-model-parallel-size is 1; leave it out"),
    ({PIPELINE: 2, VIRTUAL: 5}, "choose 2 virtual stages, or leave"),
    ({PIPELINE: 5, VIRTUAL: 3}, "leave --num-virtual-stages-per-pipeline-rank out with at most 4 pipeline ranks"),
    ({PIPELINE: 3, SPLIT: "1,1,1"}, "they must agree, such as 1,2,1"),
    ({PIPELINE: 2, SPLIT: "4,0"}, "needs at least 1, such as 2,2"),
])
def test_one_suggestion_is_enough_where_one_flag_is_wrong(parallel: dict[str, Any], suggests: str) -> None:
    model = ModelConfig(num_layers=4, hidden_size=192, ffn_hidden_size=510, num_attention_heads=8, text_length=36)
    arguments = ParallelArguments(**parallel)
    message = refused(arguments, 64, model, 1)
    assert message is not None and message.endswith(suggests) or suggests in message, message
    for cure in cures(message):
        assert refused(dataclasses.replace(arguments, **cure), 64, model, 1) is None, cure


def test_a_global_batch_that_is_suggested_feeds_the_interleaved_schedule() -> None:
    parallel = ParallelArguments(**{PIPELINE: 4, VIRTUAL: 2})
    message = refused(parallel, 3, PRESETS["14b"], 2)
    assert message is not None and message.endswith("replicas; choose 8")
    assert refused(parallel, 8, PRESETS["14b"], 2) is None


@pytest.mark.parametrize("name", [TENSOR, PIPELINE, CONTEXT, VIRTUAL])
@pytest.mark.parametrize("value", [0, -2])
def test_sizes_are_at_least_one(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is {value}; it must be at least 1"):
        check_layout(ParallelArguments(**{name: value}), PRESETS["tiny"], 1)
