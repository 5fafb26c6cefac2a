"""A request moves from one decode worker to another: whose word counts, and what happens if somebody is gone."""

from __future__ import annotations

import pytest
from support.request_fleet import Fleet, handing, tokens

from fleet.hops import decode_hops
from fleet.messages import Cancel, HandedOff, MoveReason, Returned
from fleet.types import FinishReason, PeerRef, RequestState, Role
from gateway.live import LiveRequest, Stage


def handed(next_index: int, epoch: int = 0) -> HandedOff:
    return HandedOff(request_id="r", epoch=epoch, next_index=next_index)


def returned(reason: str = "hand_off_uncertain") -> Returned:
    return Returned(request_id="r", epoch=0, reason=reason)


class Moving:
    """A request that decodes on `d1`, has said two tokens, and may move to `d2` or `d3`."""

    def __init__(self, **params: object) -> None:
        self.fleet = Fleet()
        self.p = self.fleet.join("p", Role.PREFILL)
        self.d1 = self.fleet.join("d1", Role.DECODE)
        self.live: LiveRequest = self.fleet.admit(**params)
        self.fleet.dispatched()
        self.d2, self.d3 = (self.fleet.join(name, Role.DECODE) for name in ("d2", "d3"))
        self.say(self.p, tokens(0, 10), handing(self.d1))
        self.say(self.d1, handed(1), tokens(1, 11))

    def say(self, worker: PeerRef, *events: object) -> None:
        self.fleet.say(worker, *events)

    def leaves(self, giver: PeerRef, taker: PeerRef) -> None:
        self.say(giver, handing(taker, reason=MoveReason.DRAIN))

    @property
    def where(self) -> tuple[Stage, list[str]]:
        return self.live.stage, [peer.name for peer in self.live.holders]

    @property
    def booked(self) -> dict[str, int]:
        return {w.peer.name: w.booked_requests for w in self.fleet.directory.workers() if w.booked_requests}

    @property
    def num_moves(self) -> float:
        return self.fleet.counted("baton_migrations_total", reason="drain")


@pytest.fixture
def moving() -> Moving:
    return Moving()


def test_a_move_keeps_the_epoch_and_is_counted(moving: Moving) -> None:
    moving.leaves(moving.d1, moving.d2)
    assert moving.where == (Stage.HANDING_OFF, ["d1", "d2"])
    assert moving.booked == {"d2": 1}
    assert moving.num_moves == 0
    moving.say(moving.d2, handed(2), tokens(2, 12))
    assert moving.where == (Stage.DECODING, ["d2"])
    assert (moving.live.output, moving.live.epoch) == ([10, 11, 12], 0)
    assert moving.num_moves == 1
    assert moving.fleet.counted("baton_migration_pause_seconds_count", model="m") == 1
    states = [(t.state, t.fields.get("decode_worker")) for t in moving.fleet.states]
    assert states[-2:] == [(RequestState.DECODING, "d1"), (RequestState.DECODING, "d2")]
    moving.fleet.directory.goodbye(moving.d1)
    assert (moving.fleet.dispatched(), moving.fleet.bus.take(Cancel)) == ([], [])


def test_the_taker_may_be_heard_before_the_giver(moving: Moving) -> None:
    moving.say(moving.d2, handed(3), tokens(3, 13))
    assert moving.live.output == [10, 11]
    moving.say(moving.d1, tokens(2, 12))
    assert moving.num_moves == 0
    moving.leaves(moving.d1, moving.d2)
    moving.leaves(moving.d1, moving.d2)
    assert moving.where == (Stage.DECODING, ["d2"])
    assert moving.live.output == [10, 11, 12, 13]
    assert moving.num_moves == 1
    [*_, hop] = decode_hops(str(moving.fleet.states[-1].fields["hops"]).encode())
    assert (hop.worker, hop.reason, hop.transport) == ("d2", "drain", "shm")


def test_late_words_of_the_first_hand_off_change_nothing(moving: Moving) -> None:
    moving.leaves(moving.d1, moving.d2)
    moving.say(moving.p, handing(moving.d1))
    assert moving.where == (Stage.HANDING_OFF, ["d1", "d2"])
    moving.say(moving.d2, handed(2))
    moving.say(moving.p, handing(moving.d1), returned())
    moving.say(moving.d1, handed(1), returned())
    assert moving.where == (Stage.DECODING, ["d2"])
    assert moving.fleet.dispatched() == []
    assert moving.live.epoch == 0


