"""Compiled references against the same in fp64, uncompiled. A C++ compiler takes seconds for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from helpers.kernels import DEVICE, assert_near, draw, outputs_and_gradients

from flashi2v_kernels.compiled import compiled
from flashi2v_kernels.qk_norm_rope.tables import rope_tables
from flashi2v_kernels.registry import resolve, specs_of
from flashi2v_kernels.rms_norm.statistics import local_sum_of_squares
from megatron_flashi2v.models.spec import ELEMENTWISE

EPS = 1e-6
FP32, BF16 = torch.float32, torch.bfloat16
COMPILATIONS = 2
CASES = (*ELEMENTWISE, "residual_norm without gate")


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_one_is_there_for_every_elementwise_operator_and_never_automatic() -> None:
    for operator in ELEMENTWISE:
        (spec,) = [spec for spec in specs_of(operator) if spec.name == "inductor"]
        assert not spec.timed and resolve(operator, "cuda", BF16, "inductor").spec is spec
        for device in ("cpu", "cuda"):
            assert resolve(operator, device, BF16, compute_capability=(7, 0)).spec.name != "inductor"


def case(name: str, tokens: int, dtype: torch.dtype) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    """A call of an implementation, and its inputs."""
    hidden, rows = draw((tokens, 2, 24), dtype, mean=0.5), [draw((2, 24), FP32, seed=seed) for seed in (1, 2, 3)]
    heads, weight = 2 * draw((tokens, 2, 4, 6), dtype), draw((24,), FP32, seed=1)
    cos, sin = (table.to(DEVICE) for table in rope_tables((1, tokens, 1), 6, dtype=torch.float64))

    def shared(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, w: function(x, w, EPS, local_sum_of_squares(x, 2), 24)

    def result_dtype(x: torch.Tensor) -> torch.dtype:
        return torch.float64 if x.dtype == torch.float64 else BF16

    def summed(function: Callable[..., Any], *, gated: bool) -> Callable[..., Any]:
        """Both results as one tensor, so that both get a gradient."""

        def run(x: torch.Tensor, update: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
            gate, shift, scale = rows if gated else (None, *rows)
            return torch.stack(function(x, update, gate, shift, scale, EPS, dtype=result_dtype(x)))

        return run

    return {
        "ada_layer_norm": (lambda f: lambda x, *r: f(x, *r, EPS, dtype=result_dtype(x)), [hidden, *rows[:2]]),
        "residual_norm": (partial(summed, gated=True), [hidden, hidden.flip(0), *rows]),
        "residual_norm without gate": (partial(summed, gated=False), [hidden, hidden.flip(0), *rows[:2]]),
        "gate_residual": (lambda f: f, [hidden, hidden.flip(0), rows[0]]),
        "bias_gelu_tanh": (lambda f: f, [3 * hidden, rows[0][0]]),
        "rms_norm": (shared, [heads, weight]),
        "qk_norm_rope": (lambda f: lambda x, w: f(x, w, cos.to(w.dtype), sin.to(w.dtype), EPS), [heads, weight]),
    }[name]


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """By default torch traces forward and backward and compiles nothing: a C++ compiler takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=request.param))
    compiled.cache_clear()
    yield request.param
    compiled.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(name: str, backend: str) -> None:
    """Five buckets are two compilations: the second number of tokens compiles anew with a symbolic one."""
    operator = name.partition(" ")[0]
    ours, reference = (resolve(operator, DEVICE, BF16, choice).function for choice in ("inductor", "reference"))
    before = compiled_graphs()
    for tokens in (7, 13, 29, 16, 64):
        call, inputs = case(name, tokens, BF16)
        actual = outputs_and_gradients(call(ours), inputs)
        expected = outputs_and_gradients(call(reference), inputs, torch.float64)
        assert [tensor.dtype for tensor in actual] == [BF16, *(tensor.dtype for tensor in inputs)]
        for found, wanted in zip(actual, expected, strict=True):
            # what residual_norm's rows multiply was rounded to bf16 on its way
            assert_near(found.to(BF16) if operator == "residual_norm" else found, wanted)
    assert compiled_graphs() - before == COMPILATIONS


def test_wrong_shapes_are_refused() -> None:
    hidden, row = draw((3, 2, 6), FP32), draw((2, 6), FP32)
    functions = {name: resolve(name, DEVICE, FP32, "inductor").function for name in ELEMENTWISE}
    with pytest.raises(ValueError, match="do not fit hidden"):
        functions["ada_layer_norm"](hidden, row, row[:1], EPS, dtype=FP32)
    with pytest.raises(ValueError, match="do not fit hidden"):
        functions["residual_norm"](hidden, hidden, None, row, row[:1], EPS, dtype=FP32)
    with pytest.raises(ValueError, match="update"):
        functions["residual_norm"](hidden, hidden[:1], row, row, row, EPS, dtype=FP32)
    with pytest.raises(ValueError, match="update"):
        functions["gate_residual"](hidden, hidden[:1], row)
    with pytest.raises(ValueError, match="bias"):
        functions["bias_gelu_tanh"](hidden, row)
    with pytest.raises(ValueError, match="both"):
        functions["rms_norm"](hidden, row[0], EPS, full_width=6)
    with pytest.raises(ValueError, match="tables"):
        functions["qk_norm_rope"](hidden[..., None, :], row[0], row, row, EPS)
