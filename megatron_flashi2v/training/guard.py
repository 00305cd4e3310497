"""Which updates are skipped: not finite, or far above the usual; and when so many are that the run stops.

The guard sees two numbers of each iteration, the global batch's loss and the gradient's global norm, which are the same
on all ranks. So all ranks decide alike, with no exchange of their own, and hold the same state; it is part of a
checkpoint. A skipped update changes neither weights nor moments, averages or the clipper's statistics; the iteration
counts all the same: the learning rate's schedule and the order of the samples go on.

megatron-core has checks of its own, which stay off: ``check_for_nan_in_grad`` ends the one rank that finds a NaN, and
the optimizers' ``found_inf`` comes with fp16's loss scaler only.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from megatron_flashi2v.config.errors import DivergenceError
from megatron_flashi2v.config.train import FaultArguments
from megatron_flashi2v.runtime.logging import AGREED

LONG_RUN, LONG_RUN_SHARE = 1000, 10
"""Of the last 1000 updates, 10 x ``--max-skipped-updates`` may be skipped: single skips must not go on for ever."""

logger = logging.getLogger(__name__)


class RunningMedian:
    """Median of the last values that were accepted.

    Args:
        window: values that it is taken over; there is none before so many.
    """

    def __init__(self, window: int) -> None:
        self._values: deque[float] = deque(maxlen=window)

    @property
    def median(self) -> float | None:
        """None before the window is full."""
        full = len(self._values) == self._values.maxlen
        return statistics.median(self._values) if full else None

    def accept(self, value: float) -> None:
        """Take in a value; the oldest leaves."""
        self._values.append(value)

    def state(self) -> list[float]:
        """The values, oldest first."""
        return list(self._values)

    def load(self, values: list[float]) -> None:
        """Continue from another one's :meth:`state`; of a longer window the newest stay."""
        self._values.clear()
        self._values.extend(values)


class UpdateGuard:
    """Judges every iteration before its update.

    Args:
        arguments: limits.
    """

    def __init__(self, arguments: FaultArguments) -> None:
        self._arguments = arguments
        self._usual = {name: RunningMedian(arguments.spike_window) for name in ("loss", "grad_norm")}
        self._factors = {"loss": arguments.skip_loss_spike_factor, "grad_norm": arguments.skip_grad_norm_spike_factor}
        self._recent: list[int] = []  # iterations that were skipped, of the last LONG_RUN
        self.streak = 0
        """Skipped updates since the last one that was applied."""

    def judge(self, iteration: int, loss: float, grad_norm: float) -> str | None:
        """Whether an iteration's update is applied.

        Args:
            iteration: counted from 1.
            loss: the same on all ranks.
            grad_norm: before clipping, the same on all ranks.

        Returns:
            None to apply it; to skip it, ``loss_not_finite``, ``grad_norm_not_finite``, ``loss_spike`` or
            ``grad_norm_spike``.

        Raises:
            DivergenceError: the same on all ranks: too many were skipped.
        """
        values = {"loss": loss, "grad_norm": grad_norm}
        found = self._fault(values)
        if found is None:
            for name, value in values.items():
                self._usual[name].accept(value)
            self.streak = 0
            return None
        reason, what = found
        self.streak += 1
        self._recent = [skipped for skipped in self._recent if skipped > iteration - LONG_RUN] + [iteration]
        self._require_few(iteration, what)
        logger.warning("iteration %d: %s; its update is skipped (%d in a row, --max-skipped-updates allows %d)",
                       iteration, what, self.streak, self._arguments.max_skipped_updates, extra=AGREED)
        return reason

    def _fault(self, values: Mapping[str, float]) -> tuple[str, str] | None:
        """The reason to skip, and in words."""
        names = {"loss": "the loss", "grad_norm": "the gradient norm"}
        for name, value in values.items():
            if not math.isfinite(value):
                return f"{name}_not_finite", f"{names[name]} is {value}"
        for name, value in values.items():
            factor = self._factors[name]
            usual = None if factor is None else self._usual[name].median
            if factor is not None and usual is not None and value > factor * usual:
                return f"{name}_spike", f"{names[name]} is {value:g}, {value / usual:.3g} times the usual {usual:g}"
        return None

    def _require_few(self, iteration: int, what: str) -> None:
        limit = self._arguments.max_skipped_updates
        if self.streak > limit:
            many = f"{self.streak} updates in a row are not to be applied, and --max-skipped-updates allows {limit}"
        elif len(self._recent) > LONG_RUN_SHARE * limit:
            many = (f"{len(self._recent)} of the last {LONG_RUN} updates are not to be applied, and "
                    f"--max-skipped-updates {limit} allows {LONG_RUN_SHARE * limit}")
        else:
            return
        raise DivergenceError(
            f"iteration {iteration}: {what}; {many}; the weights are still those of iteration "
            f"{iteration - self.streak}: lower --lr, look at the samples of the skipped iterations, or resume from an "
            "earlier checkpoint"
        )

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes; JSON keeps it exactly."""
        return {
            "streak": self.streak, "recent": list(self._recent),
            **{name: usual.state() for name, usual in self._usual.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from another guard's :meth:`state_dict`."""
        self.streak, self._recent = state["streak"], list(state["recent"])
        for name, usual in self._usual.items():
            usual.load(state[name])
