"""What a place in a line waits follows the pace of work, not how long nobody asked."""

from __future__ import annotations

import math
import time

import pytest
from support.request_fleet import Fleet

from gateway.line import Line
from gateway.live import LiveRequest
from gateway.pace import MIN_SHARE, NO_WAIT, Arrivals, Pace


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock.monotonic)
    return clock


def moving(clock: Clock, interval_s: float, num: int = 100) -> Pace:
    """A pace measured at a line that was never empty."""
    pace = Pace()
    pace.waits(somebody=True)
    for _ in range(num):
        clock.now_s += interval_s
        pace.departed()
    return pace


def test_without_a_history_nothing_is_foretold() -> None:
    pace = Pace()
    assert math.isinf(pace.per_s)
    assert pace.wait(500, 0.0) == NO_WAIT


def test_quiet_hours_do_not_make_a_line_look_slow(clock: Clock) -> None:
    pace = Pace()
    for _ in range(10):
        clock.now_s += 600
        pace.waits(somebody=True)
        clock.now_s += 0.05
        pace.departed()
        pace.waits(somebody=False)
    assert pace.wait(100, 0.0).mean_s == pytest.approx(5)


def test_a_busy_line_counts_by_departures_per_second(clock: Clock) -> None:
    pace = moving(clock, 0.2)
    assert pace.wait(50, 0.0).mean_s == pytest.approx(10)


def test_a_line_that_stands_still_is_noticed_before_it_moves_again(clock: Clock) -> None:
    pace = moving(clock, 0.2)
    clock.now_s += 32
    assert pace.per_s == pytest.approx(1, rel=0.2)


def test_a_line_that_became_faster_is_noticed_within_a_hundred_departures(clock: Clock) -> None:
    pace = moving(clock, 1.0)
    for _ in range(100):
        clock.now_s += 0.1
        pace.departed()
    assert pace.per_s == pytest.approx(10, rel=0.3)


def test_those_who_overtake_slow_a_line_down_and_make_it_less_certain(clock: Clock) -> None:
    pace = moving(clock, 0.2)
    alone, overtaken = pace.wait(10, 0.0), pace.wait(10, 2.5)
    assert alone.mean_s == pytest.approx(2)
    assert overtaken.mean_s == pytest.approx(4)
    assert alone.mean_s < alone.at_most_s < overtaken.at_most_s
    assert pace.wait(10, 100.0).mean_s == pytest.approx(2 / MIN_SHARE)


def test_only_the_more_urgent_overtake_and_only_while_they_are_recent(clock: Clock) -> None:
    arrivals = Arrivals(foresight_s=20)
    for number in range(40):
        clock.now_s += 0.5
        arrivals.came(-100 if number % 2 else 0)
    assert arrivals.more_urgent_per_s(0) == pytest.approx(1)
    assert arrivals.more_urgent_per_s(100) == pytest.approx(2)
    assert arrivals.more_urgent_per_s(-100) == 0
    clock.now_s += 21
    assert arrivals.more_urgent_per_s(100) == 0


def test_a_line_that_nobody_serves_says_nothing_about_its_pace(clock: Clock) -> None:
    line = Line()
    fleet = Fleet()

    def live(number: int) -> LiveRequest:
        return LiveRequest(fleet.passport(f"r{number}"), on_let_go=lambda _live, _reason: None)

    lives = [live(number) for number in range(12)]
    for one in lives:
        line.enter(one)
    for one in lives[:10]:
        clock.now_s += 1
        line.leave(one, served=True)
    line.halt(True)
    clock.now_s += 500
    line.halt(False)
    assert line.pace.per_s == pytest.approx(1)
    assert [one.request_id for one in line.here_before(clock.now_s)] == ["r10", "r11"]
