"""The request table against a fleet that the test plays: dispatch, replay, stale words, lost workers, overload."""

from __future__ import annotations

import time

import pytest
from support.request_fleet import Fleet, handing, record, tokens

from fleet.messages import Cancel, HandedOff, Heartbeat, RequestFinished, RequestNote, RequestStarted, Returned
from fleet.types import (
    FinishReason,
    PeerRef,
    RequestState,
    Role,
)
from gateway.errors import NoWorkers, Overloaded
from gateway.router import AFFINITY_TOKENS


def test_the_plain_life_of_a_request() -> None:
    fleet = Fleet()
    p, d = fleet.join("p", Role.PREFILL), fleet.join("d", Role.DECODE)
    live = fleet.admit()
    (request,) = fleet.dispatched()
    assert request.targets == [d]
    fleet.say(p, RequestStarted(request_id="r", epoch=0, cached_tokens=2), tokens(0, 7), handing(d))
    fleet.say(d, HandedOff(request_id="r", epoch=0), tokens(1, 8))
    ending = RequestFinished(request_id="r", epoch=0, reason=FinishReason.STOP, num_output_tokens=2)
    fleet.say(d, ending, ending)
    assert (live.output, live.finish, live.cached_tokens) == ([7, 8], FinishReason.STOP, 2)
    assert [t.state.value for t in fleet.states] == ["queued", "prefilling", "handing_off", "decoding", "finished"]
    assert fleet.table.num_live == fleet.table.num_queued == 0
    assert all(w.booked_tokens == w.booked_requests == 0 for w in fleet.directory.workers())
    assert fleet.bus.take(Cancel) == []


@pytest.mark.parametrize("dies", ["prefill", "decode"])
@pytest.mark.parametrize("stage", ["sent", "first token", "handing off", "decoding"])
def test_a_dead_worker_costs_a_replay_and_no_token(dies: str, stage: str) -> None:
    fleet = Fleet()
    p, d = fleet.join("p", Role.PREFILL), fleet.join("d", Role.DECODE)
    live = fleet.admit()
    fleet.dispatched()
    stages = ["sent", "first token", "handing off", "decoding"]
    words: list[tuple[PeerRef, object]] = [
        (p, tokens(0, 7)),
        (p, handing(d)),
        (d, HandedOff(request_id="r", epoch=0)),
    ]
    for worker, word in words[: stages.index(stage)]:
        fleet.say(worker, word)
    fleet.join("p2", Role.PREFILL)
    fleet.join("d2", Role.DECODE)
    victim, other = (p, d) if dies == "prefill" else (d, p)
    matters = {"prefill": stage != "decoding", "decode": stage in ("handing off", "decoding")}[dies]
    fleet.bus.lost_callbacks[0](victim.address)
    if not matters:
        assert fleet.dispatched() == []
        return
    (request,) = fleet.dispatched()
    assert request.passport.epoch == 1
    assert request.passport.token_ids == [1, 2, 3, *live.output]
    cancelled = {address for address, _ in fleet.bus.take(Cancel)}
    assert victim.address not in cancelled
    if stage == "handing off":
        assert other.address in cancelled
    # The dead worker's last words come late, and are of an old epoch.
    fleet.say(victim, tokens(len(live.output), 99))
    assert 99 not in live.output
    fleet.say(PeerRef("p2", 1, "tcp://p2.1"), tokens(len(live.output), 8, epoch=1))
    assert live.output[-1] == 8


def test_a_complete_answer_is_not_replayed_when_its_worker_dies_before_saying_so() -> None:
    fleet = Fleet()
    p, d = fleet.join("p", Role.PREFILL), fleet.join("d", Role.DECODE)
    live = fleet.admit(max_tokens=2)
    fleet.say(p, tokens(0, 7), handing(d))
    fleet.say(d, HandedOff(request_id="r", epoch=0), tokens(1, 8))
    fleet.dispatched()
    fleet.bus.lost_callbacks[0](d.address)
    assert fleet.dispatched() == []
    assert live.finish is FinishReason.LENGTH


def test_what_a_worker_gives_back_is_replayed() -> None:
    fleet = Fleet()
    p, d = fleet.join("p", Role.PREFILL), fleet.join("d", Role.DECODE)
    live = fleet.admit()
    fleet.say(p, tokens(0, 7), handing(d))
    fleet.say(d, HandedOff(request_id="r", epoch=0), tokens(1, 8), Returned(request_id="r", epoch=0, reason="pages"))
    assert [r.passport.epoch for r in fleet.dispatched()] == [0, 1]
    assert live.output == [7, 8]


def test_nobody_there_waits_then_is_served_by_who_comes() -> None:
    fleet = Fleet()
    fleet.join("p", Role.PREFILL)
    fleet.admit()
    fleet.join("other", Role.DECODE, layers=2)
    assert fleet.dispatched() == []
    d = fleet.join("d", Role.DECODE)
    (request,) = fleet.dispatched()
    assert request.targets == [d]


def test_nobody_comes_in_time() -> None:
    fleet = Fleet(worker_wait_s=0.01)
    live = fleet.admit()
    time.sleep(0.02)
    fleet.table.sweep()
    assert (live.finish, live.retry_after_s) == (FinishReason.ERROR, 5)
    assert "no worker came" in (live.error or "")
    with pytest.raises(NoWorkers):
        Fleet(worker_wait_s=0).admit()


