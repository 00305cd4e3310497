"""What ranks tell one another arrives whole, in order, and without pickling."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.parallel import agreement
from megatron_flashi2v.parallel.agreement import (
    Failure,
    collect_bytes,
    first_failure,
    gather_bytes,
    gather_json,
    share_json,
    share_numbers,
    sum_counts,
)
from megatron_flashi2v.runtime.distributed import shutdown


def pickled(*arguments: object) -> None:
    raise AssertionError("something was pickled")


def exchange(rank: int) -> None:
    """Three ranks; then the last two of them alone, whose first is rank 1 of the world."""
    dist.distributed_c10d._pickler = dist.distributed_c10d._unpickler = pickled
    dist.init_process_group("gloo")
    pair = dist.new_group([1, 2])
    for group, ranks in ((None, (0, 1, 2)), (pair, (1, 2))):
        if rank not in ranks:
            continue
        first = rank == ranks[0]
        lengths = {0: 5, 1: 0, 2: 70_000}
        sent = [bytes([number + 1]) * lengths[number] for number in ranks]
        mine = bytes([rank + 1]) * lengths[rank]
        assert gather_bytes(mine, group) == sent
        assert collect_bytes(mine, group) == (sent if first else [])
        assert gather_bytes(b"", group) == [b""] * len(ranks)
        assert collect_bytes(b"", group) == ([b""] * len(ranks) if first else [])
        values = [{"rank": number, "path": "\udce9 ä", "loss": 0.1 + 0.2, "none": None} for number in ranks]
        assert gather_json(values[ranks.index(rank)], group) == values
        assert share_json(values[ranks.index(rank)], group) == values[0]
        assert share_json([] if first else "longer than the first rank's", group) == []
        numbers = torch.tensor([ranks[0] + 1 / 3 if first else -1.0, float("nan")])
        assert share_numbers(numbers, group)[0] == pytest.approx(ranks[0] + 1 / 3, rel=1e-7)
        assert sum_counts([rank, 0, 2**20], group) == [sum(ranks), 0, len(ranks) * 2**20]
    full = OSError(errno.ENOSPC, "No space left on device", "a/b")
    assert first_failure(None) is None
    assert first_failure(full if rank == 2 else None) == Failure(
        message="a/b: No space left on device (rank 2 of 3; 1 failed)", of_storage=True
    )
    assert first_failure([None, ConfigError("lr is -1"), full][rank]) == Failure(
        message="lr is -1 (rank 1 of 3; 2 failed)", of_storage=False
    )
    shutdown()


def test_ranks_exchange_bytes_values_numbers_and_errors(tmp_path: Path) -> None:
    run_ranks(exchange, 3, tmp_path)


def test_a_process_of_its_own_needs_no_group() -> None:
    assert not dist.is_initialized()
    assert gather_bytes(b"a") == collect_bytes(b"a") == [b"a"]
    assert gather_json((1, "b")) == [[1, "b"]] and share_json((1, "b")) == [1, "b"]
    assert share_numbers(torch.tensor([0.5])) == [0.5] and sum_counts([3]) == [3]
    assert first_failure(ValueError("bad")) == Failure(message="ValueError: bad", of_storage=False)
    with pytest.raises(TypeError, match="not JSON serializable"):
        share_json(object())


@pytest.mark.parametrize(("backends", "kind"), [
    ("cpu:gloo,cuda:gloo", "cpu"), ("cuda:nccl", "cuda"), ("npu:hccl", "npu"), ("cpu:gloo,npu:hccl", "cpu"),
])
def test_tensors_lie_where_the_backend_takes_them(
    backends: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(torch, "device", lambda name: name)  # "npu" is unknown to a build without it
    assert agreement._device(None) == kind
