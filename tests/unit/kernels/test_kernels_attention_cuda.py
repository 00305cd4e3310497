"""Attention of libraries that need a GPU, through stand-ins of theirs; and which one is chosen on which card.

With ``FLASHI2V_TEST_DEVICE=cuda`` log-sum-exp and gradients from blocks of keys are those of the real libraries.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.attention_libraries import cudnn_on_cpus, modules_of
from helpers.kernels import DEVICE

from flashi2v_kernels.attention import BLOCK_BACKWARD, KEY_PADDING, LOG_SUM_EXP, reference
from flashi2v_kernels.registry import KernelUnavailable, load_backward, resolve, specs_of

LIBRARIES = ["flash_attn_4", "flash_attn_3", "flash_attn_2", "transformer_engine", "torch_cudnn"]
WITH_LOG_SUM_EXP = [name for name in LIBRARIES if name != "transformer_engine"]
SPECS = {spec.name: spec for spec in specs_of("attention")}
SHAPES = [(1, 1, 1, 1, 8), (3, 7, 5, 2, 24), (2, 17, 17, 3, 16), (1, 1, 9, 2, 128)]


def runs_here(name):
    try:
        resolve("attention", DEVICE, torch.bfloat16, name, features=RING, needs_gradient=True)
    except KernelUnavailable:
        return False
    return True


RING = (LOG_SUM_EXP, BLOCK_BACKWARD)
ON_CPU = DEVICE == "cpu"
IN_RINGS = WITH_LOG_SUM_EXP if ON_CPU else [name for name in (*WITH_LOG_SUM_EXP, "torch_flash") if runs_here(name)]
RING_SHAPE = (2, 7, 9, 3, 24) if ON_CPU else (2, 160, 384, 3, 128)
stand_ins = pytest.mark.skipif(not ON_CPU, reason="of stand-ins, which compute on CPUs")


@pytest.fixture
def load(monkeypatch):
    """An implementation's module, on a stand-in of its library; on a card on the library."""
    if not ON_CPU:
        yield lambda name: importlib.import_module(SPECS[name].entry_point.partition(":")[0])
        return

    def load(name):
        for module, fake in modules_of(name).items():
            monkeypatch.setitem(sys.modules, module, fake)
        module = SPECS[name].entry_point.partition(":")[0]
        monkeypatch.delitem(sys.modules, module, raising=False)
        return importlib.import_module(module)

    with cudnn_on_cpus():
        yield load


def draw(batch, queries, keys, heads, size):
    generator = torch.Generator().manual_seed(batch + queries * 7 + keys * 31)
    shapes = [(queries, batch, heads, size), (keys, batch, heads, size), (keys, batch, heads, size)]
    # token-first tensors seen batch-first, as in the model
    return [torch.randn(shape, generator=generator).bfloat16().to(DEVICE).transpose(0, 1) for shape in shapes]


def draw_gradient(output):
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).bfloat16().to(DEVICE)


def gradients(function, inputs, weights, **options):
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*inputs, **options)
    return output, *torch.autograd.grad((output * weights.to(output.dtype)).sum(), inputs)


@stand_ins
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LIBRARIES)
def test_output_and_gradients(load, name, shape, scale, assert_near):
    inputs = draw(*shape)
    weights = draw_gradient(inputs[0])
    actual = gradients(load(name).attention, inputs, weights, softmax_scale=scale)
    expected = gradients(reference.attention, [t.double() for t in inputs], weights, softmax_scale=scale)
    for i, (ours, wanted) in enumerate(zip(actual, expected, strict=True)):
        # with one key the weights are constant: the gradients of query and key are rounding alone
        assert_near(ours, wanted, expected[3].abs().max() if shape[2] == 1 and i in (1, 2) else None)


@pytest.mark.parametrize("name", IN_RINGS)
def test_log_sum_exp(load, name, assert_near):
    inputs = [tensor.requires_grad_() for tensor in draw(*RING_SHAPE)]
    output, lse = load(name).attention(*inputs, return_log_sum_exp=True)
    expected, expected_lse = reference.attention(*(t.double() for t in inputs), return_log_sum_exp=True)
    assert not lse.requires_grad and lse.dtype == torch.float32
    assert_near(output, expected)
    assert_near(lse, expected_lse)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("name", IN_RINGS)
def test_backward_of_blocks_adds_up(load, name, blocks, scale, assert_near):
    inputs, module, backward = draw(*RING_SHAPE), load(name), load_backward(SPECS[name])
    weights = draw_gradient(inputs[0])
    output, lse = module.attention(*inputs, softmax_scale=scale, return_log_sum_exp=True)
    expected = gradients(reference.attention, [t.double() for t in inputs], weights, softmax_scale=scale)
    parts = [
        backward(weights, inputs[0], key, value, output, lse, softmax_scale=scale)
        for key, value in zip(inputs[1].chunk(blocks, dim=1), inputs[2].chunk(blocks, dim=1), strict=True)
    ]
    assert_near(sum(part[0].float() for part in parts).bfloat16(), expected[1])
    for i in (1, 2):
        assert_near(torch.cat([part[i] for part in parts], dim=1), expected[i + 1])


