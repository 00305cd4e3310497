"""megatron-core's literal "cuda" reaches the device in use, and everything is put back afterwards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_flashi2v.runtime.device import CpuDevice
from megatron_flashi2v.runtime.distributed import init_distributed, shutdown
from megatron_flashi2v.runtime.launch import LaunchEnvironment
from megatron_flashi2v.runtime.redirect import megatron_on

CPU = torch.device("cpu")


@pytest.fixture
def redirected() -> Iterator[None]:
    with megatron_on(CpuDevice()):
        yield


def test_factories_and_moves(redirected: None) -> None:
    for device in ("cuda", "cuda:0", torch.device("cuda", 1), 0, f"cuda:{torch.cuda.current_device()}"):
        assert torch.zeros(2, device=device).device == CPU
        assert torch.tensor([1.0], dtype=torch.float, device=device).device == CPU
        assert torch.empty_like(torch.ones(1), device=device).device == CPU
        assert torch.ones(1).to(device).device == CPU
        assert torch.ones(1).to(device=device, dtype=torch.bfloat16).dtype == torch.bfloat16
        assert torch.ones(1).cuda(device).device == CPU
        assert torch.nn.Linear(1, 1).cuda(device).weight.device == CPU
    assert torch.ones(1, device="cuda", requires_grad=True).requires_grad
    assert torch.zeros(1, device="meta").device.type == "meta", "other devices are left alone"
    assert torch.ones(1).to(torch.float16).dtype == torch.float16
    assert torch.ones(1).to(torch.empty(0, dtype=torch.int32)).dtype == torch.int32


def test_backward_code_is_redirected(redirected: None) -> None:
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0] * torch.full([], 2.0, device="cuda")

    x = torch.ones(3, requires_grad=True)
    Scale.apply(x).sum().backward()
    torch.autograd.backward(Scale.apply(x).sum())
    assert x.grad is not None and x.grad.tolist() == [4.0, 4.0, 4.0]


def test_type_names_that_mindspeed_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "type", lambda self, *_: "torch.cuda.FloatTensor")
    with megatron_on(CpuDevice()):
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"


def test_type_names(redirected: None) -> None:
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16)).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1, device="meta").type() != "torch.cuda.FloatTensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64
    assert torch.ones(1).type("torch.cuda.HalfTensor").dtype == torch.float16


def test_device_functions(redirected: None) -> None:
    assert torch.zeros(1, device=torch.cuda.current_device()).device == CPU
    assert not torch.cuda.is_available()
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.cuda.get_device_capability() < (5, 0)
    assert torch.cuda.memory_allocated() > 0 and torch.cuda.max_memory_allocated() > 0
    assert torch.cuda.memory_stats(device="cuda") == {}
    torch.cuda.set_device(3)
    torch.cuda.synchronize(device="cuda")
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.empty_cache()
    torch.cuda.nvtx.range_push("block")
    torch.cuda.nvtx.range_pop()


def test_streams_and_events(redirected: None) -> None:
    stream = torch.cuda.Stream(device=torch.cuda.current_device())
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.default_stream())
        stream.wait_event(torch.cuda.current_stream().record_event())
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    event.wait()
    assert event.query() and stream.query() and stream.record_event(event) is event
    event.synchronize()
    stream.synchronize()


def test_random_states_are_the_hosts(redirected: None) -> None:
    torch.cuda.manual_seed(11)
    state = torch.cuda.random.get_rng_state(device="cuda")
    first = torch.randn(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.randn(3), first)
    assert torch.cuda.default_generators[torch.cuda.current_device()] is torch.default_generator
    torch.manual_seed(11)  # goes through torch.cuda.manual_seed_all
    assert torch.equal(torch.randn(3), first)


def test_megatrons_random_states_fork_the_hosts(redirected: None) -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("dropout", 5)
    torch.manual_seed(1)
    with tracker.fork("dropout"):
        inside = torch.randn(3)
    after = torch.randn(3)
    assert torch.equal(inside, torch.randn(3, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(after, torch.randn(3, generator=torch.Generator().manual_seed(1)))


def snapshot() -> dict[str, dict[str, Any]]:
    owners = {
        "torch": torch, "cuda": torch.cuda, "random": torch.cuda.random, "nvtx": torch.cuda.nvtx,
        "Tensor": torch.Tensor, "Module": torch.nn.Module,
    }  # fmt: skip
    return {name: dict(vars(owner)) for name, owner in owners.items()}


def test_everything_is_put_back() -> None:
    import torch._dynamo  # importing it adds to torch's namespace

    before = snapshot()
    with pytest.raises(ValueError), megatron_on(CpuDevice()):
        with megatron_on(CpuDevice()):
            assert torch.zeros(1, device="cuda").device == CPU
        assert torch.zeros(1, device="cuda").device == CPU, "leaving an inner use keeps the outer one"
        assert snapshot() != before
        raise ValueError
    assert snapshot() == before
    assert torch.ones(1).type() == "torch.FloatTensor"


def test_device_contexts_still_work_inside_and_after(redirected: None) -> None:
    with torch.device("meta"):  # transformers and diffusers load models in such a context
        assert torch.zeros(1).device.type == "meta"
        assert torch.nn.Linear(1, 1).weight.device.type == "meta"


def test_no_change_on_cuda() -> None:
    class Cuda:
        name = "cuda"

    before = snapshot()
    with megatron_on(Cuda()):  # type: ignore[arg-type]
        assert snapshot() == before


# torch.compile and `with torch.device` keep tables of torch's functions: first used inside, they must be
# right inside and afterwards.
FIRST_USE = """
import torch
import torch._dynamo
from megatron_flashi2v.runtime.device import CpuDevice
from megatron_flashi2v.runtime.redirect import megatron_on

