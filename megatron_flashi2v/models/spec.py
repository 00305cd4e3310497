"""Settings shared by all modules of one model: dimensions, megatron-core's configuration, groups, kernels, linears."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from flashi2v_kernels.attention import BLOCK_BACKWARD, LOG_SUM_EXP
from flashi2v_kernels.registry import Kernel, KernelUnavailable, resolve, specs_of
from flashi2v_kernels.rms_norm import PARTIAL_SUMS
from megatron_flashi2v.conditioning.build import paradigm_of
from megatron_flashi2v.config.adapter import AdapterConfig
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import BackendArguments
from megatron_flashi2v.models.backend import linear_provider, megatron_fields
from megatron_flashi2v.parallel.groups import Groups

ELEMENTWISE = ("ada_layer_norm", "residual_norm", "gate_residual", "bias_gelu_tanh", "rms_norm", "qk_norm_rope")


@dataclass(frozen=True)
class KernelSet:
    """The implementations chosen for this model, once, when it is built; ``chosen`` lists them with the reasons."""

    chosen: tuple[Kernel, ...]
    attention: Callable[..., Any]
    attention_backward: Callable[..., Any] | None
    ada_layer_norm: Callable[..., Tensor]
    residual_norm: Callable[..., tuple[Tensor, Tensor]]
    gate_residual: Callable[..., Tensor]
    bias_gelu_tanh: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    qk_norm_rope: Callable[..., Tensor]
    highpass: Callable[..., Tensor]


def choose_kernels(
    device: torch.device,
    dtype: torch.dtype,
    config: ModelConfig,
    attention_backend: str = "auto",
    *,
    elementwise_backend: str = "auto",
    ring: bool = False,
    tensor_parallel: bool = False,
) -> KernelSet:
    """Resolve every operator for the device.

    Args:
        device: where the model lives.
        dtype: dtype of matrix products and attention.
        config: the head size limits some implementations.
        attention_backend: an implementation's name, or auto.
        elementwise_backend: the same for norms, modulation and activation, for measurements; an operator that has no
            implementation of that name takes its automatic one.
        ring: whether keys and values pass around a ring, for which an implementation needs more abilities.
        tensor_parallel: whether heads, and so the norms' sums, are divided over ranks.

    Raises:
        ConfigError: the named choice of attention cannot run here, or no elementwise operator knows the name; the
            error lists those that can.
    """
    features = (LOG_SUM_EXP, BLOCK_BACKWARD) if ring else ()
    try:
        attention = resolve("attention", device.type, dtype, attention_backend, head_dim=config.head_dim,
                            features=features, needs_gradient=True)
    except KernelUnavailable as error:
        needs = " (with ring attention)" if ring else ""
        raise ConfigError(f"--attention-backend {attention_backend}{needs}: {error}") from error
    choices = _elementwise_choices(elementwise_backend)
    sums = (PARTIAL_SUMS,) if tensor_parallel else ()
    elementwise = {
        name: resolve(name, device.type, dtype, choices[name], needs_gradient=True)
        for name in ("ada_layer_norm", "residual_norm", "gate_residual", "bias_gelu_tanh")
    }
    norms = {
        name: resolve(name, device.type, dtype, choices[name], head_dim=config.head_dim, features=sums,
                      needs_gradient=True)
        for name in ("rms_norm", "qk_norm_rope")
    }
    highpass = resolve("fourier_highpass", device.type, torch.float32)
    return KernelSet(
        chosen=(attention, *elementwise.values(), *norms.values(), highpass),
        attention=attention.function,
        attention_backward=attention.backward,
        highpass=highpass.function,
        **{name: kernel.function for name, kernel in (elementwise | norms).items()},
    )


def _elementwise_choices(backend: str) -> dict[str, str]:
    """The implementation to ask for, by operator."""
    names = {operator: {spec.name for spec in specs_of(operator)} for operator in ELEMENTWISE}
    if backend != "auto" and not any(backend in known for known in names.values()):
        known = ", ".join(sorted(set[str]().union(*names.values())))
        raise ConfigError(f"--elementwise-backend {backend}: there are auto, {known}")
    return {operator: backend if backend in known else "auto" for operator, known in names.items()}


@dataclass(frozen=True)
class ModelSpec:
    """Settings of one model.

    Attributes:
        config: dimensions and paradigm.
        megatron: megatron-core's configuration, read by its linears and schedules.
        groups: process groups.
        kernels: chosen operator implementations.
        column_linear: class of linears with sharded outputs, which stay sharded.
        row_linear: class of linears with sharded inputs.
        residual_dtype: dtype of the residual stream, and so of a pipeline hop.
        device: where the model lives.
        adapter: low-rank pairs beside the blocks' linears; None for none.
    """

    config: ModelConfig
    megatron: TransformerConfig
    groups: Groups
    kernels: KernelSet
    column_linear: type[nn.Module]
    row_linear: type[nn.Module]
    residual_dtype: torch.dtype
    device: torch.device
    adapter: AdapterConfig | None = None

    @property
    def image_rows(self) -> int:
        """Rows of the condition image that cross-attention reads beside the text's; 0 where the paradigm has none."""
        return paradigm_of(self.config).image_rows(self.config)

    @property
    def context_rows(self) -> list[int]:
        """This rank's rows of what cross-attention reads: the text's, and the image's with their padding."""
        shards = self.groups.token_shards
        return [self.config.text_length // shards, -(-self.image_rows // shards)]

    @property
    def dtype(self) -> torch.dtype:
        """dtype of matrix products."""
        return self.megatron.params_dtype


def make_spec(
    config: ModelConfig,
    groups: Groups,
    device: torch.device,
    *,
    bf16: bool = False,
    fp32_residual_connection: bool = False,
    attention_backend: str = "auto",
    elementwise_backend: str = "auto",
    virtual_stages: int = 1,
    backend: BackendArguments | None = None,
    adapter: AdapterConfig | None = None,
) -> ModelSpec:
    """Gather the settings of one model.

    Args:
        config: dimensions and paradigm.
        groups: process groups.
        device: where the model will live.
        bf16: matrix products in bfloat16.
        fp32_residual_connection: residual stream in fp32 although ``bf16``.
        attention_backend: implementation of attention, or auto.
        elementwise_backend: of norms, modulation and activation, or auto.
        virtual_stages: stages that each pipeline rank holds.
        backend: library and precision of the linears; megatron-core by default.
        adapter: low-rank pairs beside the blocks' linears; they need megatron-core's.

    Raises:
        ConfigError: the attention backend cannot run here, or Transformer Engine is missing.
    """
    interleaved = virtual_stages > 1
    dtype = torch.bfloat16 if bf16 else torch.float32
    residual_dtype = torch.float32 if fp32_residual_connection else dtype
    backend = backend or BackendArguments()
    provider = linear_provider(backend)
    megatron = TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        tensor_model_parallel_size=groups.tp.size(),
        pipeline_model_parallel_size=groups.pp.size(),
        virtual_pipeline_model_parallel_size=virtual_stages if interleaved else None,
        # With its batched exchange the interleaved schedule of megatron-core 0.16 mixes up activations and gradients
        # between two ranks, without an error.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        context_parallel_size=groups.cp.size(),
        sequence_parallel=groups.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=residual_dtype,
        bf16=bf16,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        # The batched exchange waits for each of its requests. By default the host would then wait for the whole device
        # too, for the sake of a fault that torch no longer has (pytorch/pytorch#82450).
        batch_p2p_sync=False,
        # A hop's memory is freed when it is sent. The interleaved schedule would free it when the sending has begun.
        deallocate_pipeline_outputs=not interleaved,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **megatron_fields(backend),
    )
    return ModelSpec(
        config=config,
        megatron=megatron,
        groups=groups,
        kernels=choose_kernels(
            device, dtype, config, attention_backend, elementwise_backend=elementwise_backend,
            ring=groups.ring is not None, tensor_parallel=groups.tp.size() > 1,
        ),
        column_linear=provider.column_parallel_linear(),
        row_linear=provider.row_parallel_linear(),
        residual_dtype=residual_dtype,
        device=device,
        adapter=adapter,
    )
