"""A hand-off survives the death or silence of either side at each of its steps, without a lost or spoilt page."""

from __future__ import annotations

import pytest
from support.hand_off_process import LIMITS, PAGE_SIZE, page_content, page_name
from support.hand_off_world import World

from fleet.hand_off_messages import Alive, Commit, Grant, Offer, Pages, RefuseReason, Released
from kvtransfer.actions import (
    Adopted,
    Committing,
    FailReason,
    Given,
    GrantClosed,
    HandOffFailed,
    PeerLost,
    ReleasePages,
    TargetRefused,
)

NUM_TOKENS = 5 * PAGE_SIZE + 2
DEADLINE_S = LIMITS.liveness_s + 3 * LIMITS.beat_s
TRANSPORTS = pytest.mark.parametrize("transport", ["shm", "tcp"])


def count_steps(transport: str) -> int:
    world = World(transport=transport)
    world.hand_off("r", NUM_TOKENS)
    steps = 0
    while world.step():
        steps += 1
    return steps


@TRANSPORTS
def test_a_whole_hand_off_ends_in_one_adoption(transport: str) -> None:
    world = World(transport=transport)
    world.hand_off("r", NUM_TOKENS)
    world.run()
    giver, taker = world.processes["giver-0"], world.processes["taker-0"]
    assert world.adoptions(("r", 0)) == 1
    [given] = world.news_of(giver, Given)
    assert (given.num_moved_pages, given.num_held_pages, given.transport) == (6, 0, transport)
    order = [type(news) for news in giver.news]
    assert order.index(Committing) < order.index(Given) < order.index(ReleasePages)
    [adopted] = world.news_of(taker, Adopted)
    assert len(adopted.passport.token_ids) == NUM_TOKENS + 1
    world.check_settled()


@TRANSPORTS
@pytest.mark.parametrize("victim", ["giver-0", "taker-0"])
@pytest.mark.parametrize("restart", [False, True])
def test_killed_at_every_step(transport: str, victim: str, *, restart: bool) -> None:
    for steps in range(count_steps(transport) + 1):
        world = World(transport=transport)
        world.hand_off("r", NUM_TOKENS)
        for _ in range(steps):
            world.step()
        world.kill(world.processes[victim])
        if restart:
            world.boot(victim)
        world.run(for_s=DEADLINE_S)
        if restart:
            world.started = {key: giver for key, giver in world.started.items() if giver.alive}
        world.check_settled()
        assert world.adoptions(("r", 0)) <= 1
        for life in world.lives:
            for news in world.news_of(life, HandOffFailed):
                assert news.reason in {FailReason.REFUSED, FailReason.UNCERTAIN}
                if news.reason is FailReason.REFUSED:
                    assert world.adoptions(("r", 0)) == 0


@TRANSPORTS
@pytest.mark.parametrize("victim", ["giver-0", "taker-0"])
def test_stopped_at_every_step_then_continued(transport: str, victim: str) -> None:
    for steps in range(count_steps(transport) + 1):
        world = World(transport=transport)
        world.hand_off("r", NUM_TOKENS)
        for _ in range(steps):
            world.step()
        world.processes[victim].stopped = True
        world.run(for_s=DEADLINE_S)
        world.processes[victim].stopped = False
        world.run(for_s=2 * DEADLINE_S)
        world.check_settled()
        assert world.adoptions(("r", 0)) <= 1


def test_pages_of_a_stopped_direct_giver_are_quarantined_until_it_is_dead() -> None:
    world = World(transport="shm")
    world.hand_off("r", NUM_TOKENS)
    while not world.jobs:
        world.step()
    world.step_job()
    giver, taker = world.processes["giver-0"], world.processes["taker-0"]
    giver.stopped = True
    world.run(for_s=DEADLINE_S)
    assert set(taker.bank.owners.values()) == {"quarantined:1"}
    assert taker.desk.taker.num_quarantined == 1
    [closed] = world.news_of(taker, GrantClosed)
    assert closed.quarantined
    world.run(for_s=50 * LIMITS.liveness_s)
    assert taker.desk.taker.num_quarantined == 1, "silence is not death"
    world.kill(giver)
    world.run(for_s=LIMITS.beat_s)
    assert taker.bank.owners == {}
    world.check_settled()