@stand_ins
@pytest.mark.parametrize("name", LIBRARIES)
def test_what_a_library_lacks_is_refused(load, name):
    inputs, module = draw(2, 7, 5, 3, 24), load(name)
    assert KEY_PADDING not in SPECS[name].features
    with pytest.raises(NotImplementedError, match="padded keys"):
        module.attention(*inputs, key_padding_mask_BK=torch.ones(2, 5, dtype=torch.bool))
    for feature in (LOG_SUM_EXP, BLOCK_BACKWARD):
        assert (feature in SPECS[name].features) == (name in WITH_LOG_SUM_EXP)


@pytest.fixture
def installed(monkeypatch):
    """Pretend that these distributions, and no others that kernels ask for, are installed."""
    versions = {"flash_attn_3": "3.0.0b1", "flash_attn": "2.8.3", "transformer_engine": "2.9.0+cu12",
                "flash-attn-4": "4.0.0b36"}

    def distribution(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return SimpleNamespace(version=versions[name])

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    for name in LIBRARIES:
        for module, fake in modules_of(name).items():
            monkeypatch.setitem(sys.modules, module, fake)
    return versions


@pytest.mark.parametrize(
    ("capability", "dtype", "features", "expected"),
    [
        ((9, 0), torch.bfloat16, (), "flash_attn_3"),
        ((9, 0), torch.bfloat16, RING, "flash_attn_3"),
        ((9, 0), torch.bfloat16, (KEY_PADDING,), "torch_sdpa"),
        ((8, 0), torch.bfloat16, RING, "torch_flash"),
        ((9, 0), torch.float32, (), "torch_sdpa"),
        ((8, 0), torch.bfloat16, (), "torch_sdpa"),
        ((10, 0), torch.bfloat16, (), "torch_sdpa"),
        ((10, 3), torch.bfloat16, RING, "torch_cudnn"),
        ((12, 0), torch.bfloat16, RING, "torch_flash"),
        ((7, 5), torch.float16, (), "torch_sdpa"),
    ],
)
def test_automatic_choice_on_cards(installed, capability, dtype, features, expected):
    kernel = resolve("attention", "cuda", dtype, head_dim=128, features=features, compute_capability=capability)
    assert kernel.spec.name == expected


def test_a_ring_without_libraries_takes_cudnn_on_hopper_unless_bits_must_repeat(installed):
    installed.clear()
    needs = {"features": RING, "head_dim": 128, "needs_gradient": True, "compute_capability": (9, 0)}
    assert resolve("attention", "cuda", torch.bfloat16, **needs).spec.name == "torch_cudnn"
    assert resolve("attention", "cuda", torch.bfloat16, **{**needs, "head_dim": 136}).spec.name == "torch_flash"
    torch.use_deterministic_algorithms(True)
    try:
        kernel = resolve("attention", "cuda", torch.bfloat16, **needs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert kernel.spec.name == "torch_flash"
    assert any(line.startswith("torch_cudnn: its gradients differ from run to run") for line in kernel.why_not)


def test_named_choices_on_cards(installed):
    for name in LIBRARIES:  # flash_attn_4 only so
        kernel = resolve("attention", "cuda", torch.bfloat16, name, head_dim=128, compute_capability=(9, 0))
        assert kernel.spec.name == name
    with pytest.raises(KernelUnavailable, match="compute capability 9.0 at most"):
        resolve("attention", "cuda", torch.bfloat16, "flash_attn_3", compute_capability=(10, 0))
    with pytest.raises(KernelUnavailable, match="head size 20 is not a multiple of 8"):
        resolve("attention", "cuda", torch.bfloat16, "flash_attn_2", head_dim=20, compute_capability=(8, 0))
    installed["flash-attn-4"] = "4.0.0b4"  # its backward asserts that it need not be deterministic on Hopper
    with pytest.raises(KernelUnavailable, match=r"needs flash-attn-4 >= 4.0.0b5, installed is 4.0.0b4"):
        resolve("attention", "cuda", torch.bfloat16, "flash_attn_4", compute_capability=(9, 0))
    installed["flash_attn"] = "2.6.3"
    with pytest.raises(KernelUnavailable, match=r"needs flash_attn >= 2.7, installed is 2.6.3"):
        resolve("attention", "cuda", torch.bfloat16, "flash_attn_2", compute_capability=(8, 0))


@pytest.mark.parametrize(("capability", "first"), [
    ((8, 0), "FLASH_ATTENTION"), ((8, 9), "FLASH_ATTENTION"), ((9, 0), "CUDNN_ATTENTION"),
    ((10, 3), "CUDNN_ATTENTION"), ((12, 0), "FLASH_ATTENTION"),
])
def test_the_order_in_which_torch_is_asked_on_cuda(capability, first, monkeypatch):
    """Which kernel then runs is torch's affair."""
    from torch.nn.attention import SDPBackend

    from flashi2v_kernels.attention import torch_sdpa

    order = torch_sdpa.backends_of(capability)
    assert order[0] == getattr(SDPBackend, first)
    assert set(order) == {
        SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    }
    asked = []

    def attend(query, *_, **__):
        asked.extend(torch._C._get_sdp_priority_order())
        return query

    monkeypatch.setattr(torch_sdpa.F, "scaled_dot_product_attention", attend)
    kernel = resolve("attention", "cuda", torch.bfloat16, "torch_sdpa", compute_capability=capability)
    kernel.function(*torch.zeros(3, 1, 2, 1, 8))
    assert asked[0] == int(getattr(SDPBackend, first)) and len(asked) >= 4
