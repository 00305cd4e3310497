"""How ranks agree: bytes, JSON and numbers exchanged within a process group, never pickled.

All functions are collective: every rank of the group calls them at the same point. A process without
``torch.distributed`` is a group of one. Tensors lie where the group's backend takes them: on the host under gloo, on
the accelerator under NCCL and HCCL.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_flashi2v.config.errors import StorageError, UserError, WriteError


def gather_bytes(data: bytes, group: dist.ProcessGroup | None = None) -> list[bytes]:
    """Every rank's bytes on every rank, in the order of ranks.

    Args:
        data: this rank's, of any length. Where all are empty, only their lengths travel.
        group: the ranks that take part; all by default.
    """
    if _size(group) == 1:
        return [data]
    device, rank = _device(group), dist.get_rank(group)
    found = []
    for sender, length in enumerate(_lengths(data, group, device)):
        if not length:
            found.append(b"")
            continue
        buffer = torch.frombuffer(bytearray(data if sender == rank else length), dtype=torch.uint8).to(device)
        dist.broadcast(buffer, group=group, group_src=sender)
        found.append(data if sender == rank else _content(buffer))
    return found


def collect_bytes(data: bytes, group: dist.ProcessGroup | None = None) -> list[bytes]:
    """Every rank's bytes on the group's first rank, in the order of ranks; an empty list on the others.

    Args:
        data: this rank's, of any length.
        group: the ranks that take part; all by default.
    """
    if _size(group) == 1:
        return [data]
    device, is_first = _device(group), dist.get_rank(group) == 0
    lengths = _lengths(data, group, device)
    longest = max(1, *lengths)
    buffer = torch.frombuffer(bytearray(data.ljust(longest, b"\0")), dtype=torch.uint8).to(device)
    buffers = [torch.empty_like(buffer) for _ in lengths] if is_first else None
    dist.gather(buffer, buffers, group=group, group_dst=0)
    return [_content(part[:length]) for part, length in zip(buffers or (), lengths, strict=is_first)]


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value on every rank, in the order of ranks, as JSON gives it back (a tuple becomes a list).

    Raises:
        TypeError: the value is not JSON-ready.
    """
    return [json.loads(data) for data in gather_bytes(json.dumps(value).encode(), group)]


def share_json(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """The first rank's value on every rank, as JSON gives it back.

    Raises:
        TypeError: the value is not JSON-ready.
    """
    data = json.dumps(value).encode()
    if _size(group) > 1:
        device, is_first = _device(group), dist.get_rank(group) == 0
        size = torch.tensor([len(data)], dtype=torch.int64, device=device)
        dist.broadcast(size, group=group, group_src=0)
        buffer = torch.frombuffer(bytearray(data if is_first else int(size)), dtype=torch.uint8).to(device)
        dist.broadcast(buffer, group=group, group_src=0)
        data = data if is_first else _content(buffer)
    return json.loads(data)


def share_numbers(numbers: torch.Tensor, group: dist.ProcessGroup | None = None) -> list[float]:
    """The first rank's numbers on every rank; the host reads them once.

    Replicas that compute the same number may round it differently: this keeps their decisions the same.

    Args:
        numbers: as many on every rank, where the group's backend takes them; overwritten.
        group: the ranks that take part; all by default.
    """
    if _size(group) > 1:
        dist.broadcast(numbers, group=group, group_src=0)
    return numbers.tolist()


def sum_counts(counts: Sequence[int], group: dist.ProcessGroup | None = None) -> list[int]:
    """The sums of all ranks' counts, on every rank.

    Args:
        counts: as many on every rank; exact while a sum is below 2^24, since they travel as fp32.
        group: the ranks that take part; all by default.
    """
    held = torch.tensor(counts, dtype=torch.float32, device=_device(group))
    if _size(group) > 1:
        dist.all_reduce(held, group=group)
    return [int(total) for total in held.tolist()]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What failed on some rank.

    Attributes:
        message: the first failing rank's, with the rank.
        of_storage: whether storage is to blame on every failing rank: a full disk, a missing permission.
    """

    message: str
    of_storage: bool


def first_failure(
    error: Exception | None, exchange: Callable[[bytes], list[bytes]] = gather_bytes
) -> Failure | None:
    """The first rank's error, the same on all ranks; None where no rank has one.

    Args:
        error: what went wrong on this rank, if anything.
        exchange: gives all ranks the bytes of each.
    """
    own = b"" if error is None else json.dumps([_describe(error), _is_of_storage(error)]).encode()
    found = exchange(own)
    failed = [(rank, *json.loads(data)) for rank, data in enumerate(found) if data]
    if not failed:
        return None
    rank, message, _ = failed[0]
    if len(found) > 1:
        message += f" (rank {rank} of {len(found)}; {len(failed)} failed)"
    return Failure(message=message, of_storage=all(of_storage for *_, of_storage in failed))


def _describe(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def _is_of_storage(error: Exception) -> bool:
    return isinstance(error, (OSError, StorageError, WriteError))


def _size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where the group's backend takes tensors: the host if it can, or else the process's current accelerator."""
    if not dist.is_initialized():
        return torch.device("cpu")
    kinds = [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]
    return torch.device("cpu" if "cpu" in kinds else kinds[0])


def _lengths(data: bytes, group: dist.ProcessGroup | None, device: torch.device) -> list[int]:
    own = torch.tensor([len(data)], dtype=torch.int64, device=device)
    lengths = [torch.empty_like(own) for _ in range(_size(group))]
    dist.all_gather(lengths, own, group=group)
    return [int(length) for length in lengths]


def _content(buffer: torch.Tensor) -> bytes:
    return buffer.cpu().numpy().tobytes()
