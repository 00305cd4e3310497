"""Copies of what a rank holds: apart from it, and in the same memory each time."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from megatron_flashi2v.checkpoint import host_copies
from megatron_flashi2v.checkpoint.host_copies import HostCopies
from megatron_flashi2v.checkpoint.storage import TensorPiece
from megatron_flashi2v.config.errors import UserError
from megatron_flashi2v.runtime.device import CpuDevice

TENSORS = {
    "odd": torch.randn(7, 3),
    "bf16": torch.randn(5).bfloat16(),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "transposed": torch.randn(4, 6).t(),
    "large": torch.randn(300),
    "flags": torch.tensor([True, False, True]),
}


def pieces() -> list[TensorPiece]:
    return [TensorPiece.whole(key, tensor.clone()) for key, tensor in TENSORS.items()]


@pytest.mark.parametrize("block_bytes", [1 << 28, 512, 64])
def test_copies_are_equal_and_apart(monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr(host_copies, "BLOCK_BYTES", block_bytes)
    held = pieces()
    copies = HostCopies(CpuDevice()).take(held)
    for piece in held:
        piece.data.zero_()
    assert [copy.key for copy in copies] == list(TENSORS)
    for copy in copies:
        assert copy.data.dtype == TENSORS[copy.key].dtype and torch.equal(copy.data, TENSORS[copy.key]), copy.key
        copy.data.zero_()  # and apart from one another
        assert sum(bool(other.data.any()) for other in copies) == len(copies) - copies.index(copy) - 1


def test_memory_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_copies, "BLOCK_BYTES", 512)
    copies = HostCopies(CpuDevice())
    places = [copy.data.data_ptr() for copy in copies.take(pieces())]
    held = copies.nbytes
    assert [copy.data.data_ptr() for copy in copies.take(pieces())] == places
    extra = TensorPiece.whole("moment", torch.randn(100))  # the optimizer's state comes with its first step
    more = copies.take([*pieces(), extra])
    assert [copy.data.data_ptr() for copy in more][: len(places)] == places
    assert torch.equal(more[-1].data, extra.data) and copies.nbytes > held
    for copy, piece in zip(more, pieces(), strict=False):
        assert torch.equal(copy.data, piece.data)


def test_reserved_memory_is_what_is_used() -> None:
    copies = HostCopies(CpuDevice())
    copies.reserve(pieces())
    held = copies.nbytes
    for copy, piece in zip(copies.take(held_pieces := pieces()), held_pieces, strict=True):
        assert torch.equal(copy.data, piece.data)
    assert copies.nbytes == held > 0


def test_only_what_is_written_is_copied() -> None:
    copies = HostCopies(CpuDevice())
    replica, empty = dataclasses.replace(pieces()[0], owner=False), TensorPiece.whole("empty", torch.zeros(0, 4))
    assert copies.take([replica, empty]) == [] and copies.nbytes == 0


def test_memory_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*arguments: object, **keywords: object) -> torch.Tensor:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(UserError, match=re.escape("--async-save") + ".*0.0 GiB .*can't allocate"):
        HostCopies(CpuDevice()).take(pieces())
