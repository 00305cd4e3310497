"""The loss by noise level: a global batch's samples in equal buckets of sigma.

What a step reports of each microbatch is one vector [1 + 2 BUCKETS]: its part of the loss, what each bucket's samples
contributed to that part, and each bucket's share of the samples. All three add up over microbatches and ranks by the
same weights, so that the vector needs no exchange but the loss's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BUCKETS = 8
"""Bucket i holds sigma in [i / BUCKETS, (i + 1) / BUCKETS); the last one also holds 1."""
WIDTH = 1 + 2 * BUCKETS
"""Numbers in a report."""


@dataclass(frozen=True, kw_only=True)
class BatchLoss:
    """The loss of a global batch, the same on all ranks.

    Attributes:
        mean: over the whole batch.
        by_sigma: mean over the samples of each bucket; None where it has none.
        samples_by_sigma: how many those are.
    """

    mean: float
    by_sigma: tuple[float | None, ...]
    samples_by_sigma: tuple[int, ...]


def sigma_bucket(sigma_B: Tensor) -> Tensor:
    """The bucket of each noise level in [0, 1]: int64 [B]."""
    return (sigma_B * BUCKETS).long().clamp(0, BUCKETS - 1)


def loss_report(part_B: Tensor, sigma_B: Tensor, *, counts: bool) -> Tensor:
    """The vector [WIDTH] of one microbatch, fp32.

    Args:
        part_B: each sample's contribution to this rank's part of the loss; they add up to it.
        sigma_B: the samples' noise levels.
        counts: whether this rank counts the samples; one of the ranks that share their tokens does.
    """
    holds_NB = sigma_bucket(sigma_B) == torch.arange(BUCKETS, device=sigma_B.device).unsqueeze(1)
    # Chosen rather than multiplied: a loss that is not finite stays in its bucket.
    parts_N = torch.where(holds_NB, part_B, 0.0).sum(1)
    shares_N = holds_NB.float().mean(1) if counts else torch.zeros_like(parts_N)
    return torch.cat([part_B.sum().unsqueeze(0), parts_N, shares_N])


def read_report(report: Sequence[float], samples: int) -> BatchLoss:
    """The loss of ``samples`` samples from the reports of all their microbatches, averaged."""
    parts, shares = report[1 : 1 + BUCKETS], report[1 + BUCKETS : WIDTH]
    counts = tuple(round(share * samples) for share in shares)
    return BatchLoss(
        mean=report[0],
        by_sigma=tuple(
            part * samples / count if count else None for part, count in zip(parts, counts, strict=True)
        ),
        samples_by_sigma=counts,
    )
