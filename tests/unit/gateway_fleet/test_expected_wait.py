"""`retry-after` of a full queue follows the pace of work, not how long nobody asked."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from gateway import metrics
from gateway.metrics import GatewayMetrics


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def test_without_a_history_it_is_a_second() -> None:
    assert GatewayMetrics(CollectorRegistry()).expected_wait_s(500) == 1.0


def test_quiet_hours_do_not_make_the_fleet_look_slow(clock: Clock) -> None:
    counted = GatewayMetrics(CollectorRegistry())
    for _ in range(10):
        clock.now_s += 600
        counted.saw_first_token("m", 0.05)
    assert counted.expected_wait_s(100) == pytest.approx(5)


def test_a_busy_queue_counts_by_first_tokens_per_second(clock: Clock) -> None:
    counted = GatewayMetrics(CollectorRegistry())
    for _ in range(20):
        clock.now_s += 0.2
        counted.saw_first_token("m", 4.0)
    assert counted.expected_wait_s(50) == pytest.approx(10)
    assert counted.expected_wait_s(5000) == 60
