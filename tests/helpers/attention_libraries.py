"""flash-attn 4, 3 and 2, Transformer Engine and torch's cuDNN operators as far as our kernels call them.

The signatures are those of flash-attn 2.8 (``flash_attn/flash_attn_interface.py``), of its hopper folder in August
2026, of the wheel flash-attn-4 4.0.0b36 and of Transformer Engine 2.0 to 2.20; a keyword that they do not know is
refused by Python itself. torch has schemas and autograd of the cuDNN operators everywhere, so that a CPU implementation
is enough; what lies where in their results is what a card gave. All compute in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn

from flashi2v_kernels.attention.reference import attention


class _Forward(torch.autograd.Function):
    """Like theirs: only the output has a gradient, and the log-sum-exp is an output that requires one."""

    @staticmethod
    def forward(ctx, q, k, v, scale):
        with torch.no_grad():
            output, lse = attention(q, k, v, softmax_scale=scale, return_log_sum_exp=True)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.scale = scale
        return output, lse

    @staticmethod
    def backward(ctx, dout, *_):
        q, k, v, out, lse = ctx.saved_tensors
        grads = [torch.empty_like(tensor) for tensor in (q, k, v)]
        _backward(dout, q, k, v, out, lse, *grads, ctx.scale)
        return *grads, None


def _backward(dout, q, k, v, out, lse, dq, dk, dv, scale):
    """Writes gradients from the saved log-sum-exp, which may be that of more keys than these."""
    for gradient in (dq, dk, dv):
        assert gradient.stride(-1) == 1
    assert lse.dtype == torch.float32 and lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q_, k_, v_, d_, o_ = (tensor.double() for tensor in (q, k, v, dout, out))
    weights = (torch.einsum("bqhd,bkhd->bhqk", q_, k_) * scale - lse.double()[..., None]).exp()
    grad_scores = weights * (
        torch.einsum("bqhd,bkhd->bhqk", d_, v_) - (d_ * o_).sum(-1).transpose(1, 2)[..., None]
    ) * scale
    dq.copy_(torch.einsum("bhqk,bkhd->bqhd", grad_scores, k_))
    dk.copy_(torch.einsum("bhqk,bqhd->bkhd", grad_scores, q_))
    dv.copy_(torch.einsum("bhqk,bqhd->bkhd", weights, d_))


def _check(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.dtype in (torch.float16, torch.bfloat16), "only fp16 and bf16"
        assert tensor.stride(-1) == 1, "the last dimension must be contiguous"


def _flash_attn_2() -> dict[str, ModuleType]:
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):
        _check(q, k, v)
        assert not causal and dropout_p == 0.0 and window_size == (-1, -1)
        output, lse = _Forward.apply(q, k, v, softmax_scale)
        return (output, lse, None) if return_attn_probs else output

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):
        _check(dout, q, k, v, out)
        assert not causal and dropout_p == 0.0 and (window_size_left, window_size_right) == (-1, -1)
        assert isinstance(softmax_scale, float)
        _backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale)

    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.flash_attn_func = flash_attn_func
    interface._flash_attn_backward = _flash_attn_backward
    return {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


def _flash_attn_3() -> dict[str, ModuleType]:
    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):
        _check(q, k, v)
        assert not causal and window_size == (-1, -1)
        output, lse = _Forward.apply(q, k, v, softmax_scale)
        return (output, lse) if return_attn_probs else output

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):
        _check(dout, q, k, v, out)
        assert not is_causal and isinstance(softmax_scale, float)
        _backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale)

    module = ModuleType("flash_attn_interface")
    module.flash_attn_func, module._flash_attn_backward = flash_attn_func, _flash_attn_backward
    return {"flash_attn_interface": module}


def _flash_attn_4() -> dict[str, ModuleType]:
    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
        block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
    ):
        _check(q, k, v)
        assert qv is None and not causal and window_size == (None, None) and num_splits == 1
        output, lse = _Forward.apply(q, k, v, softmax_scale)
        return output, lse if return_lse or q.requires_grad else None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, *, deterministic=False, dq=None, dk=None, dv=None,
    ):
        _check(q, k, v, out, dout)
        assert not causal and (window_size_left, window_size_right) == (None, None)
        grads = [torch.empty_like(tensor) for tensor in (q, k, v)]
        _backward(dout, q, k, v, out, lse, *grads, softmax_scale)
        return tuple(grads)

    interface = ModuleType("flash_attn.cute.interface")
    interface.flash_attn_func, interface._flash_attn_bwd = flash_attn_func, _flash_attn_bwd
    return {"flash_attn": ModuleType("flash_attn"), "flash_attn.cute": ModuleType("flash_attn.cute"),
            "flash_attn.cute.interface": interface}


@contextmanager
def cudnn_on_cpus() -> Iterator[None]:
    """torch's cuDNN operators on CPUs: outputs in the query's layout, the log-sum-exp [B, h, Q, 1], no random state."""

    def forward(q, k, v, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *,
                scale=None):
        _check(q, k, v)
        assert bias is None and dropout_p == 0.0 and not is_causal and not return_debug_mask
        q_, k_, v_ = (tensor.transpose(1, 2).double() for tensor in (q, k, v))
        out, lse = attention(q_, k_, v_, softmax_scale=scale, return_log_sum_exp=True)
        output = torch.empty_like(q).copy_(out.transpose(1, 2))
        lse = lse.float().unsqueeze(-1) if compute_log_sumexp else q.new_empty(0, dtype=torch.float32)
        state = torch.empty((), dtype=torch.int64)
        return output, lse, None, None, q.shape[2], k.shape[2], state, state.clone(), None

    def backward(dout, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, *,
                 scale=None):
        _check(dout, q, k, v, out)
        assert (bias, cum_q, cum_k) == (None, None, None) and dropout_p == 0.0 and not is_causal
        assert (max_q, max_k) == (q.shape[2], k.shape[2])
        assert lse.shape == (*q.shape[:3], 1) and lse.is_contiguous()
        for state in (seed, offset):
            assert state.dtype == torch.int64 and state.numel() == 1
        grads = [torch.empty_like(tensor) for tensor in (q, k, v)]
        _backward(*(t.transpose(1, 2) for t in (dout, q, k, v, out)), lse.squeeze(-1),
                  *(gradient.transpose(1, 2) for gradient in grads), scale)
        return tuple(grads)

    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("_scaled_dot_product_cudnn_attention", forward, "CPU")
        library.impl("_scaled_dot_product_cudnn_attention_backward", backward, "CPU")
        yield
    finally:
        library._destroy()


class _DotProductAttention(nn.Module):
    def __init__(
        self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, qkv_format="sbhd",
        attn_mask_type="causal", window_size=None, sequence_parallel=False, tp_size=1, get_rng_state_tracker=None,
        tp_group=None, layer_number=None, attention_type="self", cp_group=None, cp_global_ranks=None, cp_stream=None,
        cp_comm_type="p2p", softmax_scale=None,
    ):
        super().__init__()
        assert attn_mask_type == "no_mask" and attention_dropout == 0.0 and qkv_format == "bshd"
        self.heads, self.head_dim, self.scale = num_attention_heads, kv_channels, softmax_scale

    def forward(self, query_layer=None, key_layer=None, value_layer=None, attention_mask=None):
        _check(query_layer, key_layer, value_layer)
        assert query_layer.shape[-2:] == (self.heads, self.head_dim)
        return _Forward.apply(query_layer, key_layer, value_layer, self.scale)[0].flatten(-2)


def _transformer_engine() -> dict[str, ModuleType]:
    package, pytorch = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    pytorch.DotProductAttention = _DotProductAttention
    package.pytorch = pytorch
    return {"transformer_engine": package, "transformer_engine.pytorch": pytorch}


def modules_of(name: str) -> dict[str, ModuleType]:
    """The modules that an implementation's library consists of, for ``sys.modules``."""
    makers = {
        "flash_attn_2": _flash_attn_2, "flash_attn_3": _flash_attn_3, "flash_attn_4": _flash_attn_4,
        "transformer_engine": _transformer_engine, "torch_cudnn": dict,
    }
    return makers[name]()
