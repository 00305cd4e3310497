"""The benchmarks' arithmetic and reports, at sizes where nothing takes long."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from flashi2v_kernels.compiled import compiled
from flashi2v_kernels.registry import OPERATORS, load_entry_point, specs_of
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.evaluation import bench_block, bench_kernels, bench_sampling, bench_step, benchmark, step_parts
from megatron_flashi2v.models.presets import PRESETS
from megatron_flashi2v.runtime.device import resolve_device

SHAPE = (2, 4, 6)


def test_rounds_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SHORTEST_S", 0.0)
    called: list[str] = []
    functions = {name: (lambda name=name: called.append(name)) for name in ("a", "b")}
    seconds = benchmark.interleaved_seconds(functions, resolve_device("cpu"), rounds=3)
    assert called == ["a", "a", "b", "b", *["a", "b"] * 3]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_ratio_is_the_median_of_each_rounds() -> None:
    assert benchmark.median_ratio([1.0, 2.0, 9.0], [2.0, 2.0, 3.0]) == 1.0


def test_ceilings_are_plausible() -> None:
    device = resolve_device("cpu")
    assert 1e9 < benchmark.matmul_ceiling(device, torch.float32, rounds=1) < 1e13
    assert 1e8 < benchmark.copy_ceiling(device, rounds=1) < 1e12


def test_kernels_are_timed_without_the_host() -> None:
    left = torch.randn(64, 64)
    seconds = benchmark.kernel_seconds(lambda: time.sleep(0.05) or left @ left, resolve_device("cpu"), 3)
    assert 0 < seconds < 0.05
    rows = benchmark.interleaved_seconds({"a": lambda: None}, resolve_device("cpu"), 2, measure=lambda *_: 7.0)
    assert rows == {"a": [7.0, 7.0]}


def test_the_compiled_peer_compiles_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import WanTransformer3DModel

    compiled: list[dict[str, object]] = []
    monkeypatch.setattr(WanTransformer3DModel, "compile_repeated_blocks", lambda _, **options: compiled.append(options))
    options = bench_step.StepBenchmark(
        model="tiny", num_layers=1, latent_shape=SHAPE, bf16=False, device="cpu", rounds=1, peer="diffusers-compiled",
        elementwise_backend="reference", profile=False,
    )
    told = bench_step.run(options)
    assert compiled == [{"fullgraph": True}] and "diffusers-compiled" in told and "time over the peer's" in told
    assert "ada_layer_norm  reference" in " ".join(told.split("\n")).replace("    ", "  ")


def test_table() -> None:
    rows = [{"a": 1.23456, "b": "x"}, {"a": None}]
    assert benchmark.table(rows, ("a", "b")) == "a      b\n--------\n1.235  x\n-      -\n"


@pytest.mark.parametrize("operator", OPERATORS)
def test_kernel_cases_fit_every_operator(operator: str) -> None:
    """The definition takes each case's inputs; every leaf gets a gradient."""
    case = bench_kernels.make_case(operator, PRESETS["tiny"], SHAPE, torch.float32, resolve_device("cpu"))
    reference = load_entry_point(next(spec for spec in specs_of(operator) if spec.name == "reference"))
    results = case.call(reference)
    total = sum(result.sum() for result in (results if isinstance(results, tuple) else (results,)))
    gradients = torch.autograd.grad(total, case.leaves) if case.leaves else ()
    assert all(gradient.shape == leaf.shape for gradient, leaf in zip(gradients, case.leaves, strict=True))
    assert case.work[0] > 0


