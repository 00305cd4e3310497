"""NPU implementations through the schema-true stand-in for torch_npu, against the fp64 references."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.stand_in import torch_npu  # noqa: F401

from flashi2v_kernels.attention import BLOCK_BACKWARD, LOG_SUM_EXP
from flashi2v_kernels.attention import reference as attention_reference
from flashi2v_kernels.qk_norm_rope import reference as qk_reference
from flashi2v_kernels.qk_norm_rope.tables import rope_tables
from flashi2v_kernels.registry import load_entry_point, resolve, specs_of
from flashi2v_kernels.rms_norm import reference as rms_norm_reference
from flashi2v_kernels.rms_norm.statistics import local_sum_of_squares

DTYPES = [torch.float32, torch.bfloat16]
# batch, queries, keys, heads, head size
SHAPES = [(1, 1, 1, 1, 2), (3, 7, 5, 2, 24), (2, 17, 17, 3, 16), (1, 1, 9, 2, 128), (1, 33, 19, 4, 6)]

pytestmark = pytest.mark.usefixtures("torch_npu")


def implementation(operator, name):
    (spec,) = [spec for spec in specs_of(operator) if spec.name == name]
    assert spec.devices == ("npu",) and spec.package == "torch_npu"
    return load_entry_point(spec)


def draw(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def draw_qkv(batch, queries, keys, heads, size, dtype):
    shapes = [(batch, queries, heads, size), (batch, keys, heads, size), (batch, keys, heads, size)]
    return [draw(shape, dtype, seed) for seed, shape in enumerate(shapes)]


def padding(batch, keys):
    real_keys = torch.tensor([max(1, keys - 2 * sample) for sample in range(batch)])
    return torch.arange(keys)[None, :] < real_keys[:, None]


def run(function, inputs, weights, **options):
    """Output, and gradients of the weighted sum."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*inputs, **options)
    return output, *torch.autograd.grad((output * weights.to(output.dtype)).sum(), inputs)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(shape, dtype, padded, assert_near):
    attention = implementation("attention", "npu_fusion_attention")
    inputs, weights = draw_qkv(*shape, dtype), draw((*shape[:2], *shape[3:]), dtype, 5)
    mask = padding(shape[0], shape[2]) if padded else None
    actual = run(attention, inputs, weights, key_padding_mask_BK=mask)
    expected = run(attention_reference.attention, [t.double() for t in inputs], weights, key_padding_mask_BK=mask)
    # with one key the weights are constant: the gradients of query and key are rounding alone
    scales = [None, *[expected[3].abs().max() if shape[2] == 1 else None] * 2, None]
    for ours, wanted, scale in zip(actual, expected, scales, strict=True):
        assert ours.dtype == dtype
        assert_near(ours, wanted, scale)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_log_sum_exp_and_another_scale(dtype, padded, assert_near):
    attention = implementation("attention", "npu_fusion_attention")
    inputs = [tensor.requires_grad_() for tensor in draw_qkv(2, 7, 5, 3, 24, dtype)]
    options = {"key_padding_mask_BK": padding(2, 5) if padded else None, "softmax_scale": 0.3}
    output, lse = attention(*inputs, **options, return_log_sum_exp=True)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected, expected_lse = attention_reference.attention(*wide, **options, return_log_sum_exp=True)
    assert lse.dtype == torch.float32 and not lse.requires_grad
    assert_near(output, expected)
    assert_near(lse, expected_lse)
    grads, wanted = (torch.autograd.grad(o.float().square().sum(), i) for o, i in ((output, inputs), (expected, wide)))
    for ours, want in zip(grads, wanted, strict=True):
        assert_near(ours, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_attention_backward_of_blocks_adds_up(blocks, dtype, assert_near):
    """The gradient over all keys is the sum of those over parts of them, given the whole output and log-sum-exp."""
    kernel = resolve("attention", "npu", dtype, features=[LOG_SUM_EXP, BLOCK_BACKWARD], soc="Ascend910B3")
    assert kernel.spec.name == "npu_fusion_attention" and kernel.backward is not None
    inputs, weights = draw_qkv(2, 7, 9, 3, 24, dtype), draw((2, 7, 3, 24), dtype, 5)
    output, lse = kernel.function(*inputs, return_log_sum_exp=True)
    expected = run(attention_reference.attention, [tensor.double() for tensor in inputs], weights.double())
    query, *keys_and_values = inputs
    parts = [
        kernel.backward(weights, query, key, value, output, lse)
        for key, value in zip(*(tensor.chunk(blocks, dim=1) for tensor in keys_and_values), strict=True)
    ]
    grad_query = sum(part[0].float() for part in parts).to(dtype)
    assert_near(grad_query, expected[1])
    for i in (1, 2):
        assert_near(torch.cat([part[i] for part in parts], dim=1), expected[i + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (7, 3, 2, 24), (1, 2, 5, 6), (5, 1, 3, 128), (4, 9)])
def test_rms_norm(shape, dtype, assert_near):
    norm = implementation("rms_norm", "npu_rms_norm")
    tail = math.prod(shape[2:]) if len(shape) == 4 else shape[-1]
    x, weight, weights = draw(shape, dtype), draw((tail,), torch.float32, 1), draw(shape, dtype, 2)
    actual = run(norm, [x, weight], weights, eps=1e-6)
    expected = run(rms_norm_reference.rms_norm, [x.double(), weight.double()], weights, eps=1e-6)
    assert [tensor.dtype for tensor in actual] == [dtype, dtype, torch.float32]
    for ours, wanted in zip(actual, expected, strict=True):
        assert_near(ours, wanted)


def test_rms_norm_of_strided_views_and_its_limits(assert_near):
    norm = implementation("rms_norm", "npu_rms_norm")
    query = draw((5, 2, 3, 3, 8), torch.float32)[:, :, :, 0]  # S B h (q, k, v) D
    weight = draw((24,), torch.float32, 1)
    expected = rms_norm_reference.rms_norm(query.double(), weight.double(), 1e-6)
    assert_near(norm(query, weight, 1e-6), expected)
    assert_near(norm(query, weight.bfloat16().float().view(3, 8), 1e-6),
                rms_norm_reference.rms_norm(query.double(), weight.bfloat16().double(), 1e-6))
    assert_near(norm(query, weight.bfloat16(), 1e-6),
                rms_norm_reference.rms_norm(query.double(), weight.bfloat16().double(), 1e-6))
    with pytest.raises(ValueError, match="partial_sums"):
        norm(query, weight, 1e-6, torch.ones(5, 2), 48)
    with pytest.raises(ValueError, match="weight"):
        norm(query, draw((25,), torch.float32), 1e-6)


@pytest.mark.parametrize("shards", [None, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("grid", "batch", "heads", "head_dim"),
    [((1, 1, 1), 1, 2, 2), ((3, 5, 7), 3, 2, 24), ((2, 3, 1), 2, 4, 6), ((1, 9, 3), 1, 2, 128)],
)
def test_norm_and_rope(grid, batch, heads, head_dim, dtype, shards, assert_near):
    """Alone, and as ranks that hold some of the heads and share their sums of squares."""
    function, tables = implementation("qk_norm_rope", "npu_rms_norm_rotary_mul"), rope_tables(grid, head_dim)
    x = draw((tables[0].shape[0], batch, 3 * heads, head_dim), dtype)[:, :, ::3]  # a strided view
    weight, weights = draw((heads * head_dim,), torch.float32, 1), draw(x.shape, dtype, 2)

    def sharded(x, weight):
        if shards is None:
            return function(x, weight, *tables, 1e-6)
        total = sum(local_sum_of_squares(part, 2) for part in x.chunk(shards, dim=2))
        parts = zip(x.chunk(shards, dim=2), weight.chunk(shards), strict=True)
        sums = {"sum_of_squares": total, "full_width": heads * head_dim}
        return torch.cat([function(part, row, *tables, 1e-6, **sums) for part, row in parts], dim=2)

    actual = run(sharded, [x, weight], weights)
    expected = run(lambda x, w: qk_reference.qk_norm_rope(x, w, *tables, 1e-6), [x.double(), weight.double()], weights)
    if dtype == torch.bfloat16:  # rounded once: almost everywhere the bf16 number next to the true one
        assert (actual[0] == expected[0].bfloat16()).double().mean() > 0.97
    assert [tensor.dtype for tensor in actual] == [dtype, dtype, torch.float32]
    for ours, wanted in zip(actual, expected, strict=True):
        assert_near(ours, wanted)


def test_norm_and_rope_keeps_the_heads_as_they_are():
    function, tables = implementation("qk_norm_rope", "npu_rms_norm_rotary_mul"), rope_tables((1, 2, 3), 8)
    x, weight = draw((6, 2, 3, 8), torch.bfloat16).requires_grad_(), draw((24,), torch.float32).requires_grad_()
    for sums in ({}, {"sum_of_squares": torch.ones(6, 2), "full_width": 24}):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
            function(x, weight, *tables, 1e-6, **sums)
        assert [tensor.dtype for tensor in saved if tensor.numel() >= x.numel()] == [torch.bfloat16]
    with pytest.raises(ValueError, match="both"):
        function(x, weight, *tables, 1e-6, full_width=24)
    with pytest.raises(ValueError, match="sums"):
        function(x, weight, *tables, 1e-6, sum_of_squares=torch.ones(6), full_width=24)


def test_automatic_choices_on_an_npu():
    """The stand-in's package is found: its metadata lies beside it."""
    for operator, name in (("attention", "npu_fusion_attention"), ("rms_norm", "npu_rms_norm"),
                           ("qk_norm_rope", "npu_rms_norm_rotary_mul"),
                           ("fourier_highpass", "matmul_dft")):
        assert resolve(operator, "npu", torch.float32, soc="Ascend910B3").spec.name == name
        assert resolve(operator, "npu", torch.float32, soc="Ascend910_9392").spec.name == name
    kernel = resolve("rms_norm", "npu", torch.bfloat16, features=["partial_sums"], soc="Ascend910B3")
    assert kernel.spec.name == "torch"
    assert "npu_rms_norm: has no partial_sums on npu" in kernel.why_not
    old = resolve("attention", "npu", torch.bfloat16, soc="Ascend910ProB")
    assert old.spec.name == "torch_sdpa" and "this device is Ascend910ProB" in old.why_not[0]
    assert resolve("attention", "npu", torch.bfloat16, head_dim=800, soc="Ascend910B3").spec.name == "torch_sdpa"


def refused(message):
    return pytest.raises((RuntimeError, TypeError), match=message)


def test_the_stand_in_refuses_wrong_arguments(torch_npu):  # noqa: F811
    q, k, v = draw_qkv(2, 4, 6, 3, 8, torch.float32)
    for wrong, message in [
        ({"scale_value": 1.0}, "scale_value"),
        ({"attn_mask": None}, "attn_mask"),
        ({"atten_mask": torch.zeros(2, 1, 1, 6, dtype=torch.bool)}, "atten_mask is"),
        ({"atten_mask": torch.zeros(4, 6)}, "not bool"),
        ({"sparse_mode": 1}, "needs an atten_mask"),
        ({"keep_prob": 1.5}, "keep_prob"),
    ]:
        with refused(message):
            torch_npu.npu_fusion_attention(q, k, v, 3, "BSND", **wrong)
    for heads, layout, message in [(3, "BSHD", "input_layout"), (3, "TND", "actual_seq"), (2, "BSND", "head_num")]:
        with refused(message):
            torch_npu.npu_fusion_attention(q, k, v, heads, layout)
    with refused("float64"):
        torch_npu.npu_fusion_attention(q.double(), k.double(), v.double(), 3, "BSND")
    with refused("scale"):
        torch_npu.npu_fusion_attention_grad(q, k, v, q, 3, "BSND", attention_in=q, scale=1.0)
    with refused("attention_in"):
        torch_npu.npu_fusion_attention_grad(q, k, v, q, 3, "BSND")
    with refused("gamma"):
        torch_npu.npu_rms_norm(q, draw((5,), torch.float32))
    with refused("eps"):
        torch_npu.npu_rms_norm(q, draw((8,), torch.float32), eps=1e-6)
    table = draw((1, 4, 1, 8), torch.float32)
    for x, tables, mode, message in [
        (q, (table, table), "interleaved", "rotary_mode"), (q, (table.double(),) * 2, "interleave", "float64"),
        (q, (table.bfloat16(),) * 2, "interleave", "dtype"), (q, (table[..., :4],) * 2, "interleave", "head size"),
        (q, (table[:, :3],) * 2, "interleave", "broadcast"),
        (q.expand(2, 4, 3, 8).repeat(200, 1, 1, 1), (table, table), "interleave", "1000"),
    ]:
        with refused(message):
            torch_npu.npu_rotary_mul(x, *tables, mode)
    with refused("approximate"):
        torch_npu.npu_gelu(q, approximate="sigmoid")


def test_the_stand_ins_gelu_has_its_gradient(torch_npu):  # noqa: F811
    x = draw((3, 5), torch.float32).requires_grad_()
    ours = torch_npu.npu_gelu(x, approximate="tanh")
    theirs = torch.nn.functional.gelu(x, approximate="tanh")
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(output.square().sum(), x) for output in (ours, theirs)))
