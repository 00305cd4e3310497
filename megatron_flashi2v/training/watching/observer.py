"""The hooks by which an observer looks at a run, and the list of observers that the trainer calls as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from megatron_flashi2v.config.train import TrainConfig
    from megatron_flashi2v.runtime.device import Device
    from megatron_flashi2v.training.state import TrainState
    from megatron_flashi2v.training.watching.videos import ValidationVideos

Row = dict[str, Any]
"""Figures of one iteration by name: a line of metrics.jsonl, with at least ``iteration``, ``consumed_samples``,
``loss``, ``grad_norm`` and ``lr`` (see :mod:`~megatron_flashi2v.training.metrics`)."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What an observer may use of a run that begins.

    Attributes:
        config: flags and recipe, checked.
        device: what this rank runs on.
        videos: makes videos of validation images; None without ``--sample-interval`` and ``--evaluation-interval``.
        begin_part: called, by all ranks, before a part of work that takes long, with what begins; False, on all ranks
            alike, where the run is to leave.
        record: takes the kind of a row (``writers.FILES``) and the row, with its ``iteration``; rank 0 writes it. For
            the run's time, not before: files are opened when no observer has refused.
        last_recorded: the last iteration of that kind that an earlier run left, 0 where it left none; likewise, and
            collective.
    """

    config: TrainConfig
    device: Device
    videos: ValidationVideos | None
    begin_part: Callable[[str], bool]
    record: Callable[[str, Row], None]
    last_recorded: Callable[[str], int]


class Observer:
    """Looks at a run, and leaves it as it is; override the hooks that are needed.

    All ranks have the same observers and call their hooks at the same points, so a hook may use collectives::

        class PrintLoss(Observer):
            def after_iteration(self, row):
                print(row["iteration"], row["loss"])

        train(config, observers=[PrintLoss()])

    Attributes:
        serves: flag that has no effect without this observer; ``train`` refuses it then.
    """

    serves: ClassVar[str | None] = None

    def begin_run(self, run: Run) -> None:
        """Take what is needed of a run, before its first iteration; a ``UserError`` refuses the run.

        Called for the observers that are passed to ``train``; all that may be refused of the data was refused before.
        """

    def between_iterations(self, state: TrainState) -> None:
        """Do what takes long, such as a validation.

        Called once before the first iteration, and after each one when the checkpoint that is due has been saved,
        unless the run is about to leave.
        """

    def before_iteration(self, state: TrainState) -> None:
        """An iteration begins; ``state.iteration`` are done."""

    def counts(self) -> dict[str, tuple[int, ...]]:
        """Integers of this rank, by name; their sums over all ranks come back in :meth:`gradients_ready`.

        They share the loss's reduction, so they cost no exchange of their own. Every rank must give the same names
        with as many integers each. Called when the iteration's microbatches have been read.
        """
        return {}

    def gradients_ready(self, state: TrainState, totals: Mapping[str, Sequence[int]]) -> None:
        """The gradients are reduced, and neither clipped nor applied yet; ``state.iteration`` are done.

        Args:
            state: models, optimizer and position.
            totals: the sums of all ranks' :meth:`counts`, the same on every rank.
        """

    def after_iteration(self, row: Row) -> None:
        """The iteration is done; figures that are added to ``row`` reach the observers later in the list.

        The writers come last.
        """

    def close(self) -> None:
        """The run ends, in order or by an error: write what is held back."""


class Observers(Observer):
    """Several observers as one, in their order.

    Args:
        observers: each may name its counts as it likes.

    Raises:
        TypeError: one is no :class:`Observer`.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        for observer in observers:
            if not isinstance(observer, Observer):
                raise TypeError(f"{observer!r} is no Observer: derive its class from megatron_flashi2v.Observer")
        self._observers = tuple(observers)

    def begin_run(self, run: Run) -> None:
        """See :meth:`Observer.begin_run`."""
        for observer in self._observers:
            observer.begin_run(run)

    def between_iterations(self, state: TrainState) -> None:
        """See :meth:`Observer.between_iterations`."""
        for observer in self._observers:
            observer.between_iterations(state)

    def before_iteration(self, state: TrainState) -> None:
        """See :meth:`Observer.before_iteration`."""
        for observer in self._observers:
            observer.before_iteration(state)

    def counts(self) -> dict[str, tuple[int, ...]]:
        """All observers' counts, under names that tell whose they are."""
        return {
            f"{place}.{name}": values
            for place, observer in enumerate(self._observers) for name, values in observer.counts().items()
        }

    def gradients_ready(self, state: TrainState, totals: Mapping[str, Sequence[int]]) -> None:
        """Give each observer the sums of its own counts."""
        for place, observer in enumerate(self._observers):
            prefix = f"{place}."
            own = {name.removeprefix(prefix): sums for name, sums in totals.items() if name.startswith(prefix)}
            observer.gradients_ready(state, own)

    def after_iteration(self, row: Row) -> None:
        """See :meth:`Observer.after_iteration`."""
        for observer in self._observers:
            observer.after_iteration(row)

    def close(self) -> None:
        """Close all of them, though one fails; the first error is raised then."""
        errors = []
        for observer in self._observers:
            try:
                observer.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
