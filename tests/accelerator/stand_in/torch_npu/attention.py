"""npu_fusion_attention and its gradient, as documented: a mask of True hides; max and sum are [B, N, S, 8]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_npu.refusals import require, require_floats

# Where B, N, S and D are, once H is split into N and D; where B, S ... come from in [B, N, S, D].
_INTO = {"BSH": (0, 2, 1, 3), "SBH": (1, 2, 0, 3), "BSND": (0, 2, 1, 3), "BNSD": (0, 1, 2, 3)}
_OUT_OF = {"BSH": (0, 2, 1, 3), "SBH": (2, 0, 1, 3), "BSND": (0, 2, 1, 3), "BNSD": (0, 1, 2, 3)}
_REPLICAS = 8


def _to_bnsd(tensor: Tensor, layout: str, heads: int) -> Tensor:
    return (tensor if len(layout) == 4 else tensor.unflatten(-1, (heads, -1))).permute(_INTO[layout])


def _from_bnsd(tensor: Tensor, layout: str) -> Tensor:
    tensor = tensor.permute(_OUT_OF[layout])
    return (tensor if len(layout) == 4 else tensor.flatten(2)).contiguous()


def _check(name: str, tensors: tuple[Tensor, ...], head_num: int, layout: str, arguments: dict[str, Any]) -> None:
    require(name, layout in (*_INTO, "TND"), f"The input_layout should be BSH/SBH/BNSD/BSND/TND, but got {layout}")
    require(name, layout != "TND", "actual_seq_qlen and actual_seq_kvlen are needed in the TND layout (not emulated)")
    require_floats(name, *tensors)
    require(name, len({tensor.dtype for tensor in tensors}) == 1, "query, key and value differ in dtype")
    require(name, all(tensor.ndim == len(layout) for tensor in tensors), f"the tensors have not {layout}'s dimensions")
    query, key, value = (_to_bnsd(tensor, layout, head_num) for tensor in tensors[:3])
    require(name, query.shape[1] == head_num <= 256, f"head_num {head_num} is not the query's, or above 256")
    require(name, key.shape == value.shape, "key and value differ in shape")
    require(name, query.shape[1] % key.shape[1] == 0, "the query's heads are no multiple of the keys'")
    require(name, query.shape[-1] == key.shape[-1] <= 768, "head sizes differ, or are above 768")
    require(name, 0.0 < arguments["keep_prob"] <= 1.0, "keep_prob must be in (0, 1]")
    for unsupported in ("pse", "padding_mask", "prefix", "actual_seq_qlen", "actual_seq_kvlen", "sink"):
        require(name, arguments.get(unsupported) is None, f"{unsupported} is not emulated")
    require(name, arguments["keep_prob"] == 1.0, "dropout is not emulated")
    mask, mode = arguments.get("atten_mask"), arguments["sparse_mode"]
    require(name, mode in (0, 1), f"sparse_mode {mode} is not emulated")
    require(name, mode == 0 or mask is not None, "sparse_mode 1 needs an atten_mask")
    if mask is not None:
        batch, heads, queries, keys = *query.shape[:3], key.shape[2]
        require(name, mask.dtype in (torch.bool, torch.uint8), f"atten_mask is {mask.dtype}, not bool or uint8")
        allowed = [(batch, heads, queries, keys), (batch, 1, queries, keys), (1, 1, queries, keys), (queries, keys)]
        require(name, tuple(mask.shape) in allowed, f"atten_mask is {tuple(mask.shape)}, not one of {allowed}")


def _scores(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    scores = torch.einsum("bnqd,bnkd->bnqk", query.float(), key.float()) * scale
    return scores if mask is None else scores.masked_fill(mask.bool(), float("-inf"))


def forward(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """Output, softmax max and sum, an empty tensor, seed, offset and number of elements."""
    names = [argument.name for argument in torch.ops.npu.npu_fusion_attention.default._schema.arguments[5:]]
    arguments = {"keep_prob": 1.0, "sparse_mode": 0, "scale": 1.0, **dict(zip(names, args, strict=False)), **kwargs}
    _check("npu_fusion_attention", (query, key, value), head_num, input_layout, arguments)
    q, k, v = (_to_bnsd(tensor, input_layout, head_num) for tensor in (query, key, value))
    scores = _scores(q, k, arguments["scale"], arguments.get("atten_mask"))
    highest = scores.amax(dim=-1, keepdim=True)
    weights = (scores - highest).exp()
    total = weights.sum(dim=-1, keepdim=True)
    output = torch.einsum("bnqk,bnkd->bnqd", weights / total, v.float()).to(query.dtype)
    statistics = [tensor.expand(*tensor.shape[:-1], _REPLICAS).contiguous() for tensor in (highest, total)]
    return _from_bnsd(output, input_layout), *statistics, query.new_empty(0), 0, 0, 0


def backward(
    query: Tensor, key: Tensor, value: Tensor, dy: Tensor, head_num: int, input_layout: str, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from the saved statistics, and two empty ones (pse, sink)."""
    name = "npu_fusion_attention_grad"
    arguments = {"keep_prob": 1.0, "sparse_mode": 0, "scale_value": 1.0, **kwargs}
    output = arguments.get("attention_in")
    require(name, output is not None, "attention_in is missing")
    assert output is not None
    _check(name, (query, key, value, dy, output), head_num, input_layout, arguments)
    q, k, v, grad, out = (_to_bnsd(t, input_layout, head_num).float() for t in (query, key, value, dy, output))
    for statistic in (arguments.get("softmax_max"), arguments.get("softmax_sum")):
        require(name, statistic is not None, "softmax_max or softmax_sum is missing")
        assert statistic is not None
        require(name, statistic.dtype == torch.float32, "softmax_max and softmax_sum must be float32")
        require(name, tuple(statistic.shape) == (*q.shape[:3], _REPLICAS), "the statistics are not [B, N, S, 8]")
    scores = _scores(q, k, arguments["scale_value"], arguments.get("atten_mask"))
    weights = (scores - arguments["softmax_max"][..., :1]).exp() / arguments["softmax_sum"][..., :1]
    grad_value = torch.einsum("bnqk,bnqd->bnkd", weights, grad)
    grad_weights = torch.einsum("bnqd,bnkd->bnqk", grad, v)
    grad_scores = weights * (grad_weights - (grad * out).sum(-1, keepdim=True)) * arguments["scale_value"]
    grad_query = torch.einsum("bnqk,bnkd->bnqd", grad_scores, k)
    grad_key = torch.einsum("bnqk,bnqd->bnkd", grad_scores, q)
    grads = [_from_bnsd(tensor.to(query.dtype), input_layout) for tensor in (grad_query, grad_key, grad_value)]
    return *grads, query.new_empty(0), query.new_empty(0)


def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    """Keep what the gradient takes."""
    query, key, value, head_num, layout, _, _, mask, scale, _, _, _, _, _, _, _, sparse_mode = inputs[:17]
    ctx.save_for_backward(query, key, value, mask, *output[:3])
    ctx.head_num, ctx.layout, ctx.scale, ctx.sparse_mode = head_num, layout, scale, sparse_mode
    ctx.mark_non_differentiable(*output[1:4])


def differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    """The gradient that the operator's autograd node calls."""
    query, key, value, mask, output, highest, total = ctx.saved_tensors
    grads = torch.ops.npu.npu_fusion_attention_grad(
        query, key, value, grad, ctx.head_num, ctx.layout, atten_mask=mask, softmax_max=highest, softmax_sum=total,
        attention_in=output, scale_value=ctx.scale, sparse_mode=ctx.sparse_mode,
    )
    return *grads[:3], *[None] * 21
