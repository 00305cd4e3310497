"""npu_* operators: schemas of torch_npu 2.13.0, CPU kernels, autograd, and the refusals that are documented."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_npu import attention, elementwise
from torch_npu.refusals import require

SCHEMAS = {
    "npu_fusion_attention":
        "(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, Tensor? pse=None, "
        "Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., "
        "int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, "
        "int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, "
        'bool sync=False, str softmax_layout="", Tensor? sink=None, Tensor? dropout_mask=None, int seed=0, '
        "int offset=0) -> (Tensor, Tensor, Tensor, Tensor, int, int, int)",
    "npu_fusion_attention_grad":
        "(Tensor query, Tensor key, Tensor value, Tensor dy, int head_num, str input_layout, *, Tensor? pse=None, "
        "Tensor? padding_mask=None, Tensor? atten_mask=None, Tensor? softmax_max=None, Tensor? softmax_sum=None, "
        "Tensor? softmax_in=None, Tensor? attention_in=None, float scale_value=1., float keep_prob=1., "
        "int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int seed=0, int offset=0, "
        "int numels=0, int[]? prefix=None, int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, "
        'int sparse_mode=0, bool gen_mask_parallel=True, bool sync=False, str softmax_layout="", Tensor? sink=None) '
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "npu_rms_norm": "(Tensor input, Tensor gamma, float epsilon=9.9999999999999995e-07) -> (Tensor, Tensor)",
    "npu_rms_norm_backward": "(Tensor dy, Tensor input, Tensor gamma, Tensor rstd) -> (Tensor, Tensor)",
    "npu_rotary_mul":
        '(Tensor input, Tensor r1, Tensor r2, str rotary_mode="half", Tensor? rotate=None) -> Tensor',
    "npu_rotary_mul_backward":
        '(Tensor grad, Tensor input, Tensor r1, Tensor r2, str rotary_mode="half") -> (Tensor, Tensor, Tensor)',
    "npu_gelu": '(Tensor input, *, str approximate="none") -> Tensor',
}
KERNELS: dict[str, Callable[..., Any]] = {
    "npu_fusion_attention": attention.forward,
    "npu_fusion_attention_grad": attention.backward,
    "npu_rms_norm": elementwise.rms_norm,
    "npu_rms_norm_backward": elementwise.rms_norm_backward,
    "npu_rotary_mul": elementwise.rotary_mul,
    "npu_rotary_mul_backward": elementwise.rotary_mul_backward,
    "npu_gelu": elementwise.gelu,
}

calls: dict[str, int] = dict.fromkeys(SCHEMAS, 0)
"""How often each operator's kernel ran, backward passes included."""

library = torch.library.Library("npu", "DEF")


def call(name: str) -> Callable[..., Any]:
    """The operator as ``torch_npu.<name>``."""
    return getattr(torch.ops.npu, name)


def _counted(name: str) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        require(name, len({tensor.device for tensor in tensors}) == 1, "tensors are on different devices")
        calls[name] += 1
        return KERNELS[name](*args, **kwargs)

    return kernel


for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema)
    library.impl(_name, _counted(_name), "CPU")

torch.library.register_autograd(
    "npu::npu_fusion_attention", attention.differentiate, setup_context=attention.remember, lib=library
)
torch.library.register_autograd(
    "npu::npu_rms_norm", elementwise.differentiate_rms_norm, setup_context=elementwise.remember_rms_norm, lib=library
)
torch.library.register_autograd(
    "npu::npu_rotary_mul", elementwise.differentiate_rotary, setup_context=elementwise.remember_rotary, lib=library
)
torch.library.register_autograd(
    "npu::npu_gelu", elementwise.differentiate_gelu, setup_context=elementwise.remember_gelu, lib=library
)
