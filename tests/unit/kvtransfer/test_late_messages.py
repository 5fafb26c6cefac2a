"""Repeated, late and mixed-up messages change nothing that they should not."""

from __future__ import annotations

import msgspec
import pytest
from support.hand_off_process import LIMITS, PAGE_SIZE
from support.hand_off_world import World

from fleet.hand_off_messages import Abort, Ack, Commit, Grant, Offer, Pages, PagesTaken
from kvtransfer.actions import FailReason, Given, Granted, HandOffFailed, Send, Store
from kvtransfer.numbering import first_number
from kvtransfer.stats import StaleReason

NUM_TOKENS = 4 * PAGE_SIZE


def open_hand_off(transport: str) -> World:
    """A granted hand-off of which nothing is ready yet."""
    world = World(transport=transport)
    world.start(world.processes["giver-0"], "r", 0, NUM_TOKENS, [world.processes["taker-0"]])
    return world


def sole_message(world: World, kind: type) -> int:
    [index] = [at for at, flight in enumerate(world.network) if isinstance(flight.message, kind)]
    return index


def test_repeated_pages_are_answered_but_not_stored_again() -> None:
    world = open_hand_off("tcp")
    world.run()
    world.ready("r", 0, 2)
    world.deliver(sole_message(world, Pages), keep=True)
    taker = world.processes["taker-0"]
    assert [type(job.work) for job in world.jobs] == [Store]
    world.step_job()
    world.step_job()
    pages = world.network[sole_message(world, Pages)]
    answer = taker.desk.on_message(pages.message, [memoryview(bytes(8))] * 2, world.now_s)
    assert [type(action) for action in answer] == [Send]
    assert world.jobs == []
    world.commit("r", 0, NUM_TOKENS)
    world.run()
    assert world.adoptions(("r", 0)) == 1


def test_pages_of_a_wrong_size_close_the_grant() -> None:
    world = open_hand_off("tcp")
    world.run()
    world.ready("r", 0, 2)
    flight = world.network.pop(sole_message(world, Pages))
    taker = world.processes["taker-0"]
    [abort, closed] = taker.desk.on_message(flight.message, [memoryview(b"short")] * 2, world.now_s)
    assert isinstance(abort, Send)
    assert isinstance(abort.message, Abort)
    assert "8 bytes" in abort.message.reason
    assert not getattr(closed, "quarantined", True)
    assert taker.bank.owners == {}


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_second_life_that_answers_the_same_offer_is_declined_and_disturbs_nothing(transport: str) -> None:
    world = open_hand_off(transport)
    giver = world.processes["giver-0"]
    offer = world.network[sole_message(world, Offer)].message
    assert isinstance(offer, Offer)
    world.run()
    [granted] = world.news_of(giver, Granted)
    elsewhere = World(transport=transport)
    elsewhere.boot("taker-0")
    [send] = elsewhere.processes["taker-0"].desk.on_message(offer, [], world.now_s)
    assert isinstance(send, Send)
    assert isinstance(send.message, Grant)
    grant = send.message
    # Straight to the giver: the desk would close the hand-off with the former life at the first word of the new one.
    [declined] = giver.desk.giver.on_grant(grant, world.now_s)
    assert isinstance(declined, Send)
    assert isinstance(declined.message, Abort)
    assert (declined.to, declined.message.generation) == (grant.taker, grant.generation)
    assert giver.desk.stale == {StaleReason.GRANT: 1}
    abort = Abort(
        sender=grant.taker, request_id="r", epoch=0, offer=grant.offer, generation=grant.generation, reason="restarted"
    )
    [released] = giver.desk.giver.on_abort(abort, world.now_s)
    assert isinstance(released, Send)
    assert released.to == grant.taker
    world.commit("r", 0, NUM_TOKENS)
    world.run()
    assert world.adoptions(("r", 0)) == 1
    [given] = world.news_of(giver, Given)
    assert given.taker == granted.taker


def test_a_giver_whose_grant_was_forgotten_offers_again() -> None:
    world = open_hand_off("tcp")
    giver, taker = world.processes["giver-0"], world.processes["taker-0"]
    world.run()
    taker.desk.taker.close_all("test", world.now_s)  # and its Abort is lost
    world.start(giver, "other", 0, PAGE_SIZE, [taker])  # both go on hearing from each other
    world.network.clear()
    world.start(giver, "third", 0, PAGE_SIZE, [taker])
    world.run(for_s=4 * LIMITS.beat_s)
    assert [news.request_id for news in world.news_of(giver, Granted)].count("r") == 2
    world.cancel(giver, "third", 0)
    world.commit("r", 0, NUM_TOKENS)
    world.commit("other", 0, PAGE_SIZE)
    world.run(for_s=LIMITS.liveness_s)
    assert world.adoptions(("r", 0)) == 1
    world.check_settled()


