"""Reading ahead in a background thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """The items of an iterator, computed up to ``depth`` ahead by a background thread.

    What the iterator raises is raised where its item would have come.

    Args:
        items: is advanced by the thread alone.
        depth: most items that wait to be taken.
        begin: is called first in the thread, such as to choose its device.
    """

    def __init__(self, items: Iterator[Item], depth: int, begin: Callable[[], None] = lambda: None) -> None:
        self._items, self._depth, self._begin = items, depth, begin
        self._ready: deque[Item] = deque()
        self._change = threading.Condition()
        self._taken = self._made = 0
        self._least: int | None = None  # once closed: items that are still made
        self._ended = False
        self._error: BaseException | None = None
        # A daemon: a run that fails must not wait for a read that hangs.
        self._thread = threading.Thread(target=self._work, name="read ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetcher[Item]:
        return self

    def __next__(self) -> Item:
        with self._change:
            self._change.wait_for(lambda: self._ready or self._ended)
            if self._ready:
                self._taken += 1
                self._change.notify_all()
                return self._ready.popleft()
            if self._error is not None:
                raise self._error
            raise StopIteration

    def close(self) -> None:
        """End the thread in order; returns when it has ended.

        One item after those that were taken is still made. Where making items takes other processes (which share
        the encoding), all of them stop at the same item, and none waits for one that has left.
        """
        with self._change:
            self._least = self._taken + 1
            self._change.notify_all()
        self._thread.join()

    def abandon(self) -> None:
        """Let the thread end by itself, without waiting for it."""
        with self._change:
            self._least = 0
            self._change.notify_all()

    def _work(self) -> None:
        error: BaseException | None = None
        try:
            self._begin()
            while self._goes_on():
                item = next(self._items, None)
                if item is None:
                    break
                with self._change:
                    self._made += 1
                    self._ready.append(item)
                    self._change.notify_all()
        except BaseException as caught:  # raised again in the thread that takes the items
            error = caught
        with self._change:
            self._error, self._ended = error, True
            self._change.notify_all()

    def _goes_on(self) -> bool:
        """Wait for room; whether another item is to be made."""
        with self._change:
            self._change.wait_for(lambda: self._least is not None or len(self._ready) < self._depth)
            return self._least is None or self._made < self._least
