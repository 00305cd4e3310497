"""Gradient clipping: to a fixed norm, or to a threshold that follows the norms of the steps before.

The adaptive methods are those of FlashI2V's two branches. Both keep an exponential moving mean and variance of the
norms that they accept, and clip to mean + 3 sqrt(variance); they differ in how they start, and in what they do with a
norm far outside. A clipper sees one number per step, the global norm, which is the same on all ranks, so that its
state is too; the state is part of a checkpoint. In training a norm that is not finite never comes this far
(``training.guard``); what the npu branch does with one is kept for comparison.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from megatron_flashi2v.config.train import OptimizerArguments

CLIP_AT = 3.0  # standard deviations above the mean
DROP_AT = 5.0
ROOM = 1e-6  # what both branches, torch and megatron-core add to a denominator

Rules = Literal["corrected", "reference", "reference-patch"]


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What happens to one step's gradient.

    Attributes:
        threshold: the norm that counts as usual at this step.
        factor: what the gradient is multiplied with: 1 keeps it, 0 drops it.
        by_product_alone: a dropped gradient is multiplied with 0 and not replaced, so that NaN stays NaN.
    """

    threshold: float
    factor: float
    by_product_alone: bool = False


class Clipper(Protocol):
    """Decides, from its global norm, what happens to each step's gradient."""

    method: ClassVar[str]

    def clip(self, norm: float) -> Clip:
        """Decide on the next step's gradient, and remember its norm."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes; JSON keeps it exactly."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from another clipper's :meth:`state_dict`."""
        ...


@dataclass(kw_only=True)
class FixedClipper:
    """Scales every gradient down to one norm.

    Attributes:
        limit: the norm; 0 turns clipping off.
    """

    method: ClassVar[str] = "norm"
    limit: float

    def clip(self, norm: float) -> Clip:
        """Scale to the limit."""
        limit = self.limit or math.inf
        return Clip(threshold=limit, factor=_scale_to(limit, norm))

    def state_dict(self) -> dict[str, Any]:
        """Nothing but the method."""
        return {"method": self.method}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing is kept."""


@dataclass(kw_only=True)
class NormStatistics:
    """Moving mean and variance of accepted norms.

    Attributes:
        decay: weight of the past at each norm.
        mean: None before the first norm.
        variance: mean squared distance of a norm to the mean that it has just moved.
    """

    decay: float
    mean: float | None = None
    variance: float = 0.0

    def bound(self, deviations: float) -> float:
        """The norm that lies so many standard deviations above the mean."""
        assert self.mean is not None
        return self.mean + deviations * math.sqrt(self.variance)

    def update(self, norm: float) -> None:
        """Take in an accepted norm."""
        assert self.mean is not None
        self.mean = self.decay * self.mean + (1 - self.decay) * norm
        self.variance = self.decay * self.variance + (1 - self.decay) * (self.mean - norm) ** 2


@dataclass(kw_only=True)
class AdaptiveClipper:
    """The main branch's clipper: scales to the threshold what is above it; such norms leave the statistics alone.

    Attributes:
        first_threshold: the mean before the first step.
        statistics: of the norms up to their threshold.
    """

    method: ClassVar[str] = "adaptive"
    first_threshold: float
    statistics: NormStatistics

    def clip(self, norm: float) -> Clip:
        """Scale to the threshold; learn from a norm within it."""
        if self.statistics.mean is None:
            self.statistics.mean = self.first_threshold
        threshold = self.statistics.bound(CLIP_AT)
        if norm <= threshold:
            self.statistics.update(norm)
        return Clip(threshold=threshold, factor=_scale_to(threshold, norm))

    def state_dict(self) -> dict[str, Any]:
        """The statistics."""
        return {"method": self.method, "mean": self.statistics.mean, "variance": self.statistics.variance}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The statistics."""
        self.statistics = dataclasses.replace(self.statistics, mean=state["mean"], variance=state["variance"])


