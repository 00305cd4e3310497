"""What a bf16 model computes in fp32, seen where it is computed, and that the flow's numbers are not rounded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.reference_weights import fill, random_weights
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.flow.sinusoid import timestep_sinusoid
from megatron_flashi2v.models.spec import make_spec
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.training import step
from megatron_flashi2v.training.batch import Microbatch

CONFIG = ModelConfig(
    num_layers=2, hidden_size=48, ffn_hidden_size=64, num_attention_heads=2, latent_channels=4, freq_dim=16,
    text_dim=12, text_length=6, phi_hidden_channels=8, phi_kernel_size=(3, 3, 3), phi_order="repeat_then_conv",
)
MOVES = {
    "_to_copy", "view", "_unsafe_view", "t", "transpose", "unbind", "detach", "clone", "permute", "select", "slice",
    "empty", "empty_like", "copy_", "stack",
}
"""Operations that compute nothing."""
IN_BF16 = {
    ("patch_embedding", "addmm"),
    ("conditioning.fourier_embedding.conv_in", "addmm"),
    ("conditioning.fourier_embedding.conv_out", "addmm"),
    ("", "add"),  # tokens and guidance
    ("text_embedding.linear_1", "mm"),
    ("text_embedding.linear_2", "addmm"),
    *((f"blocks.{linear}", "addmm") for linear in (
        "self_attention.linear_qkv", "self_attention.linear_proj", "cross_attention.linear_q",
        "cross_attention.linear_kv", "cross_attention.linear_proj", "mlp.linear_fc2",
    )),
    ("blocks.mlp.linear_fc1", "mm"),  # its bias is added with the activation, in fp32
    ("blocks.self_attention", "attention"),
    ("blocks.cross_attention", "attention"),
}
"""Everything that a bf16 model computes in bf16, besides its residual stream."""
RESIDUAL_STREAM = {("blocks", "add"), ("blocks", "addcmul"), ("blocks.norm_cross", "addcmul")}
"""The cross-attention's update is added in bf16; the gated ones in fp32, because of the gate, and rounded once."""
IN_FP32 = {
    ("text_embedding", "gelu"),
    ("blocks.mlp", "gelu"),
    ("conditioning.phi.conv_in", "convolution"),
    ("conditioning.phi", "silu"),
    ("conditioning.phi.conv_out", "convolution"),
    ("conditioning", "sub"),  # x_t - phi
    ("time_embedding.linear_1", "addmm"),
    ("time_embedding", "silu"),
    ("time_embedding.linear_2", "addmm"),
    ("time_embedding.projection", "addmm"),
    ("blocks", "native_layer_norm"),
    ("blocks", "add"),  # the modulation table and the projected time
    ("blocks.self_attention.norm_q", "mul"),  # weight and rotary positions
    ("blocks.self_attention.norm_k", "mul"),
    ("blocks.self_attention.norm_q", "rsqrt"),
    ("blocks.self_attention.norm_k", "rsqrt"),
    ("blocks.cross_attention.norm_q", "rsqrt"),
    ("blocks.cross_attention.norm_k", "rsqrt"),
    ("blocks.norm_cross", "native_layer_norm"),
    ("head", "native_layer_norm"),
    ("head.linear", "addmm"),
    ("loss", "sub"),
    ("loss", "pow"),
    ("loss", "sum"),
}
"""Some that must be in fp32 and must be seen, so that a renamed module cannot hide from the first list."""


@dataclass(frozen=True)
class Operation:
    """One operation inside a module: the module's name, the operation's, dtypes of what went in and came out."""

    module: str
    name: str
    inputs: tuple[torch.dtype, ...]
    outputs: tuple[torch.dtype, ...]