def test_pages_of_a_stopped_carried_giver_are_free_at_once() -> None:
    world = World(transport="tcp")
    world.hand_off("r", NUM_TOKENS)
    for _ in range(4):
        world.step()
    world.processes["giver-0"].stopped = True
    world.run(for_s=DEADLINE_S)
    assert world.processes["taker-0"].bank.owners == {}


@TRANSPORTS
@pytest.mark.parametrize("lost", [Offer, Grant, Pages, Commit, Released])
def test_any_lost_message_is_made_up_for(transport: str, lost: type) -> None:
    world = World(transport=transport)
    world.hand_off("r", NUM_TOKENS)
    dropped = False
    while world.network or world.jobs:
        flight = world.network[0] if world.network else None
        if flight is not None and isinstance(flight.message, lost) and not dropped:
            world.network.pop(0)
            dropped = True
        else:
            world.step()
    world.run(for_s=3 * LIMITS.liveness_s)
    assert world.adoptions(("r", 0)) == 1
    world.check_settled()


@TRANSPORTS
def test_a_lost_ack_is_asked_for_again_and_nothing_is_adopted_twice(transport: str) -> None:
    world = World(transport=transport)
    world.hand_off("r", NUM_TOKENS)
    while not world.adoptions(("r", 0)):
        world.step()
    world.network.clear()
    world.run(for_s=2 * LIMITS.beat_s)
    assert world.adoptions(("r", 0)) == 1
    assert len(world.news_of(world.processes["giver-0"], Given)) == 1
    world.check_settled()


@TRANSPORTS
def test_full_pages_move_while_the_prompt_still_computes(transport: str) -> None:
    world = World(transport=transport)
    giver, taker = world.processes["giver-0"], world.processes["taker-0"]
    world.start(giver, "r", 0, NUM_TOKENS, [taker])
    world.run()
    assert giver.desk.giver.lag("r", 0) == 0
    for ready in (2, 5):
        world.ready("r", 0, ready)
        assert (giver.desk.giver.lag("r", 0) or 0) > 0
        world.run()
        assert giver.desk.giver.lag("r", 0) == 0
    assert world.adoptions(("r", 0)) == 0
    world.commit("r", 0, NUM_TOKENS)
    world.run()
    assert world.adoptions(("r", 0)) == 1


@TRANSPORTS
def test_held_pages_are_skipped(transport: str) -> None:
    world = World(transport=transport)
    taker = world.processes["taker-0"]
    for index in range(3):
        page = taker.bank.name(page_name("r", index))
        taker.memory[page] = page_content("r", index)
    world.hand_off("r", NUM_TOKENS)
    world.run()
    [given] = world.news_of(world.processes["giver-0"], Given)
    assert (given.num_held_pages, given.num_moved_pages) == (3, 3)
    assert world.adoptions(("r", 0)) == 1


@TRANSPORTS
def test_a_full_taker_sends_the_giver_elsewhere(transport: str) -> None:
    world = World(transport=transport, takers=2, num_pages=6)
    world.hand_off("first", NUM_TOKENS)
    world.run()
    world.hand_off("second", NUM_TOKENS)
    world.run()
    assert world.processes["taker-0"].bank.adopted == {("first", 0): 1}
    assert world.processes["taker-1"].bank.adopted == {("second", 0): 1}
    world.check_settled()


@TRANSPORTS
def test_when_all_are_full_the_giver_waits_as_long_as_it_takes(transport: str) -> None:
    world = World(transport=transport, takers=2, num_pages=6)
    for name in ("a", "b", "c"):
        world.hand_off(name, NUM_TOKENS)
        world.run()
    giver = world.processes["giver-0"]
    world.run(for_s=20 * LIMITS.liveness_s)
    assert giver.desk.giver.num_open == 1
    assert world.news_of(giver, HandOffFailed) == []
    world.processes["taker-1"].bank.finish(("b", 0))
    world.run(for_s=4 * LIMITS.max_backoff_s)
    assert world.adoptions(("c", 0)) == 1
    world.check_settled()


@TRANSPORTS
def test_cancel_at_every_step_frees_both_sides(transport: str) -> None:
    for steps in range(count_steps(transport) + 1):
        world = World(transport=transport)
        world.hand_off("r", NUM_TOKENS)
        for _ in range(steps):
            world.step()
        adopted = world.adoptions(("r", 0))
        for process in world.processes.values():
            world.cancel(process, "r", 0)
        world.run(for_s=DEADLINE_S)
        assert world.adoptions(("r", 0)) == adopted
        world.check_settled()


