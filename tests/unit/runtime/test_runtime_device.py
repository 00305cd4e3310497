"""The device interface, and which device is chosen."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers.stand_in import torch_npu  # noqa: F401

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.runtime import device as device_module
from megatron_flashi2v.runtime.device import CpuDevice, resolve_device
from megatron_flashi2v.runtime.redirect import _redirect_new_group


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(device_module, "_has_torch_npu", lambda: False)


def fake_cards(count: int) -> SimpleNamespace:
    """What the accelerator classes call on torch.cuda or torch.npu."""
    return SimpleNamespace(
        is_available=lambda: count > 0,
        device_count=lambda: count,
        set_device=lambda device: None,
        get_device_name=lambda device: "Card",
        get_device_properties=lambda device: SimpleNamespace(total_memory=80 * 1024**3),
        get_device_capability=lambda device: (9, 0),
    )


def test_cpu_figures() -> None:
    device = resolve_device("cpu")
    assert (device.name, device.backend, device.torch_device) == ("cpu", "gloo", torch.device("cpu"))
    held = torch.ones(40 * 1024**2, dtype=torch.uint8)
    allocated, slack = device.memory_allocated(), 8 * 1024**2  # the kernel's peak lags a little
    assert 40 * 1024**2 < allocated <= device.max_memory_allocated() + slack < device.total_memory()
    assert held.all()
    assert device.compute_capability() is None
    assert "gloo" in device.describe() and torch.__version__ in device.describe()
    device.synchronize()


def test_cpu_random_state_repeats() -> None:
    device = resolve_device("cpu")
    outer = device.get_rng_state()
    device.manual_seed(5)
    state, first = device.get_rng_state(), torch.randn(3)
    device.set_rng_state(state)
    assert torch.equal(torch.randn(3), first)
    device.set_rng_state(outer)


def test_auto_falls_back_to_the_cpu(no_accelerator: None) -> None:
    assert isinstance(resolve_device("auto", local_rank=3), CpuDevice)


def test_absent_devices_say_what_is_missing(no_accelerator: None) -> None:
    with pytest.raises(ConfigError, match="'cuda'.*built without CUDA.*--device cpu"):
        resolve_device("cuda")
    with pytest.raises(ConfigError, match="'npu'.*torch_npu is not installed.*--device cpu"):
        resolve_device("npu")
    with pytest.raises(ConfigError, match="'gpu'.*auto, cuda, npu, cpu"):
        resolve_device("gpu")


def test_auto_prefers_cuda_and_takes_the_local_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", fake_cards(4))
    device = resolve_device("auto", local_rank=2)
    assert (device.name, device.backend, device.torch_device) == ("cuda", "nccl", torch.device("cuda", 2))
    assert device.describe().startswith("cuda:2: Card, 80 GiB, compute capability 9.0, nccl")


def test_too_many_processes_for_the_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch, "cuda", fake_cards(2))
    with pytest.raises(ConfigError, match="local rank 2 has no GPU: this host shows 2"):
        resolve_device("cuda", local_rank=2)
    # Slurm shows each task only its own card, which then has number 0.
    monkeypatch.setattr(torch, "cuda", fake_cards(1))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert resolve_device("cuda", local_rank=2).torch_device.index == 0


def test_broken_torch_npu(
    no_accelerator: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str) -> ModuleType:
        raise ImportError("libhccl.so: cannot open shared object file")

    monkeypatch.setattr(device_module, "_has_torch_npu", lambda: True)
    monkeypatch.setattr(device_module.importlib, "import_module", fail)
    with pytest.raises(ConfigError, match="torch_npu cannot be loaded.*libhccl.so.*set_env.sh"):
        resolve_device("npu")
    assert resolve_device("auto").name == "cpu"
    assert "libhccl.so" in caplog.text


def test_npu_without_cards(no_accelerator: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "_has_torch_npu", lambda: True)
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    monkeypatch.setattr(torch, "npu", fake_cards(0), raising=False)
    with pytest.raises(ConfigError, match="no NPU can be used.*npu-smi"):
        resolve_device("npu")


@pytest.fixture
def npu_cards(
    no_accelerator: None, torch_npu: ModuleType, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> SimpleNamespace:
    """Two cards of the stand-in's package, whose settings are as torch_npu leaves them."""
    monkeypatch.setattr(device_module, "_has_torch_npu", lambda: True)
    cards = fake_cards(2)
    cards.config = SimpleNamespace(allow_internal_format=True)
    cards.conv, cards.matmul = SimpleNamespace(allow_hf32=True), SimpleNamespace(allow_hf32=True)
    monkeypatch.setattr(torch, "npu", cards, raising=False)
    monkeypatch.setattr(torch, "device", lambda name, index=None: f"{name}:{index}")  # "npu" names none here
    return cards


def test_npu_is_set_up_and_described(npu_cards: SimpleNamespace) -> None:
    device = resolve_device("auto", local_rank=1)
    assert (device.name, device.backend, device.torch_device) == ("npu", "hccl", "npu:1")
    assert not npu_cards.config.allow_internal_format
    assert not npu_cards.conv.allow_hf32 and not npu_cards.matmul.allow_hf32
    assert device.describe() == f"npu:1: Card, 80 GiB, hccl, torch {torch.__version__}, torch_npu 2.13.0"


def test_hccl_buffers_per_group(npu_cards: SimpleNamespace) -> None:
    sizes = {"TENSOR_MODEL_PARALLEL_GROUP": 300, "default": 50}
    device = resolve_device("npu", hccl_buffer_sizes=sizes)
    assert device.group_options("TENSOR_MODEL_PARALLEL_GROUP").hccl_config == {"hccl_buffer_size": 300}
    assert device.group_options("DATA_PARALLEL_GROUP").hccl_config == {"hccl_buffer_size": 50}
    assert device.group_options(None).hccl_config == {"hccl_buffer_size": 50}
    with pytest.raises(ValueError, match="no setting 'hccl_bufer'"):
        device.group_options(None).hccl_config = {"hccl_bufer": 1}
    assert resolve_device("npu").group_options("TENSOR_MODEL_PARALLEL_GROUP") is None
    assert resolve_device("npu", backend="gloo", hccl_buffer_sizes=sizes).group_options(None) is None
    assert resolve_device("cpu", hccl_buffer_sizes=sizes).group_options(None) is None


def test_megatrons_groups_get_the_devices_options(
    npu_cards: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = resolve_device("npu", hccl_buffer_sizes={"TENSOR_MODEL_PARALLEL_GROUP": 300})
    new_group = _redirect_new_group(lambda **kwargs: kwargs, device)
    made = new_group(ranks=[0], group_desc="TENSOR_MODEL_PARALLEL_GROUP", pg_options=None, backend=None)
    assert made["pg_options"].hccl_config == {"hccl_buffer_size": 300}
    assert new_group(ranks=[0], group_desc="CONTEXT_PARALLEL_GROUP")["pg_options"] is None
    own = object()
    assert new_group(ranks=[0], group_desc="TENSOR_MODEL_PARALLEL_GROUP", pg_options=own)["pg_options"] is own
    assert "pg_options" not in new_group(group_desc="TENSOR_MODEL_PARALLEL_GROUP", backend="gloo")