def test_kernel_report(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    options = bench_kernels.KernelBenchmark(
        models=("tiny",), latent_shape=SHAPE, operators=("gate_residual", "attention"), dtypes=("float32",),
        device="cpu", rounds=1, json=path, skip=("inductor",), bucket_shapes=((2, 6, 4), (1, 4, 4)),
    )
    told = bench_kernels.run(options)
    report = json.loads(path.read_text())
    measured = {(row["operator"], row["implementation"], row["direction"]): row
                for row in report["rows"] if row.get("seconds")}
    eager = measured["gate_residual", "reference", "forward"]
    assert eager["of_eager"] == 1.0
    moved = 3 * 12 * 192 * 4  # two rows of 12 tokens in, one out
    assert eager["rate"] == pytest.approx(moved / (eager["ms"] * 1e-3) / 1e9)
    assert ("attention", "torch_sdpa", "backward") in measured and ("attention", "reference", "forward") not in measured
    ring = measured["attention", "torch_sdpa", "ring block"]
    assert ring["ms"] > measured["attention", "torch_sdpa", "forward"]["ms"] and ring["of_eager"] == 1.0
    (start,) = [row for row in report["starts"] if row["implementation"] == "torch"]
    assert start["operator"] == "gate_residual" and len(start["seconds"]) == 3 and start["compilations"] == 0
    assert start["first_s"] == start["seconds"][0] > 0 and start["others_s"] == sum(start["seconds"][1:])
    assert "triton" in told and "runs on cuda, not on cpu" in told


def test_kernels_are_compiled_for_the_timed_shape_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a run of one shape, although their start was timed over several, whose number of tokens is symbolic."""
    symbolic: list[bool] = []

    def note(graph: torch.fx.GraphModule, inputs: list[object]) -> Callable[..., object]:
        symbolic.append(any(isinstance(size, torch.SymInt) for size in inputs))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=note))
    compiled.cache_clear()
    bench_kernels.run(bench_kernels.KernelBenchmark(
        models=("tiny",), latent_shape=SHAPE, operators=("gate_residual",), dtypes=("float32",), device="cpu", rounds=1,
        skip=("triton", "torch"), bucket_shapes=((1, 4, 4),),
    ))
    compiled.cache_clear()
    assert symbolic == [False, True, False]


def test_step_report(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    options = bench_step.StepBenchmark(
        model="tiny", num_layers=1, latent_shape=SHAPE, bf16=False, device="cpu", rounds=1, peer="diffusers", json=path
    )
    told = bench_step.run(options)
    report = json.loads(path.read_text())
    ours, theirs = report["rows"]
    assert ours["tflops"] == pytest.approx(3 * sum(report["forward_flops"].values()) / ours["seconds"] / 1e12)
    assert theirs["flops"] < ours["flops"]  # it has no image conditioning
    assert report["ratio_to_peer"] == pytest.approx(ours["seconds"] / theirs["seconds"])
    assert report["tokens"] == 12 and sum(part["share"] for part in report["parts"]) == pytest.approx(1.0)
    assert report["host_reads"] == 1 and "reads by the host: 1;" in told
    assert report["launches"] == sum(part["launches"] for part in report["parts"])
    parts = {part["part"]: part for part in report["parts"]}
    assert set(parts) == {*step_parts.KINDS, step_parts.REST}
    for part in report["parts"]:
        if part["part"] in (step_parts.REST, "copies, casts and fills"):
            assert part["floor_ms"] is None and part["over_floor"] is None
        else:
            assert part["launches"] > 0 and part["over_floor"] == pytest.approx(part["ms"] / part["floor_ms"])
    assert "diffusers" in told and "ada_layer_norm" in told
    with pytest.raises(ConfigError, match="--model 2b: choose one of"):
        bench_step.run(bench_step.StepBenchmark(model="2b"))


def test_the_host_reads_a_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    options = bench_step.StepBenchmark(model="tiny", num_layers=1, latent_shape=SHAPE, bf16=False, device="cpu")
    assert bench_step.host_reads(options) == 1
    update = bench_step.OurStep.update
    monkeypatch.setattr(bench_step.OurStep, "update", lambda step: step.report.numbers.sum().item() and update(step))
    with pytest.raises(RuntimeError, match="the host reads cpu by tolist: read 2"):
        bench_step.host_reads(options)


def test_kinds_of_operators() -> None:
    assert step_parts.kind_of("aten::addmm") == "matrix products"
    assert step_parts.kind_of("void flash_fwd_kernel<cutlass>") == "attention"
    assert step_parts.kind_of("norm_backward") == "norms and residual sums"
    assert step_parts.kind_of("aten::mul < _NormAndTurnBackward") == "norms of queries and keys"
    assert step_parts.kind_of("aten::sum") == step_parts.REST


def test_launches_are_what_computes() -> None:
    left = torch.ones(8, 8)
    parts, _ = step_parts.profile_step(
        lambda: torch.nn.functional.linear(left, left).t().contiguous(), resolve_device("cpu")
    )
    assert {kind: launches for kind, (launches, _) in parts.items() if launches} == {
        "matrix products": 1, "copies, casts and fills": 1,
    }


def test_floors() -> None:
    """One block of width 192 in bf16 on 12 tokens and 16 rows of text, at a FLOP and a byte a second."""
    config = dataclasses.replace(PRESETS["tiny"], num_layers=1, text_length=16)
    found = step_parts.floors(
        config, SHAPE, 1, torch.bfloat16, parameters=1000, flops_per_second=1.0, bytes_per_second=1.0
    )
    assert found["attention"] == 3.5 * 4 * 192 * (12 * 12 + 12 * 16)
    assert found["norms and residual sums"] == 29 * 12 * 192 * 2
    assert found["norms of queries and keys"] == 5 * (3 * 12 + 16) * 192 * 2
    assert found["bias and GELU"] == 5 * 12 * 512 * 2
    assert found["optimizer and clipping"] == 1000 * (4 + 16 + 12 + 2)
    blocks = 3 * 2 * (12 * 6 + 16 * 2) * 192 * 192 + 3 * 2 * 12 * 2 * 192 * 512
    assert 0 < found["matrix products"] - blocks < blocks  # embeddings and head


def test_block_report(tmp_path: Path) -> None:
    path = tmp_path / "block.json"
    options = bench_block.BlockBenchmark(model="tiny", latent_shape=SHAPE, device="cpu", rounds=1, json=path)
    told = bench_block.run(options)
    report = json.loads(path.read_text())
    assert [row["dtype"] for row in report["rows"]] == ["float32", "bfloat16"]
    for row in report["rows"]:
        assert row["ratio"] == pytest.approx(row["rounds"][0] / row["diffusers_rounds"][0])
    assert "ratio" in told


def test_sampling_report_of_equal_videos(tmp_path: Path) -> None:
    """Both pipelines make the same latents of the same weights, so that their times can be compared."""
    models = Path(__file__).parents[3] / "examples" / "quickstart" / "models"
    path = tmp_path / "sampling.json"
    options = bench_sampling.SamplingBenchmark(
        num_layers=2, vae=models / "vae", text_encoder=models / "text_encoder", tokenizer=models / "tokenizer",
        num_frames=5, height=32, width=48, num_steps=3, device="cpu", rounds=1, json=path,
    )
    text = bench_sampling.run(options)
    report = json.loads(path.read_text())
    assert "videos a minute over diffusers'" in text and report["throughput_over_peer"] > 0
    assert 0 < report["largest_difference_of_latents"] < 1e-4 * report["largest_latent"]
