"""One of two ranks, in one process: what the other one shares is given."""

from __future__ import annotations

from megatron_flashi2v.checkpoint.peers import Peers
from megatron_flashi2v.parallel.agreement import Failure


class SecondRank(Peers):
    """One of two; what the first one shares is given."""

    def __init__(self, *shared: object) -> None:
        super().__init__(1, 2)
        self.shared = list(shared)

    def share(self, value: object) -> object:
        return self.shared.pop(0)

    def first_failure(self, error: Exception | None) -> Failure | None:
        return None if error is None else Failure(message=str(error), of_storage=False)
