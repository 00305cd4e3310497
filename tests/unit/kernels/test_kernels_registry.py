from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flashi2v_kernels import registry
from flashi2v_kernels.registry import OPERATORS, KernelSpec, KernelUnavailable, describe, resolve, specs_of

ENTRY = "flashi2v_kernels.attention.reference:attention"


def spec(name, **needs):
    return KernelSpec(operator="attention", name=name, entry_point=ENTRY, **needs)


@pytest.fixture
def offer(monkeypatch):
    """Replace an operator's table by the given specs, with a reference at the end."""

    def set_specs(*specs):
        monkeypatch.setattr(registry, "specs_of", lambda operator: (*specs, spec("reference")))

    return set_specs


@pytest.mark.parametrize("operator", OPERATORS)
def test_tables_are_whole(operator):
    specs = specs_of(operator)
    assert specs[-1].name == "reference"
    assert len({entry.name for entry in specs}) == len(specs)
    for entry in specs:
        assert entry.operator == operator
        if entry.package is None:
            assert callable(registry.load_entry_point(entry))
            backward = registry.load_backward(entry)
            assert backward is None if entry.backward_entry_point is None else callable(backward)
        else:  # its module needs the package; the tests of that implementation load it with a stand-in
            module, _, function = entry.entry_point.partition(":")
            source = importlib.util.find_spec(module)
            assert source is not None and f"\ndef {function}(" in Path(source.origin).read_text()


