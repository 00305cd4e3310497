"""The hooks by which an observer looks at a run, and the list of observers that the trainer calls as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_flashi2v.training.state import TrainState

Row = dict[str, Any]
"""Figures of one iteration by name: a line of metrics.jsonl, with at least ``iteration``, ``consumed_samples``,
``loss``, ``grad_norm`` and ``lr`` (see :mod:`~megatron_flashi2v.training.metrics`)."""


class Observer:
    """Looks at a run, and leaves it as it is; override the hooks that are needed.

    All ranks have the same observers and call their hooks at the same points, so a hook may use collectives::

        class PrintLoss(Observer):
            def after_iteration(self, row):
                print(row["iteration"], row["loss"])

        train(config, observers=[PrintLoss()])
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