class Recorder(TorchDispatchMode):
    """Records every operation on floating-point tensors, with the module whose forward runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._inside: list[str] = ["loss"]
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self._inside.append(name))
            module.register_forward_hook(self._leave)

    def _leave(self, *_: Any) -> None:
        self._inside.pop()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        inputs, outputs = floating((arguments, keywords or {})), floating(result)
        if inputs or outputs:
            self.operations.append(Operation(self._inside[-1], function.overloadpacket.__name__, inputs, outputs))
        return result


def floating(values: Any) -> tuple[torch.dtype, ...]:
    """dtypes of the floating-point tensors with an axis; scalars are promoted by what they meet."""
    leaves = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
    return tuple(leaf.dtype for leaf in leaves if leaf.is_floating_point() and leaf.ndim)


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with single_process(resolve_device("cpu")) as groups:
        yield groups


def build(groups: Groups, **precision: bool) -> DiffusionTransformer:
    """A model of random weights, the same for all precisions but for rounding."""
    model = DiffusionTransformer(make_spec(CONFIG, groups, torch.device("cpu"), **precision))
    fill(model, random_weights(CONFIG, "wan", torch.Generator().manual_seed(0)), "wan")
    return model


def make_batch() -> Microbatch:
    generator = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(2, 4, 3, 4, 6, generator=generator) for _ in range(2))
    sigma_B = torch.rand(2, generator=generator)
    return Microbatch(
        latents_BCTHW=latents, noise_BCTHW=noise, sigma_B=sigma_B,
        sinusoid_BF=timestep_sinusoid(1000 * sigma_B, CONFIG.freq_dim),
        text_BLX=torch.randn(2, 6, 12, generator=generator),
        extras={"cutoff_ratio": torch.rand(2, generator=generator)},
    )


def record(model: DiffusionTransformer) -> list[Operation]:
    """The operations of one forward pass and its loss."""
    recorder = Recorder(model)
    with recorder:
        output, loss = step.forward_step(model.spec, iter([make_batch()]), model)
        loss(output)
    return recorder.operations


def arithmetic_of(operation: Operation) -> torch.dtype:
    """The dtype that an operation computes in: that of its result."""
    if operation.name == "native_layer_norm" and torch.float32 in operation.inputs:
        return operation.outputs[1]  # of its mean: with fp32 weights it reads and writes 16-bit rows, and no more
    return (operation.outputs or operation.inputs)[0]


def computed_in(operations: list[Operation], dtype: torch.dtype) -> set[tuple[str, str]]:
    """(module without its block's number, operation) of what computes in a dtype."""
    return {
        (re.sub(r"^blocks\.\d+", "blocks", operation.module),
         "attention" if operation.name.startswith("_scaled_dot_product") else operation.name)
        for operation in operations
        if operation.name not in MOVES and dtype == arithmetic_of(operation)
    }


@pytest.mark.parametrize("fp32_residual_connection", [False, True])
def test_what_computes_in_bf16(groups: Groups, fp32_residual_connection: bool) -> None:
    operations = record(build(groups, bf16=True, fp32_residual_connection=fp32_residual_connection))
    expected = IN_BF16 if fp32_residual_connection else IN_BF16 | RESIDUAL_STREAM
    assert computed_in(operations, torch.bfloat16) == expected
    assert computed_in(operations, torch.float32) >= IN_FP32
    # Where bf16 and fp32 meet, fp32 decides: updates of the residual stream are gated and added in fp32.
    mixed = {(operation.name, operation.outputs[:1]) for operation in operations if len(set(operation.inputs)) > 1
             and torch.bfloat16 in operation.inputs and operation.name not in MOVES}
    out = torch.float32 if fp32_residual_connection else torch.bfloat16
    assert mixed <= {("mul", (torch.float32,)), ("add", (torch.float32,)), ("addcmul", (out,)),
                     ("native_layer_norm", (out,))}


def test_an_fp32_model_computes_nothing_in_bf16(groups: Groups) -> None:
    assert not computed_in(record(build(groups)), torch.bfloat16)


def captured(model: DiffusionTransformer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What crosses the borders of the flow and of phi during one forward pass and loss."""
    seen: dict[str, Tensor] = {}

    def keep_input(name: str) -> Any:
        return lambda module, inputs: seen.update({name: inputs[0]})

    def keep_conditioned(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.update(noisy=inputs[0], image=inputs[1], shifted=output.latents_BCTHW, features=output.guidance_BCTHW)

    model.conditioning.register_forward_hook(keep_conditioned)
    model.conditioning.phi.register_forward_hook(lambda module, inputs, output: seen.update(phi=output))
    model.time_embedding.linear_1.register_forward_pre_hook(keep_input("sinusoid"))
    error = step.squared_error_sum
    with monkeypatch.context() as patch:
        patch.setattr(
            step, "squared_error_sum",
            lambda prediction, target, dim: (
                seen.update(prediction=prediction, target=target) or error(prediction, target, dim)
            ),
        )
        output, loss = step.forward_step(model.spec, iter([make_batch()]), model)
        seen["loss"] = loss(output)[0]
    return seen


def test_the_flows_numbers_are_those_of_an_fp32_run(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise and sigma by way of x_t; the sinusoid, target and phi as they are. Rounding any to bf16 would show."""
    rounded, exact = (captured(build(groups, bf16=bf16), monkeypatch) for bf16 in (True, False))
    follow = {"prediction", "loss"}  # they follow the matrix products
    for name in exact.keys() - follow:
        assert torch.equal(rounded[name], exact[name]), name
        assert not torch.equal(exact[name].bfloat16().float(), exact[name]), f"{name} does not tell"
    assert {tensor.dtype for tensor in rounded.values()} == {torch.float32}
    assert all(not torch.equal(rounded[name], exact[name]) for name in follow)
