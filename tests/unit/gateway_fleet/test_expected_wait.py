"""`retry-after` of a full queue follows the pace of work, not how long nobody asked."""

from __future__ import annotations

import pytest

from gateway import pace
from gateway.pace import Pace


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    return clock


def test_without_a_history_it_is_a_second() -> None:
    assert Pace().retry_after_s(500) == 1.0


def test_quiet_hours_do_not_make_the_fleet_look_slow(clock: Clock) -> None:
    measured = Pace()
    for _ in range(10):
        clock.now_s += 600
        measured.saw_first_token(0.05)
    assert measured.retry_after_s(100) == pytest.approx(5)


def test_a_busy_queue_counts_by_first_tokens_per_second(clock: Clock) -> None:
    measured = Pace()
    for _ in range(20):
        clock.now_s += 0.2
        measured.saw_first_token(4.0)
    assert measured.retry_after_s(50) == pytest.approx(10)
    assert measured.retry_after_s(5000) == 60


def test_the_less_urgent_wait_for_those_who_overtake_them_too(clock: Clock) -> None:
    measured = Pace()
    for number in range(20):
        clock.now_s += 0.2
        measured.saw_first_token(4.0, priority=-100 if number % 2 else 0)
    assert measured.wait_s(10, priority=-100) == pytest.approx(2)
    assert measured.wait_s(10, priority=0) == pytest.approx(4)