def test_an_offer_after_its_cancel_is_refused_and_holds_nothing() -> None:
    world = World(transport="tcp")
    world.cancel(world.processes["taker-0"], "r", 0)
    world.hand_off("r", NUM_TOKENS)
    world.run()
    [failed] = world.news_of(world.processes["giver-0"], HandOffFailed)
    assert failed.reason is FailReason.CANCELLED
    assert world.processes["taker-0"].bank.owners == {}
    world.hand_off("r", NUM_TOKENS, epoch=1)
    world.run()
    assert world.adoptions(("r", 1)) == 1


@TRANSPORTS
def test_a_newer_epoch_closes_the_older_grant_and_fences_it(transport: str) -> None:
    world = World(transport=transport, givers=2)
    old, new, taker = (world.processes[name] for name in ("giver-0", "giver-1", "taker-0"))
    world.start(old, "r", 0, PAGE_SIZE, [taker])
    world.run()
    world.start(new, "r", 1, PAGE_SIZE, [taker])
    world.commit("r", 1, PAGE_SIZE)
    world.run()
    assert world.adoptions(("r", 1)) == 1
    world.commit("r", 0, PAGE_SIZE)
    world.run(for_s=DEADLINE_S)
    assert world.adoptions(("r", 0)) == 0
    [failed] = world.news_of(old, HandOffFailed)
    assert failed.reason is FailReason.STALE
    world.check_settled()


@TRANSPORTS
def test_a_draining_taker_takes_nothing_new_but_finishes_what_is_open(transport: str) -> None:
    world = World(transport=transport)
    giver, taker = world.processes["giver-0"], world.processes["taker-0"]
    world.start(giver, "open", 0, PAGE_SIZE, [taker])
    world.run()
    taker.desk.taker.drain()
    world.hand_off("late", PAGE_SIZE)
    world.commit("open", 0, PAGE_SIZE)
    world.run()
    assert taker.bank.adopted == {("open", 0): 1}
    [refused] = world.news_of(giver, TargetRefused)
    assert refused.reason is RefuseReason.DRAINING
    world.check_settled()


@TRANSPORTS
def test_what_one_side_has_forgotten_the_other_closes_after_two_beats(transport: str) -> None:
    world = World(transport=transport)
    giver, taker = world.processes["giver-0"], world.processes["taker-0"]
    world.start(giver, "r", 0, NUM_TOKENS, [taker])
    world.run()
    world.cancel(giver, "r", 0)
    world.network.clear()  # the Abort is lost
    world.start(giver, "other", 0, PAGE_SIZE, [taker])
    assert taker.desk.taker.num_open == 1
    world.run(for_s=3 * LIMITS.beat_s)
    assert {owner for owner in taker.bank.owners.values() if owner != "reserved:2"} == set()
    assert world.news_of(giver, PeerLost) == []


def test_deadlines_measure_silence_not_how_long_a_hand_off_takes() -> None:
    world = World(transport="tcp")
    giver, taker = world.processes["giver-0"], world.processes["taker-0"]
    world.start(giver, "r", 0, NUM_TOKENS, [taker])
    world.run(for_s=50 * LIMITS.liveness_s)
    assert giver.desk.giver.num_open == taker.desk.taker.num_open == 1
    assert any(isinstance(flight.message, Alive) for flight in world.network) or not world.network
    world.commit("r", 0, NUM_TOKENS)
    world.run()
    assert world.adoptions(("r", 0)) == 1


def test_a_process_that_stood_still_does_not_blame_its_peers() -> None:
    world = World(transport="tcp")
    giver, taker = world.processes["giver-0"], world.processes["taker-0"]
    world.start(giver, "r", 0, NUM_TOKENS, [taker])
    world.run(for_s=LIMITS.liveness_s)
    world.advance(10 * LIMITS.liveness_s)  # both stood still: one tick after a long time
    world.run(for_s=LIMITS.liveness_s)
    assert world.news_of(giver, PeerLost) == world.news_of(taker, PeerLost) == []
    assert giver.desk.giver.num_open == taker.desk.taker.num_open == 1