@dataclass(kw_only=True)
class NpuAdaptiveClipper:
    """The npu branch's clipper: as the main branch's, but it drops the gradient where the norm is extreme.

    The first gradient is kept as it is and sets the mean to three times its norm, at most ``first_threshold``. A norm
    is extreme above mean + 5 sqrt(variance), but never below ``extreme_norm``, and where it is not finite. A dropped
    gradient is zero; the optimizer steps all the same, so that moments and weights decay.

    ``rules`` bring two of the reference's defects back. "reference" drops by multiplying with zero, after which NaN is
    still NaN. "reference-patch" is the reference's other version (there ``extreme_norm`` is 5), which only scales where
    the norm equals the threshold, that is never, and only counts what is extreme.

    Attributes:
        first_threshold: highest mean after the first step.
        extreme_norm: lowest norm that can be extreme.
        rules: "corrected", or one of the reference's.
        statistics: of the norms up to their threshold.
        extreme: how many were extreme so far.
    """

    method: ClassVar[str] = "adaptive-npu"
    first_threshold: float
    extreme_norm: float
    statistics: NormStatistics
    rules: Rules = "corrected"
    extreme: int = field(default=0)

    def clip(self, norm: float) -> Clip:
        """Drop what is extreme, scale to the threshold what is above it, and learn from the rest."""
        statistics, first = self.statistics, self.statistics.mean is None
        if first and math.isfinite(norm):
            statistics.mean = min(3 * norm, self.first_threshold)
            return Clip(threshold=statistics.mean, factor=1.0)
        threshold = self.first_threshold if first else statistics.bound(CLIP_AT)
        highest = self.extreme_norm if first else max(statistics.bound(DROP_AT), self.extreme_norm)
        if not math.isfinite(norm) or norm > max(threshold, highest):
            self.extreme += 1
            factor = 1.0 if self.rules == "reference-patch" else 0.0
            return Clip(threshold=threshold, factor=factor, by_product_alone=self.rules == "reference")
        if norm > threshold:
            factor = 1.0 if self.rules == "reference-patch" else 1 / (norm / threshold + ROOM)
            return Clip(threshold=threshold, factor=factor)
        statistics.update(norm)
        return Clip(threshold=threshold, factor=1.0)

    def state_dict(self) -> dict[str, Any]:
        """The statistics and the count."""
        return {"method": self.method, "mean": self.statistics.mean, "variance": self.statistics.variance,
                "extreme": self.extreme}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The statistics and the count."""
        self.statistics = dataclasses.replace(self.statistics, mean=state["mean"], variance=state["variance"])
        self.extreme = state["extreme"]


def make_clipper(arguments: OptimizerArguments) -> Clipper:
    """The clipper that ``--clip-grad-method`` names."""
    statistics = NormStatistics(decay=arguments.clip_grad_ema_decay)
    if arguments.clip_grad_method == "adaptive":
        return AdaptiveClipper(first_threshold=arguments.clip_grad, statistics=statistics)
    if arguments.clip_grad_method == "adaptive-npu":
        return NpuAdaptiveClipper(
            first_threshold=arguments.clip_grad, extreme_norm=arguments.clip_grad_extreme_norm,
            rules=arguments.clip_grad_rules, statistics=statistics,
        )
    return FixedClipper(limit=arguments.clip_grad)


def scale_gradients(gradients: list[Tensor], clip: Clip) -> None:
    """Apply a decision to gradients in place; a rank may hold none."""
    if not gradients:
        return
    if clip.factor == 0.0 and not clip.by_product_alone:
        torch._foreach_zero_(gradients)  # 0 times NaN were NaN
    elif clip.factor != 1.0:
        torch._foreach_mul_(gradients, clip.factor)


def _scale_to(threshold: float, norm: float) -> float:
    """Factor that brings ``norm`` down to ``threshold``; what is not finite is left as it is."""
    return min(1.0, threshold / (norm + ROOM)) if math.isfinite(norm) else 1.0
