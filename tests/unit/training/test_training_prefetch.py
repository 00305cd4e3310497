"""Reading ahead: the same items in order, errors where they belong, and an orderly end."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from megatron_flashi2v.training.prefetch import Prefetcher


class Counted:
    """Counts up, and lets a test wait until it has got somewhere."""

    def __init__(self, end: int) -> None:
        self.made = threading.Semaphore(0)
        self.count, self.end = 0, end

    def items(self) -> Iterator[int]:
        for number in range(self.end):
            self.count += 1
            self.made.release()
            yield number

    def wait_for(self, items: int) -> None:
        for _ in range(items):
            assert self.made.acquire(timeout=30)


def test_all_items_come_in_order() -> None:
    assert list(Prefetcher(iter(range(100)), depth=3)) == list(range(100))


def test_it_works_ahead_but_no_further_than_the_depth() -> None:
    counted = Counted(100)
    ahead = Prefetcher(counted.items(), depth=3)
    counted.wait_for(3)
    assert not counted.made.acquire(timeout=0.2)
    assert next(ahead) == 0
    counted.wait_for(1)
    assert not counted.made.acquire(timeout=0.2)
    ahead.close()
    assert counted.count == 4


def test_an_error_comes_after_the_items_before_it() -> None:
    def failing() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("broken")

    ahead = Prefetcher(failing(), depth=5)
    assert [next(ahead), next(ahead)] == [1, 2]
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            next(ahead)
    ahead.close()


@pytest.mark.parametrize("taken", [0, 1, 5, 10])
def test_closing_makes_the_same_number_of_items_however_far_the_thread_is(taken: int) -> None:
    """Items that several processes make together must be made by all or none."""
    gate = threading.Event()
    made = []

    def slow() -> Iterator[int]:
        for number in range(10):
            if number >= taken:
                gate.wait(30)
            made.append(number)
            yield number

    ahead = Prefetcher(slow(), depth=1)
    assert [next(ahead) for _ in range(taken)] == list(range(taken))
    closing = threading.Thread(target=ahead.close)
    closing.start()
    gate.set()
    closing.join(30)
    assert not closing.is_alive() and len(made) == min(taken + 1, 10)


def test_abandoning_waits_for_nothing() -> None:
    gate = threading.Event()

    def hanging() -> Iterator[int]:
        gate.wait(60)
        yield 0

    ahead = Prefetcher(hanging(), depth=1)
    ahead.abandon()
    gate.set()
    ahead._thread.join(30)
    assert not ahead._thread.is_alive()
