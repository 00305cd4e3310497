"""Exposed communication is what is exchanged while nothing is computed, however intervals overlap."""

from types import SimpleNamespace

import pytest

from megatron_flashi2v.evaluation.communication import communication, exposed


@pytest.mark.parametrize(("communicating", "computing", "total", "alone"), [
    ([], [(0, 1)], 0, 0),
    ([(0, 2)], [], 2, 2),
    ([(0, 2)], [(0, 2)], 2, 0),
    ([(1, 3)], [(0, 2)], 2, 1),
    ([(0, 4), (1, 2), (3, 5)], [(1, 2), (4, 6)], 5, 3),  # overlapping exchanges count once
    ([(0, 10)], [(1, 2), (1.5, 3), (8, 9)], 10, 7),
])
def test_exposed(communicating: list, computing: list, total: float, alone: float) -> None:
    found = exposed(20.0, communicating, computing)
    assert (found.total_s, found.exposed_s) == (total, alone) and found.exposed_share == alone / 20


def events(*rows: tuple[str, int, str, float, float]) -> SimpleNamespace:
    """A profile: name, thread, device, start and end in microseconds."""
    return SimpleNamespace(events=lambda: [
        SimpleNamespace(name=name, thread=thread, device_type=f"DeviceType.{device}",
                        time_range=SimpleNamespace(start=start, end=end))
        for name, thread, device, start, end in rows
    ])


def test_kernels_of_a_card_are_told_from_what_launches_them() -> None:
    recorded = events(
        ("aten::mm", 1, "CPU", 0, 9e6), ("ncclDevKernel_AllGather_RING_LL", 7, "CUDA", 1e6, 4e6),
        ("nvjet_tst_128", 7, "CUDA", 2e6, 3e6), ("Memcpy DtoD", 7, "CUDA", 3e6, 3.5e6),
    )
    found = communication(recorded, 10.0)
    assert found.total_s == pytest.approx(3) and found.exposed_s == pytest.approx(1.5)


def test_gloos_own_copies_are_no_computation() -> None:
    recorded = events(
        ("gloo:all_reduce", 2, "CPU", 0, 4e6), ("aten::copy_", 2, "CPU", 1e6, 3e6), ("aten::mm", 1, "CPU", 3e6, 5e6),
        ("c10d::allreduce_", 1, "CPU", 0, 1e6),
    )
    found = communication(recorded, 10.0)
    assert found.total_s == pytest.approx(4) and found.exposed_s == pytest.approx(3)