@pytest.mark.parametrize("device", ["cuda", "npu", "cpu"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_runs_everywhere(operator, device):
    for dtype in (torch.float32, torch.bfloat16):
        assert resolve(operator, device, dtype).spec.name != "reference"


def test_high_pass_avoids_complex_numbers_on_npu():
    assert resolve("fourier_highpass", "cpu", torch.float32).spec.name == "torch_fft"
    kernel = resolve("fourier_highpass", "npu", torch.float32)
    assert kernel.spec.name == "matmul_dft"
    assert kernel.why_not == ("torch_fft: runs on cuda, cpu, not on npu",)
    assert resolve("fourier_highpass", "cpu", torch.float32, "matmul_dft").spec.name == "matmul_dft"
    with pytest.raises(KernelUnavailable, match="has no gradient"):
        resolve("fourier_highpass", "cpu", torch.float32, needs_gradient=True)


def test_auto_takes_the_first_that_can_run_and_says_why_not_the_others(offer):
    offer(spec("best", devices=("cuda",)), spec("good"), spec("spare"))
    kernel = resolve("attention", "cpu", torch.float32)
    assert kernel.spec.name == "good"
    assert kernel.why_not == ("best: runs on cuda, not on cpu",)
    assert describe([kernel]) == [("attention", "good", "best: runs on cuda, not on cpu")]
    assert resolve("attention", "cuda", torch.float32).why_not == ()


def test_auto_passes_over_what_no_card_has_timed(offer, monkeypatch):
    offer(spec("best", timed=False), spec("good"))
    kernel = resolve("attention", "cpu", torch.float32)
    assert kernel.spec.name == "good" and kernel.why_not == ()
    assert resolve("attention", "cpu", torch.float32, "best").spec.name == "best"
    monkeypatch.setattr(registry, "specs_of", lambda operator: (spec("best", timed=False),))
    with pytest.raises(KernelUnavailable, match="no implementation of attention can run here"):
        resolve("attention", "cpu", torch.float32)


def test_a_named_choice_runs_or_is_an_error_that_lists_what_can(offer):
    offer(spec("best", devices=("cuda",)), spec("good"))
    assert resolve("attention", "cpu", torch.float32, "reference").spec.name == "reference"
    with pytest.raises(KernelUnavailable, match=r"'best' cannot run here: runs on cuda.*: good, reference$"):
        resolve("attention", "cpu", torch.float32, "best")
    with pytest.raises(KernelUnavailable, match=r"no implementation 'bset'; available.*: good, reference$"):
        resolve("attention", "cpu", torch.float32, "bset")
    with pytest.raises(ValueError, match="unknown operator 'atention'; there are attention,"):
        specs_of("atention")


@pytest.mark.parametrize(
    ("needs", "request_", "reason"),
    [
        ({"dtypes": (torch.bfloat16,)}, {}, "takes bfloat16, not float32"),
        ({"max_head_dim": 64}, {"head_dim": 128}, "head size 128 is above its limit of 64"),
        ({"head_dim_multiple": 8}, {"head_dim": 12}, "head size 12 is not a multiple of 8"),
        ({"features": {"lse": ("cpu",)}}, {"features": ["lse"]}, "has no lse on cuda"),
        ({"differentiable": False}, {"needs_gradient": True}, "has no gradient"),
        ({"min_compute_capability": (9, 0)}, {"compute_capability": (8, 0)},
         "needs compute capability 9.0, this device's is 8.0"),
        ({"max_compute_capability": (9, 0)}, {"compute_capability": (10, 0)},
         "takes compute capability 9.0 at most, this device's is 10.0"),
        ({"package": "no-such-package", "min_version": "2.6"}, {},
         "needs no-such-package >= 2.6, which is not installed"),
        ({"package": "torch", "min_version": "99.1"}, {}, "needs torch >= 99.1, installed is "),
    ],
)
def test_reasons(offer, needs, request_, reason):
    offer(spec("fussy", **needs))
    with pytest.raises(KernelUnavailable, match="cannot run here") as caught:
        resolve("attention", "cuda", torch.float32, "fussy", **{"features": [], **request_})
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("needs", "request_"),
    [
        ({"max_head_dim": 128, "head_dim_multiple": 8}, {"head_dim": 128}),
        ({"min_compute_capability": (8, 0)}, {"compute_capability": (9, 0)}),
        ({"min_compute_capability": (9, 0), "max_compute_capability": (9, 0)}, {"compute_capability": (9, 0)}),
        ({"package": "torch", "min_version": "2.7"}, {}),
        ({"features": {"lse": ("cuda",)}}, {"features": ["lse"]}),
    ],
)
def test_met_needs_are_no_obstacle(offer, needs, request_):
    offer(spec("fussy", **needs))
    assert resolve("attention", "cuda", torch.float32, **request_).spec.name == "fussy"


def test_npu_names(offer):
    offer(spec("fused", socs=("Ascend910",)))
    assert resolve("attention", "npu", torch.float32, soc="Ascend910B3").spec.name == "fused"
    kernel = resolve("attention", "npu", torch.float32, soc="Ascend310P")
    assert kernel.why_not == ("fused: runs on Ascend910, this device is Ascend310P",)


def test_nothing_can_run(offer, monkeypatch):
    monkeypatch.setattr(registry, "specs_of", lambda operator: (spec("only", devices=("npu",)),))
    with pytest.raises(KernelUnavailable, match=r"no implementation of attention.*only: runs on npu, not"):
        resolve("attention", "cpu", torch.float32)


@pytest.mark.parametrize(
    ("installed", "wanted", "serves"),
    [
        ("2.10.0", "2.9.1", True),
        ("2.9.1", "2.10", False),
        ("2.7.4.post1+cu12torch2.8cxx11abiTRUE", "2.7.4", True),
        ("2.7", "2.7.0", True),
        ("3.0.0b1", "3.0.0b1", True),
        ("3.0.0", "3.0.0b1", True),
        ("3.0.0b1", "3.0.0", False),
        ("4.0.0b5", "4.0.0b36", False),
        ("4.0.0b36", "4.0.0b5", True),
        ("2.8.0rc1", "2.8.1", False),
        ("a build of my own", "2.8", False),
    ],
)
def test_versions_compare_as_numbers(offer, monkeypatch, installed, wanted, serves):
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: SimpleNamespace(version=installed))
    offer(spec("fussy", package="flash-attn", min_version=wanted))
    kernel = resolve("attention", "cuda", torch.float32)
    assert (kernel.spec.name == "fussy") is serves
    if not serves:
        assert kernel.why_not == (f"fussy: needs flash-attn >= {wanted}, installed is {installed}",)


def test_import_is_light():
    """Beyond torch, importing the package and resolving everything loads packaging and our own modules, and fast."""
    code = """
import sys, time, torch, importlib.metadata
before, start = set(sys.modules), time.process_time()
import flashi2v_kernels
from flashi2v_kernels import registry
for operator in registry.OPERATORS:
    registry.resolve(operator, "cpu", torch.float32)
seconds = time.process_time() - start
foreign = {name.partition(".")[0] for name in set(sys.modules) - before} - {"flashi2v_kernels"}
third_party = sorted(name for name in foreign if name not in sys.stdlib_module_names)
print(seconds, *third_party)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, *third_party = result.stdout.split()
    assert set(third_party) <= {"packaging"}
    assert float(seconds) < 0.2
