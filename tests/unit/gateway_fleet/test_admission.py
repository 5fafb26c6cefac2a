"""Who waits, who goes first and who is refused when there is more work than room."""

from __future__ import annotations

import time

import msgspec
import pytest
from support.request_fleet import Fleet, record, tokens

from fleet.messages import (
    OVER_SHARE,
    Cancel,
    HandedOff,
    Heartbeat,
    PrefillRequest,
    RequestFinished,
    RequestNote,
    Returned,
)
from fleet.types import FinishReason, PeerRef, Role, WorkerLoad
from gateway.errors import Overloaded

PRIORITY, DEFAULT, FLEX = -100, 0, 100


def sent(fleet: Fleet) -> list[str]:
    return [request.passport.request_id for request in fleet.dispatched()]


def finish(fleet: Fleet, request_id: str, output: int = 1) -> None:
    reason = FinishReason.STOP
    ending = RequestFinished(request_id=request_id, epoch=0, reason=reason, num_output_tokens=output)
    fleet.say(PeerRef("p", 1, "tcp://p.1"), tokens(0, 7, request_id=request_id), ending)


def test_requests_wait_for_a_seat_and_the_urgent_ones_go_first() -> None:
    fleet = Fleet()
    fleet.join("p", Role.PREFILL)
    fleet.join("d", Role.DECODE, seats=2)
    for name, priority in (("a", 0), ("b", 0), ("flex", FLEX), ("c", DEFAULT), ("first", PRIORITY)):
        fleet.admit(name, priority=priority)
    assert sent(fleet) == ["a", "b"]
    for ending, follows in (("a", "first"), ("b", "c"), ("first", "flex")):
        finish(fleet, ending)
        assert sent(fleet) == [follows]


def test_an_interrupted_stream_goes_before_what_has_not_begun() -> None:
    fleet = Fleet()
    p = fleet.join("p", Role.PREFILL)
    d = fleet.join("d", Role.DECODE, seats=2)
    for name in ("a", "b", "c"):
        fleet.admit(name)
    assert sent(fleet) == ["a", "b"]
    fleet.say(p, tokens(0, 7, request_id="b"))
    fleet.say(d, HandedOff(request_id="b", epoch=0, next_index=1))
    fleet.say(d, Returned(request_id="b", epoch=0, reason="out_of_pages"))
    assert sent(fleet) == ["b"]
    finish(fleet, "a")
    assert sent(fleet) == ["c"]


def test_what_a_worker_runs_for_other_gateways_takes_its_seats_too() -> None:
    fleet = Fleet()
    fleet.join("p", Role.PREFILL)
    busy = msgspec.structs.replace(record("d", Role.DECODE, seats=3), load=WorkerLoad(num_running=3))
    fleet.directory.heartbeat(Heartbeat(record=busy, requests=[]))
    fleet.admit("a")
    assert sent(fleet) == []
    ours = [RequestNote("a", 0, 0)]
    fleet.directory.heartbeat(Heartbeat(record=busy, requests=ours))
    assert sent(fleet) == ["a"]


def test_pages_that_are_gone_hold_requests_back_unless_the_worker_is_idle() -> None:
    fleet = Fleet()
    fleet.join("p", Role.PREFILL)
    load = WorkerLoad(num_running=1, total_pages=30, free_pages=0)
    full = msgspec.structs.replace(record("d", Role.DECODE), load=load)
    fleet.directory.heartbeat(Heartbeat(record=full, requests=[]))
    fleet.admit("a")
    assert sent(fleet) == []
    fleet.join("d", Role.DECODE)
    assert sent(fleet) == ["a"]


def test_a_gateway_keeps_within_its_share_of_a_worker_and_the_rest_waits() -> None:
    fleet = Fleet()
    fleet.join("p", Role.PREFILL, max_per_gateway=4)
    fleet.join("d", Role.DECODE)
    for name in ("a", "b", "c", "d"):  # a quarter is left for what the worker has not let go of yet
        fleet.admit(name)
    assert sent(fleet) == ["a", "b", "c"]
    finish(fleet, "a")
    assert sent(fleet) == ["d"]


