from __future__ import annotations

import math

import pytest
import torch

from flashi2v_kernels.attention import BLOCK_BACKWARD, LOG_SUM_EXP, reference, torch_cudnn, torch_flash
from flashi2v_kernels.registry import KernelUnavailable, load_backward, load_entry_point, resolve, specs_of

SPECS = [spec for spec in specs_of("attention") if "cpu" in spec.devices]
IMPLEMENTATIONS = {spec.name: load_entry_point(spec) for spec in SPECS}
BACKWARDS = {spec.name: load_backward(spec) for spec in SPECS if "cpu" in spec.features.get(BLOCK_BACKWARD, ())}
# batch, queries, keys, heads, head size
SHAPES = [(1, 1, 1, 1, 2), (3, 7, 5, 2, 24), (2, 17, 17, 3, 16), (1, 1, 9, 2, 128), (1, 33, 19, 4, 6)]
DTYPES = [torch.float32, torch.bfloat16]


def draw(batch, queries, keys, heads, size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(batch + queries * 7 + keys * 31)
    shapes = [(batch, queries, heads, size), (batch, keys, heads, size), (batch, keys, heads, size)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def padding(batch, keys):
    real_keys = torch.tensor([max(1, keys - 2 * sample) for sample in range(batch)])
    return torch.arange(keys)[None, :] < real_keys[:, None]


def run(function, inputs, weights=None, **options):
    """Output and, if weights for the output are given, the gradients of the weighted sum."""
    inputs = [tensor.detach().clone().requires_grad_(weights is not None) for tensor in inputs]
    output = function(*inputs, **options)
    if weights is None:
        return output, []
    return output, torch.autograd.grad((output * weights.to(output.dtype)).sum(), inputs)


def test_reference_is_the_softmax_of_scaled_products():
    query, key, value = draw(2, 3, 4, 2, 6)
    output, lse = reference.attention(query, key, value, return_log_sum_exp=True)
    for b in range(2):
        for h in range(2):
            for q in range(3):
                scores = [float(query[b, q, h] @ key[b, k, h]) / math.sqrt(6) for k in range(4)]
                total = sum(math.exp(score) for score in scores)
                expected = sum(math.exp(score) / total * value[b, k, h] for k, score in enumerate(scores))
                torch.testing.assert_close(output[b, q, h], expected)
                assert math.isclose(lse[b, h, q], math.log(total), rel_tol=1e-12)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_output_and_gradients(name, shape, dtype, padded, assert_near):
    inputs = draw(*shape, dtype=dtype)
    weights = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    mask = padding(shape[0], shape[2]) if padded else None
    actual = run(IMPLEMENTATIONS[name], inputs, weights, key_padding_mask_BK=mask)
    expected = run(reference.attention, [t.double() for t in inputs], weights, key_padding_mask_BK=mask)
    assert actual[0].dtype == dtype
    assert_near(actual[0], expected[0])
    # with one key the weights are constant: the gradients of query and key are rounding alone
    scale = expected[1][2].abs().max() if shape[2] == 1 else None
    for gradient, wanted in zip(actual[1], expected[1], strict=True):
        assert_near(gradient, wanted, scale)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_padded_keys_do_not_count(name, assert_near):
    query, key, value = draw(2, 5, 6, 2, 8, torch.float32)
    mask = torch.tensor([[True] * 4 + [False] * 2] * 2)
    padded = IMPLEMENTATIONS[name](query, key, value, key_padding_mask_BK=mask)
    assert_near(padded, reference.attention(query.double(), key[:, :4].double(), value[:, :4].double()))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_log_sum_exp(name, dtype, padded, assert_near):
    inputs = draw(2, 7, 5, 3, 24, dtype=dtype)
    options = {"key_padding_mask_BK": padding(2, 5) if padded else None, "return_log_sum_exp": True}
    output, lse = IMPLEMENTATIONS[name](*inputs, **options)
    expected, expected_lse = reference.attention(*(t.double() for t in inputs), **options)
    assert output.dtype == dtype
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    assert_near(output, expected)
    assert_near(lse, expected_lse)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_gradients_flow_beside_the_log_sum_exp(name, assert_near):
    inputs = [tensor.requires_grad_() for tensor in draw(2, 7, 5, 3, 24, dtype=torch.float32)]
    output, lse = IMPLEMENTATIONS[name](*inputs, return_log_sum_exp=True)
    assert not lse.requires_grad
    gradients = torch.autograd.grad(output.square().sum(), inputs)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = torch.autograd.grad(reference.attention(*wide).square().sum(), wide)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert_near(gradient, wanted)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_strided_views_and_another_scale(name, assert_near):
    fused = torch.randn(5, 2, 3, 3, 8, generator=torch.Generator().manual_seed(0))  # S B h (q, k, v) D
    views = [part.transpose(0, 1) for part in fused.unbind(3)]
    expected = reference.attention(*(view.double() for view in views), softmax_scale=0.3)
    assert_near(IMPLEMENTATIONS[name](*views, softmax_scale=0.3), expected)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_gradcheck(name):
    inputs = [tensor.requires_grad_() for tensor in draw(2, 3, 4, 2, 6)]
    function, mask = IMPLEMENTATIONS[name], padding(2, 4)
    assert torch.autograd.gradcheck(lambda *qkv: function(*qkv, key_padding_mask_BK=mask), inputs)


# The backward of one block of the keys --------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(2, 7, 11, 3, 24), (1, 1, 2, 1, 2), (1, 33, 40, 2, 128)])
@pytest.mark.parametrize("name", BACKWARDS)
def test_backward_of_blocks_adds_up_to_the_whole(name, shape, dtype, scale, assert_near):
    """Each block is given the output and log-sum-exp over all keys, token first in memory as a ring has them."""
    inputs = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in draw(*shape, dtype=dtype)]
    wide = [tensor.double().requires_grad_() for tensor in inputs]
    output, lse = reference.attention(*wide, softmax_scale=scale, return_log_sum_exp=True)
    weights = draw(*shape, dtype=dtype)[0].flip(1)
    expected = torch.autograd.grad((output * weights.double()).sum(), wide)
    query, key, value = inputs
    output, lse = output.detach().to(dtype), lse.to(torch.promote_types(dtype, torch.float32))
    parts = [
        BACKWARDS[name](weights, query, key[:, block], value[:, block], output, lse, softmax_scale=scale)
        for block in (slice(0, 1), slice(1, None))
    ]
    found = [sum(part[0] for part in parts), *(torch.cat([part[i] for part in parts], dim=1) for i in (1, 2))]
    # a gradient is a difference of larger numbers where a query attends to one key alone
    scale_of_all = max(wanted.abs().max() for wanted in expected)
    for gradient, wanted in zip(found, expected, strict=True):
        assert gradient.dtype == dtype
        assert_near(gradient, wanted, scale_of_all)


def test_who_has_what_a_ring_needs():
    needs = {"features": (LOG_SUM_EXP, BLOCK_BACKWARD), "head_dim": 128, "needs_gradient": True}
    kernel = resolve("attention", "cpu", torch.bfloat16, **needs)
    assert kernel.spec.name == "torch_sdpa" and kernel.backward is BACKWARDS["torch_sdpa"]
    on_gpu = {**needs, "compute_capability": (9, 0)}
    assert resolve("attention", "cuda", torch.bfloat16, **on_gpu).spec.name == "torch_cudnn"
    assert resolve("attention", "cuda", torch.float32, **on_gpu).spec.name == "reference"
    with pytest.raises(KernelUnavailable, match="has no block_backward on cuda; .* torch_cudnn, torch_flash, ref"):
        resolve("attention", "cuda", torch.bfloat16, "torch_sdpa", **on_gpu)


@pytest.mark.parametrize("module", [torch_flash, torch_cudnn])
def test_shapes_of_torchs_kernels_on_cuda(module):
    """torch's shape functions, as there is no GPU: arguments are in the schemas' order, layouts as the reference's."""
    query, key, value = (tensor.to("meta") for tensor in draw(2, 7, 11, 3, 24, dtype=torch.bfloat16))
    output, lse = module.attention(query, key, value, return_log_sum_exp=True)
    assert output.shape == query.shape and output.dtype == torch.bfloat16
    assert lse.shape == (2, 3, 7) and lse.dtype == torch.float32
    gradients = module.attention_backward(output, query, key, value, output, lse, softmax_scale=0.3)
    assert [gradient.shape for gradient in gradients] == [query.shape, key.shape, value.shape]