def test_nobody_may_begin_to_write_a_quarantined_page() -> None:
    world = open_hand_off("shm")
    giver, taker = world.processes["giver-0"], world.processes["taker-0"]
    world.run()
    assert any(taker.gate.words.values())
    giver.stopped = True
    world.cancel(taker, "r", 0)
    assert taker.desk.taker.num_quarantined == 1
    assert not any(taker.gate.words.values())
    giver.stopped = False
    world.ready("r", 0, 4)
    world.run(for_s=LIMITS.liveness_s)
    [failed] = world.news_of(giver, HandOffFailed)
    assert failed.reason is FailReason.CANCELLED
    world.check_settled()


def test_a_sequence_that_outgrew_its_grant_is_handed_off_as_far_as_it_fits() -> None:
    world = World(transport="tcp")
    giver, taker = world.processes["giver-0"], world.processes["taker-0"]
    world.start(giver, "r", 0, 2 * PAGE_SIZE, [taker])
    world.run()
    giver.own_pages["r", 0] += world.own(giver, 1)
    world.commit("r", 0, 2 * PAGE_SIZE + 3)
    world.run()
    [adopted] = [news for news in taker.news if type(news).__name__ == "Adopted"]
    assert getattr(adopted, "num_computed_tokens", None) == 2 * PAGE_SIZE
    assert world.adoptions(("r", 0)) == 1
    world.check_settled()


def test_what_a_woken_peer_still_has_to_say_is_counted() -> None:
    world = open_hand_off("tcp")
    giver, taker = world.processes["giver-0"], world.processes["taker-0"]
    grant_to_come = world.network[sole_message(world, Offer)]
    world.cancel(giver, "r", 0)
    [granted] = taker.desk.on_message(grant_to_come.message, [], world.now_s)
    assert isinstance(granted, Send)
    assert isinstance(granted.message, Grant)
    [declined] = giver.desk.on_message(granted.message, [], world.now_s)
    assert isinstance(declined, Send)
    assert giver.desk.stale == {StaleReason.GRANT: 1}
    former = msgspec.structs.replace(granted.message, offer=first_number(giver.peer.incarnation + 1))
    assert giver.desk.on_message(former, [], world.now_s) == []
    assert giver.desk.stale == {StaleReason.GRANT: 1, StaleReason.INCARNATION: 1}
    ack = Ack(request_id="r", epoch=0, generation=granted.message.generation)
    assert giver.desk.on_message(ack, [], world.now_s) == []
    assert giver.desk.stale[StaleReason.GRANT] == 2
    assert taker.desk.stale == {}


def committed_hand_off() -> World:
    """Two pages have gone over tcp; the last ones and the Commit are on their way."""
    world = open_hand_off("tcp")
    world.run()
    world.ready("r", 0, 2)
    world.run()
    world.commit("r", 0, NUM_TOKENS)
    return world


def test_a_commit_follows_its_last_pages_without_waiting_and_is_adopted_once_they_are_stored() -> None:
    world = committed_hand_off()
    assert [type(flight.message) for flight in world.network] == [Pages, Commit]
    world.deliver()
    world.deliver()
    assert world.adoptions(("r", 0)) == 0, "the pages are being stored"
    world.step_job()
    world.step_job()
    assert world.adoptions(("r", 0)) == 1
    assert not any(isinstance(flight.message, PagesTaken) for flight in world.network), "the Ack says it"
    world.run()
    world.check_settled()


def test_last_pages_lost_before_their_commit_are_sent_again_with_it() -> None:
    world = committed_hand_off()
    del world.network[sole_message(world, Pages)]
    world.run()
    assert world.adoptions(("r", 0)) == 0
    world.run(for_s=2 * LIMITS.beat_s)
    assert world.adoptions(("r", 0)) == 1
    [given] = world.news_of(world.processes["giver-0"], Given)
    assert given.num_moved_pages == 4
    world.check_settled()


def test_a_cancel_while_a_commit_waits_for_its_pages_frees_them() -> None:
    world = committed_hand_off()
    world.deliver()
    world.deliver()
    taker = world.processes["taker-0"]
    world.cancel(taker, "r", 0)
    world.run()
    assert world.adoptions(("r", 0)) == 0
    assert taker.bank.owners == {}
    [failed] = world.news_of(world.processes["giver-0"], HandOffFailed)
    assert failed.reason is FailReason.UNCERTAIN
    world.check_settled()


def test_pages_of_a_standing_sequence_go_before_those_of_one_that_computes() -> None:
    world = open_hand_off("tcp")
    giver, taker = world.processes["giver-0"], world.processes["taker-0"]
    world.start(giver, "s", 0, NUM_TOKENS, [taker])
    world.run()
    world.ready("r", 0, 4)
    world.commit("s", 0, NUM_TOKENS)
    sent = []
    while world.network or world.jobs:
        if world.network and isinstance(world.network[0].message, Pages):
            sent.append(world.network[0].message.request_id)
        world.step()
    assert sent[:2] == ["r", "r"], "they had filled the window"
    assert (set(sent[2:-1]), sent[-1]) == ({"s"}, "r")
    assert world.adoptions(("s", 0)) == 1