ones = torch.ones  # as a module does that was imported earlier
torch._dynamo.trace_rules.clear_lru_cache()  # as init_process_group does
with megatron_on(CpuDevice()):
    early = torch.compile(lambda x: x + ones(2), backend="eager", fullgraph=True)
    assert early(torch.ones(2)).tolist() == [2, 2]
    doubled = torch.compile(lambda x: x + torch.ones(2, device="cuda"), backend="eager", fullgraph=True)
    assert doubled(torch.ones(2)).tolist() == [2, 2]
    torch._dynamo.trace_rules.clear_lru_cache()
    assert doubled(torch.ones(1)).tolist() == [2, 2]
with torch.device("meta"):
    assert torch.zeros(1).device.type == "meta"
added = torch.compile(lambda x: x + torch.ones(2), backend="eager", fullgraph=True)
assert added(torch.ones(2)).tolist() == [2, 2]
"""

# Fake tensors of a device called npu, and the functions that torch_npu has and megatron-core needs.
NPU = """
import types
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from megatron_flashi2v.runtime.device import NpuDevice

_setup_privateuseone_for_python_backend("npu")
calls = []
class Stream: pass
names = ("set_device", "synchronize", "memory_allocated", "manual_seed")
torch.npu = types.SimpleNamespace(
    **{name: (lambda *args, name=name: calls.append((name, *args))) for name in names},
    Stream=Stream, Event=Stream, stream=None, current_stream=Stream, default_stream=Stream,
    memory_reserved=None, max_memory_reserved=None, memory_stats=None,
    default_generators=("generator 0", "generator 1"),
    **{name: types.SimpleNamespace() for name in ("config", "conv", "matmul")},
)
npu = torch.device("npu", 1)
device = NpuDevice(1)
assert (device.backend, device.torch_device) == ("hccl", npu)
with megatron_on(device), FakeTensorMode():
    assert torch.cuda.current_device() == 1
    assert torch.zeros(1, device=torch.cuda.current_device()).device == npu
    assert torch.zeros(1, device="cuda").device == npu
    assert torch.ones(1).cuda().device == torch.ones(1).to("cuda:0").device == npu
    assert torch.ones(1, device=npu).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1, device=npu, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1).type() == "torch.FloatTensor"
    assert not torch.cuda.is_available()
    assert torch.cuda.Stream is Stream and isinstance(torch.cuda.current_stream(), Stream)
    assert torch.cuda.default_generators[torch.cuda.current_device()] == "generator 1"
    torch.cuda.synchronize()
    torch.cuda.memory_allocated()
    torch.cuda.manual_seed(3)
calls_expected = [("set_device", npu), ("synchronize", npu), ("memory_allocated", npu), ("manual_seed", 3)]
assert calls == calls_expected, calls
"""


@pytest.mark.parametrize("script", [
    FIRST_USE,
    pytest.param(FIRST_USE + NPU, marks=pytest.mark.skipif(
        not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this torch cannot emulate a device in Python",
    )),
], ids=["first_use", "npu"])
def test_in_a_fresh_process(script: str) -> None:
    """What cannot be tried here: torch's tables are filled already, and a device's name is for good."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("distributed_optimizer", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_megatron_trains_on_the_cpu(
    redirected: None, dtype: torch.dtype, distributed_optimizer: bool
) -> None:
    """Layers, DDP with overlap, schedule, recomputation, clipping and optimizer, in one process."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.enums import ModelType
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

    init_distributed(LaunchEnvironment(), CpuDevice())
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, params_dtype=dtype, pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16, gradient_accumulation_fusion=False,
    )  # fmt: skip
    config.finalize_model_grads_func = finalize_model_grads

    class Layer(MegatronModule):
        pre_process = post_process = True
        share_embeddings_and_output_weights = False
        model_type = ModelType.encoder_or_decoder

        def __init__(self) -> None:
            super().__init__(config)
            options: dict[str, Any] = {"config": config, "init_method": config.init_method, "bias": True}
            self.column = tensor_parallel.ColumnParallelLinear(8, 16, gather_output=False, **options)
            self.row = tensor_parallel.RowParallelLinear(
                16, 8, input_is_parallel=True, skip_bias_add=False, **options
            )

        def set_input_tensor(self, tensor: Any) -> None:
            pass

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return tensor_parallel.checkpoint(lambda x: self.row(self.column(x)[0])[0], False, x)

    def forward_step(batches: Iterator[torch.Tensor], model: torch.nn.Module) -> Any:
        x = next(batches).to(dtype).requires_grad_()
        return model(x), lambda output: ((output.float() - 1).square().mean(), {"loss": 0})

    try:
        model = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=True,
                use_distributed_optimizer=distributed_optimizer,
            ),
            Layer(),
        )
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                lr=1e-2, weight_decay=0.0, clip_grad=0.01, params_dtype=dtype, bf16=config.bf16,
                use_distributed_optimizer=distributed_optimizer,
            ),
            [model],
        )  # fmt: skip
        before = [parameter.detach().clone() for parameter in model.parameters()]
        get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iter(torch.ones(2, 3, 1, 8)), model=[model],
            num_microbatches=2, seq_length=3, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        updated, grad_norm, _ = optimizer.step()
        assert updated and grad_norm > 0.01
        moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
        assert all(moved)
    finally:
        parallel_state.destroy_model_parallel()
        shutdown()
