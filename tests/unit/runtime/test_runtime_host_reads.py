"""Reads by the host are counted, refused beyond a number, and left to torch where it can refuse them itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.runtime.host_reads import HostReads


@pytest.mark.parametrize("read", [
    torch.Tensor.numpy, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, bool, int, float, torch.nonzero,
    torch.unique, lambda tensor: torch.equal(tensor, tensor), lambda tensor: torch.nonzero(input=tensor),
    lambda tensor: tensor[tensor > 0],
])  # fmt: skip
def test_a_read_too_many_is_refused(read: Any) -> None:
    number = torch.ones(())
    with HostReads(resolve_device("cpu"), allowed=1) as reads:
        (number + 1).sum()
        assert reads.count == 0
        read(number)
        assert reads.count == 1
        with pytest.raises(RuntimeError, match="the host reads cpu by .*: read 2"):
            read(number)


def test_the_backward_pass_is_watched() -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone()

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return gradient * gradient.item()

    loss = Reads.apply(torch.ones((), requires_grad=True))
    refused = pytest.raises(RuntimeError, match="by _local_scalar_dense: read 1")
    with HostReads(resolve_device("cpu"), allowed=0), refused:
        loss.backward()


def test_torch_refuses_on_cuda_but_in_a_read_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[object] = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    cuda: Any = SimpleNamespace(name="cuda", torch_device=torch.device("cpu"))
    with pytest.raises(ValueError), HostReads(cuda, allowed=1):
        torch.ones(()).item()
        raise ValueError
    assert modes == [0, "error", "default", "error", 0]
