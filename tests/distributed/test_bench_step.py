"""The benchmark of a step runs over several ranks, as many collectives on each, and tells what of them shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.ranks import run_ranks

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.train import ParallelArguments
from megatron_flashi2v.evaluation.bench_options import StepBenchmark
from megatron_flashi2v.evaluation.bench_step import run
from megatron_flashi2v.runtime.launch import LaunchEnvironment

SHARDED = ParallelArguments(data_parallel_sharding_strategy="optim_grads_params")
TENSOR_PARALLEL = ParallelArguments(tensor_model_parallel_size=2, sequence_parallel=True)
LAYOUTS = {"sharded": SHARDED, "tensor": TENSOR_PARALLEL}


def options(**changes: object) -> StepBenchmark:
    sizes = {"num_layers": 1, "latent_shape": (2, 4, 6), "rounds": 1}
    return StepBenchmark(model="tiny", bf16=False, device="cpu", **sizes, **changes)


def measure(rank: int, folder: Path) -> None:
    for name, parallel in LAYOUTS.items():
        told = run(options(parallel=parallel, json=folder / f"{name}.json"))
        assert ("beside no computation" in told) == (rank == 0) and bool(told) == (rank == 0)


# Not by default while its cause is unknown: on a busy machine one of the two ranks has ended in SIGSEGV, twice in some
# dozen runs, in the forward pass of a sharded step.
@pytest.mark.long
def test_two_ranks_tell_how_much_communication_is_exposed(tmp_path: Path) -> None:
    run_ranks(measure, 2, tmp_path, tmp_path)
    for name in LAYOUTS:
        report = json.loads((tmp_path / f"{name}.json").read_text())
        found, (row,) = report["communication"], report["rows"]
        assert 0 < found["exposed_s"] <= found["total_s"] < found["step_s"] and report["world_size"] == 2
        assert found["exposed_share"] == found["exposed_s"] / found["step_s"]
        of_one = 3 * sum(report["forward_flops"].values())
        assert row["flops"] == pytest.approx(of_one / (2 if name == "tensor" else 1))


@pytest.mark.parametrize(("changes", "world_size", "message"), [
    ({"parallel": ParallelArguments(pipeline_model_parallel_size=2), "num_layers": 2}, 2, "is no pipeline's"),
    ({"peer": "diffusers"}, 2, "--peer diffusers runs in one process, and 2 were started"),
    ({"parallel": TENSOR_PARALLEL}, 1, "start a multiple of 2"),
])
def test_what_ranks_cannot_measure_is_refused(changes: dict, world_size: int, message: str) -> None:
    launch = LaunchEnvironment(world_size=world_size, local_world_size=world_size)
    with pytest.raises(ConfigError, match=message):
        run(StepBenchmark(**{"model": "tiny", "device": "cpu", **changes}), launch)