def test_two_moves_heard_backwards_end_with_the_last_holder(moving: Moving) -> None:
    moving.leaves(moving.d1, moving.d2)
    moving.say(moving.d3, handed(5))
    moving.say(moving.d2, handed(2), tokens(2, 12, 13, 14))
    moving.leaves(moving.d2, moving.d3)
    assert moving.where == (Stage.DECODING, ["d3"])
    moving.say(moving.d3, tokens(5, 15))
    assert moving.live.output == [10, 11, 12, 13, 14, 15]
    for peer in (moving.d1, moving.d2):
        moving.fleet.directory.goodbye(peer)
    assert moving.fleet.dispatched() == []


@pytest.mark.parametrize("dies", ["d1", "d2"])
def test_a_death_in_between_costs_a_replay_and_no_token(moving: Moving, dies: str) -> None:
    moving.leaves(moving.d1, moving.d2)
    victim, other = (moving.d1, moving.d2) if dies == "d1" else (moving.d2, moving.d1)
    moving.fleet.bus.lost_callbacks[0](victim.address)
    (request,) = moving.fleet.dispatched()
    assert (request.passport.epoch, request.passport.token_ids) == (1, [1, 2, 3, 10, 11])
    addresses = {address for address, _ in moving.fleet.bus.take(Cancel)}
    assert other.address in addresses
    assert victim.address not in addresses
    moving.say(other, handed(2), tokens(2, 99))
    assert moving.live.output == [10, 11]
    assert moving.num_moves == 0


def test_a_death_after_the_move_is_no_concern_of_it(moving: Moving) -> None:
    moving.leaves(moving.d1, moving.d2)
    moving.say(moving.d2, handed(2))
    moving.fleet.bus.lost_callbacks[0](moving.d1.address)
    assert moving.fleet.dispatched() == []


def test_a_giver_that_leaves_before_the_taker_is_heard_is_not_missed(moving: Moving) -> None:
    moving.leaves(moving.d1, moving.d2)
    moving.fleet.directory.goodbye(moving.d1)
    assert moving.where == (Stage.HANDING_OFF, ["d2"])
    assert moving.fleet.dispatched() == []
    moving.say(moving.d2, handed(2), tokens(2, 12))
    assert moving.where == (Stage.DECODING, ["d2"])
    assert moving.num_moves == 1


def test_a_holder_that_leaves_alone_is_replayed(moving: Moving) -> None:
    moving.fleet.directory.goodbye(moving.d1)
    (request,) = moving.fleet.dispatched()
    assert request.passport.epoch == 1


@pytest.mark.parametrize("giver_is_sure", [True, False])
def test_what_the_giver_takes_back_is_replayed_only_while_it_holds_it(moving: Moving, giver_is_sure: bool) -> None:
    moving.leaves(moving.d1, moving.d2)
    if not giver_is_sure:
        moving.say(moving.d2, handed(2))
    moving.say(moving.d1, returned())
    assert len(moving.fleet.dispatched()) == giver_is_sure
    assert moving.live.epoch == giver_is_sure


async def test_leaving_in_between_cancels_on_both(moving: Moving) -> None:
    moving.leaves(moving.d1, moving.d2)
    await moving.live.aclose()
    addresses = {address for address, _ in moving.fleet.bus.take(Cancel)}
    assert {moving.d1.address, moving.d2.address} <= addresses
    assert moving.live.finish is FinishReason.CANCELLED


async def test_a_taker_heard_after_the_end_is_told_to_forget(moving: Moving) -> None:
    await moving.live.aclose()
    moving.fleet.bus.take(Cancel)
    moving.leaves(moving.d1, moving.d2)
    moving.say(moving.d2, handed(2))
    assert moving.fleet.bus.take(Cancel) == [(moving.d2.address, Cancel(request_id="r", epoch=0))]


def test_a_taker_that_is_not_known_here_costs_a_replay(moving: Moving) -> None:
    moving.leaves(moving.d1, PeerRef("stranger", 1, "tcp://stranger"))
    assert [request.passport.epoch for request in moving.fleet.dispatched()] == [1]