def test_a_full_queue_refuses_at_once() -> None:
    fleet = Fleet(max_queued=2)
    p = fleet.join("p", Role.PREFILL)
    fleet.join("d", Role.DECODE)
    fleet.admit("a")
    fleet.admit("b")
    with pytest.raises(Overloaded) as caught:
        fleet.admit("c")
    assert caught.value.retry_after_s > 0
    fleet.say(p, tokens(0, 7, request_id="a"))
    fleet.admit("c")


def test_bursts_are_spread_by_booked_load() -> None:
    fleet = Fleet()
    for name in ("p1", "p2"):
        fleet.join(name, Role.PREFILL)
    for name in ("d1", "d2"):
        fleet.join(name, Role.DECODE)
    for i in range(40):
        fleet.admit(f"r{i}")
    first_targets = [r.targets[0].name for r in fleet.dispatched()]
    assert sorted(first_targets.count(name) for name in ("d1", "d2")) == [20, 20]
    booked = [w.booked_requests for w in fleet.directory.workers(role=Role.PREFILL)]
    assert booked == [20, 20]


async def test_leaving_cancels_on_every_holder() -> None:
    fleet = Fleet()
    p, d = fleet.join("p", Role.PREFILL), fleet.join("d", Role.DECODE)
    live = fleet.admit()
    fleet.say(p, tokens(0, 7), handing(d))
    await live.aclose()
    await live.aclose()
    assert {address for address, _ in fleet.bus.take(Cancel)} == {p.address, d.address}
    assert live.finish is FinishReason.CANCELLED
    assert fleet.states[-1].state is RequestState.FINISHED


def test_notes_tell_workers_what_to_forget_and_the_gateway_what_is_lost() -> None:
    fleet = Fleet()
    p, d = fleet.join("p", Role.PREFILL), fleet.join("d", Role.DECODE)
    live = fleet.admit()
    fleet.dispatched()
    ghost = Heartbeat(record=record("d", Role.DECODE), requests=[RequestNote("ghost", 3, 0)])
    fleet.directory.heartbeat(ghost)
    assert fleet.bus.take(Cancel) == [(d.address, Cancel(request_id="ghost", epoch=3))]
    held = Heartbeat(record=record("p", Role.PREFILL), requests=[RequestNote("r", 0, 0)])
    empty = Heartbeat(record=record("p", Role.PREFILL), requests=[])
    for beat in (empty, held, empty):
        fleet.directory.heartbeat(beat)
    assert live.epoch == 0
    fleet.directory.heartbeat(empty)
    assert live.epoch == 1
    assert fleet.bus.take(Cancel) == [(p.address, Cancel(request_id="r", epoch=0))]


def test_a_new_incarnation_voids_the_old_one() -> None:
    fleet = Fleet()
    fleet.join("p", Role.PREFILL)
    d = fleet.join("d", Role.DECODE)
    live = fleet.admit()
    fleet.say(PeerRef("p", 1, "tcp://p.1"), handing(d))
    fleet.join("d", Role.DECODE, incarnation=2)
    assert live.epoch == 1
    assert fleet.dispatched()[-1].targets[0].incarnation == 2


def test_a_request_that_kills_worker_after_worker_ends() -> None:
    fleet = Fleet()
    fleet.join("d", Role.DECODE)
    live = fleet.admit()
    for incarnation in range(1, 20):
        p = fleet.join("p", Role.PREFILL, incarnation=incarnation)
        if live.ended:
            break
        fleet.bus.lost_callbacks[0](p.address)
    assert live.finish is FinishReason.ERROR
    assert "died on this request" in (live.error or "")


def test_a_silent_worker_is_dropped_by_the_sweep() -> None:
    fleet = Fleet()
    fleet.join("d", Role.DECODE)
    fleet.directory.workers()[0].heard_s -= 2
    fleet.directory.sweep()
    assert fleet.directory.workers() == []


def test_a_batch_that_does_not_fit_is_refused_before_any_of_it_starts() -> None:
    fleet = Fleet(max_queued=3)
    fleet.join("p", Role.PREFILL)
    fleet.join("d", Role.DECODE)
    fleet.admit("a")
    fleet.table.require_room("m", 2, priority=0)
    with pytest.raises(Overloaded) as full:
        fleet.table.require_room("m", 3, priority=0)
    assert full.value.retry_after_s > 0
    assert fleet.table.num_queued == 1
    assert fleet.counted("baton_requests_rejected_total", reason="overloaded") == 3


def test_an_affinity_stays_with_its_worker_until_that_has_much_more_to_do() -> None:
    fleet = Fleet()
    for name in ("p1", "p2", "p3"):
        fleet.join(name, Role.PREFILL)
    fleet.join("d", Role.DECODE)

    def worker_of(request_id: str, affinity: str) -> str:
        live = fleet.table.admit(fleet.passport(request_id), affinity=affinity)
        assert live.prefill_peer is not None
        return live.prefill_peer.name

    homes = {worker_of(f"a{number}", "one key") for number in range(8)}
    assert len(homes) == 1
    (home,) = homes
    for worker in fleet.directory.workers(role=Role.PREFILL):
        worker.booked_tokens += AFFINITY_TOKENS + 100 if worker.peer.name == home else 0
    other = worker_of("b", "one key")
    assert other != home
    assert worker_of("c", "one key") == other, "it stays where it went"
    assert len({worker_of(f"d{number}", f"key {number}") for number in range(12)}) > 1, "keys spread"