def test_who_is_refused_for_its_gateways_share_goes_elsewhere_or_waits_for_a_heartbeat() -> None:
    fleet = Fleet()
    full = fleet.join("p", Role.PREFILL)
    fleet.join("d", Role.DECODE)
    lives = [fleet.admit("a"), fleet.admit("b")]
    other = fleet.join("q", Role.PREFILL)
    fleet.bus.sent.clear()
    fleet.say(full, Returned(request_id="a", epoch=0, reason=OVER_SHARE))
    fleet.say(other, Returned(request_id="a", epoch=1, reason=OVER_SHARE))
    assert [to for to, _ in fleet.bus.take(PrefillRequest)] == [other.address]
    fleet.join("p", Role.PREFILL)  # its next heartbeat
    assert [(to, sent.passport.epoch) for to, sent in fleet.bus.take(PrefillRequest)] == [(full.address, 2)]
    assert not any(live.ended for live in lives)


def test_at_a_full_queue_a_priority_request_displaces_the_last_flex_one() -> None:
    fleet = Fleet(max_queued=3)
    p = fleet.join("p", Role.PREFILL)
    fleet.join("d", Role.DECODE, seats=2)
    lives = {name: fleet.admit(name, priority=FLEX) for name in ("a", "b", "c")}
    with pytest.raises(Overloaded):
        fleet.admit("d", priority=FLEX)
    fleet.admit("urgent", priority=PRIORITY)
    assert (lives["c"].finish, lives["c"].displaced) == (FinishReason.ERROR, True)
    assert lives["c"].retry_after_s is not None
    fleet.admit("another")
    assert lives["b"].displaced
    assert (p.address, Cancel(request_id="b", epoch=0)) in fleet.bus.sent
    assert not lives["a"].ended
    assert fleet.counted("baton_requests_rejected_total", reason="displaced") == 2
    assert fleet.table.num_queued == 3


def test_whose_first_token_would_come_too_late_is_refused_at_once_and_told_when(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    fleet = Fleet(max_wait_s=10)
    p = fleet.join("p", Role.PREFILL)
    fleet.join("d", Role.DECODE)
    for number in range(8):  # a first token each second, all asked for at once
        fleet.admit(f"r{number}")
    for number in range(8):
        now_s[0] += 1
        fleet.say(p, tokens(0, 7, request_id=f"r{number}"))
    now_s[0] += 10  # those eight are no sign of more to come
    for number in range(6):
        fleet.admit(f"s{number}")
    with pytest.raises(Overloaded) as caught:
        fleet.admit("late")  # 6 s are expected, 11 are possible
    assert caught.value.retry_after_s == pytest.approx(6, abs=0.1)
    fleet.admit("urgent", priority=PRIORITY)
    for number in range(4):
        now_s[0] += 1
        fleet.say(p, tokens(0, 7, request_id=f"s{number}"))
    fleet.admit("in time")


def test_checking_for_room_early_changes_nothing() -> None:
    fleet = Fleet(max_queued=1)
    fleet.join("p", Role.PREFILL)
    fleet.join("d", Role.DECODE)
    flex = fleet.admit("flex", priority=FLEX)
    fleet.table.check_room("m", 1, priority=PRIORITY)
    assert not flex.ended
    with pytest.raises(Overloaded):
        fleet.table.check_room("m", 1, priority=FLEX)


def test_prompts_without_output_move_the_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    fleet = Fleet(max_wait_s=10)
    p = fleet.join("p", Role.PREFILL)
    for number in range(8):
        fleet.admit(f"r{number}", max_tokens=0)
    for number in range(8):
        now_s[0] += 1
        ending = RequestFinished(request_id=f"r{number}", epoch=0, reason=FinishReason.LENGTH, num_output_tokens=0)
        fleet.say(p, ending)
    now_s[0] += 10
    for number in range(6):
        fleet.admit(f"s{number}", max_tokens=0)
    with pytest.raises(Overloaded):
        fleet.admit("late", max_tokens=0)
