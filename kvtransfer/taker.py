"""The taking side of hand-offs, as a state machine without input or output.

    Offer --> (fingerprint, draining, cancelled, epoch, transport, room) --no--> Refuse, nothing held
                  | yes: pages reserved
                  v
               GRANTED --------------------- Commit ----------------------> adopted, Ack (again for a repetition)
                  |  \
                  |   +-- the giver's Abort ------------------------------> freed
                  |
                  | Cancel, newer epoch, peer lost, forgotten by the giver
                  v
               CLOSED, Abort sent --(carried: own stores have returned)----> freed
                  |                 (direct: already known dead)
                  v
               QUARANTINED, Abort repeated each beat
                  +-- Released, Abort or Commit of this very grant, or the giver's process is dead --> freed

A page on a direct transport is free only when its writer is known to be done: silence is not death. Pages on a
carried one are written by this process alone, and are free at once.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from fleet.hand_off_messages import (
    Abort,
    Ack,
    Commit,
    Grant,
    Offer,
    OpenHandOff,
    Pages,
    PagesTaken,
    PoolRef,
    RefuseReason,
    Released,
)
from fleet.types import Fingerprint, PeerRef
from kvtransfer.actions import Action, Adopted, Store
from kvtransfer.admission import Admission
from kvtransfer.bank import PageBank, WriteGate
from kvtransfer.host import ProcessWatch
from kvtransfer.incoming import Incoming, IncomingBook, open_grants
from kvtransfer.limits import HandOffLimits
from kvtransfer.numbering import first_number
from kvtransfer.stats import StaleReason
from kvtransfer.transport import DirectTransport, Transports

_OVER = {RefuseReason.CANCELLED, RefuseReason.STALE}


@dataclass(frozen=True, slots=True, kw_only=True)
class TakerConfig:
    """What a taker is made of: this process, its pages, who owns them, and over what they may come.

    `stale` counts messages that came too late; it is shared with the other half.
    """

    peer: PeerRef
    fingerprint: Fingerprint
    pool: PoolRef
    transports: Transports
    bank: PageBank
    gate: WriteGate
    watch: ProcessWatch
    limits: HandOffLimits
    stale: Counter[StaleReason] = field(default_factory=Counter)


class Taker:
    """All hand-offs that one process takes. Every method returns the actions to execute, in order."""

    def __init__(self, config: TakerConfig) -> None:
        self._config = config
        self._limits = config.limits
        self._book = IncomingBook(config.peer, config.bank, config.gate, config.watch, config.limits)
        self._numbers = itertools.count(first_number(config.peer.incarnation))
        self._admission = Admission(config.peer, config.fingerprint, config.transports, config.limits)

    # what givers say

    def on_offer(self, offer: Offer, now_s: float) -> list[Action]:
        """Grant, or refuse with the reason. A repetition is answered as before and holds nothing twice."""
        incoming, settled = self._book.of_offer(offer.offer), self._book.settled.get(offer.offer, now_s)
        if incoming is not None and incoming.closed is not None:
            self._book.say_abort(incoming, now_s)
        elif incoming is not None:
            self._book.send(offer.giver, incoming.grant)
        elif settled is not None:
            if not settled.adopted:
                self._book.send(offer.giver, self._book.abort_of(settled.grant, settled.reason))
        elif (refusal := self._admission.refusal(offer, now_s)) is not None:
            if refusal.reason in _OVER:
                self._config.stale[StaleReason.EPOCH] += 1
            self._book.send(offer.giver, refusal)
        else:
            self._supersede(offer, now_s)
            self._reserve(offer)
        return self._book.flush()

    def _supersede(self, offer: Offer, now_s: float) -> None:
        """Close grants of older epochs, and one that the same giver has given up by offering anew."""
        for incoming in open_grants(self._book):
            if incoming.grant.request_id != offer.passport.request_id:
                continue
            if incoming.grant.epoch < offer.passport.epoch:
                self._book.close(incoming, "a newer epoch was offered", writer_done=False, now_s=now_s)
            elif incoming.offer.giver == offer.giver and incoming.offer.offer < offer.offer:
                self._book.close(incoming, "offered anew", writer_done=True, now_s=now_s)

    def _reserve(self, offer: Offer) -> None:
        request_id, epoch = offer.passport.request_id, offer.passport.epoch
        name = self._admission.transport_for(offer)
        assert name is not None, "refused before"  # noqa: S101  # our own invariant
        if any(incoming.key == (request_id, epoch) for incoming in open_grants(self._book)):
            busy = self._admission.refuse(offer, RefuseReason.FULL, "another hand-off of this request is open here")
            self._book.send(offer.giver, busy)
            return
        reservation = self._config.bank.reserve(offer.passport, offer.page_hashes, offer.num_pages)
        if reservation is None:
            full = self._admission.refuse(offer, RefuseReason.FULL, f"no room for {offer.num_pages} pages")
            self._book.send(offer.giver, full)
            return
        grant = Grant(
            request_id=request_id,
            epoch=epoch,
            offer=offer.offer,
            generation=next(self._numbers),
            taker=self._config.peer,
            transport=name,
            num_held_pages=reservation.num_held_pages,
            page_ids=list(reservation.page_ids),
            pool=self._config.pool,
        )
        direct = isinstance(self._config.transports[name], DirectTransport)
        self._book.open(Incoming(offer, grant, reservation, direct))
        self._book.send(offer.giver, grant)

    def on_pages(self, pages: Pages, frames: Sequence[memoryview], now_s: float) -> list[Action]:
        """Carried pages: store those that come in turn. Repetitions are answered, gaps wait to be sent again."""
        incoming = self._book.of_generation(pages.generation)
        settled = self._book.settled_grant(pages.generation, now_s)
        if settled is not None and not settled.adopted:
            self._book.send(settled.giver, self._book.abort_of(settled.grant, settled.reason))
        if incoming is None or incoming.closed is not None:
            self._config.stale[StaleReason.GRANT] += 1
            return self._book.flush()
        if incoming.direct:
            return self._book.flush()
        end = pages.first + pages.count
        page_bytes = self._config.pool.page_bytes
        if len(frames) != pages.count or end > len(incoming.grant.page_ids):
            self._book.close(incoming, "pages out of bounds", writer_done=False, now_s=now_s)
        elif any(frame.nbytes != page_bytes for frame in frames):
            self._book.close(incoming, f"pages are not of {page_bytes} bytes", writer_done=False, now_s=now_s)
        elif pages.first == incoming.num_received:
            ticket = self._book.new_ticket()
            incoming.storing[ticket] = pages.first
            incoming.num_received = end
            self._book.emit(
                Store(
                    ticket, tuple(incoming.grant.page_ids[pages.first : end]), tuple(frames), incoming.grant.transport
                )
            )
        elif pages.first < incoming.num_received:
            self._say_taken(incoming)
        return self._book.flush()

    def on_stored(self, ticket: int, now_s: float) -> list[Action]:
        """The store of this ticket has returned. Must be called for every `Store`."""
        incoming = self._book.of_ticket(ticket)
        assert incoming is not None, "a store outlived its grant"  # noqa: S101  # our own invariant
        del incoming.storing[ticket]
        if incoming.closed is not None:
            self._book.writer_done(incoming, now_s)
        elif incoming.commit is None or not self._adopt_whole(incoming, incoming.commit, now_s):
            self._say_taken(incoming)
        return self._book.flush()

    def _say_taken(self, incoming: Incoming) -> None:
        request_id, epoch = incoming.key
        taken = PagesTaken(
            request_id=request_id,
            epoch=epoch,
            generation=incoming.grant.generation,
            count=incoming.num_stored,
        )
        self._book.send(incoming.offer.giver, taken)

    def on_commit(self, commit: Commit, now_s: float) -> list[Action]:
        """Adopt the sequence, once; anything but an open grant is refused."""
        request_id, epoch = commit.passport.request_id, commit.passport.epoch
        incoming = self._book.of_generation(commit.generation)
        settled = self._book.settled_grant(commit.generation, now_s)
        if settled is not None and settled.adopted:
            self._book.send(commit.giver, _ack(settled.grant))
        elif incoming is not None and incoming.closed is None and incoming.offer.giver == commit.giver:
            if problem := incoming.problem_with(commit, self._config.fingerprint.page_size):
                self._book.close(incoming, problem, writer_done=True, now_s=now_s)
                self._book.send(commit.giver, self._admission.refuse(commit, RefuseReason.STALE, problem))
            elif not self._adopt_whole(incoming, commit, now_s):
                incoming.commit = commit
        else:
            if incoming is not None and incoming.offer.giver == commit.giver:
                self._book.writer_done(incoming, now_s)
            cancelled = self._admission.is_cancelled(request_id, epoch, now_s)
            reason = RefuseReason.CANCELLED if cancelled else RefuseReason.STALE
            self._config.stale[StaleReason.EPOCH if cancelled else StaleReason.GRANT] += 1
            self._book.send(commit.giver, self._admission.refuse(commit, reason, "there is no such grant"))
        return self._book.flush()

    def _adopt_whole(self, incoming: Incoming, commit: Commit, now_s: float) -> bool:
        """Adopt and acknowledge, if all pages are here; else the giver sends again what was lost."""
        if not incoming.has_pages_of(commit, self._config.fingerprint.page_size):
            return False
        self._book.adopt(incoming, now_s)
        self._config.bank.adopt(incoming.reservation, commit.passport, commit.num_computed_tokens)
        self._book.send(commit.giver, _ack(incoming.grant))
        self._book.emit(Adopted(commit.passport, commit.num_computed_tokens, commit.giver, incoming.grant.transport))
        return True

    def on_abort(self, abort: Abort, now_s: float) -> list[Action]:
        """The giver is off, and says that no write is or will be in flight."""
        incoming = self._book.of_offer(abort.offer)
        if incoming is not None and incoming.offer.giver == abort.sender:
            if incoming.closed is None:
                self._book.close(incoming, abort.reason, writer_done=True, now_s=now_s)
            else:
                self._book.writer_done(incoming, now_s)
        return self._book.flush()

    def on_released(self, released: Released, now_s: float) -> list[Action]:
        """The giver's answer to our Abort: no write of the grant is or will be in flight."""
        incoming = self._book.of_generation(released.generation)
        if incoming is not None and incoming.closed is not None:
            self._book.writer_done(incoming, now_s)
        return self._book.flush()

    # what the service says

    def cancel(self, request_id: str, epoch: int, now_s: float) -> list[Action]:
        """The request is over up to and including `epoch`: close its grants, refuse what comes later. Idempotent."""
        self._admission.cancel(request_id, epoch, now_s)
        for incoming in open_grants(self._book):
            if incoming.grant.request_id == request_id and incoming.grant.epoch <= epoch:
                self._book.close(incoming, "cancelled", writer_done=False, now_s=now_s)
        return self._book.flush()

    def is_cancelled(self, request_id: str, epoch: int, now_s: float) -> bool:
        """Whether a Cancel of this epoch or a later one is remembered."""
        return self._admission.is_cancelled(request_id, epoch, now_s)

    def drain(self) -> None:
        """Refuse Offers from now on; open grants go on."""
        self._admission.drain()

    def close_all(self, reason: str, now_s: float) -> list[Action]:
        """This process stops taking: close every grant."""
        for incoming in open_grants(self._book):
            self._book.close(incoming, reason, writer_done=False, now_s=now_s)
        return self._book.flush()

    # liveness

    def peers(self) -> set[PeerRef]:
        """Givers with which a grant is open."""
        return {incoming.offer.giver for incoming in open_grants(self._book)}

    def listing(self, peer: PeerRef) -> list[OpenHandOff]:
        """What an Alive tells this peer."""
        return [
            OpenHandOff(*incoming.key, incoming.grant.generation)
            for incoming in open_grants(self._book)
            if incoming.offer.giver == peer
        ]

    def on_listing(self, peer: PeerRef, listed: Sequence[OpenHandOff], now_s: float) -> list[Action]:
        """What a giver believes open: a grant that it lists no longer for two beats is closed here too."""
        for incoming in open_grants(self._book):
            if incoming.offer.giver != peer:
                continue
            granted, offered = OpenHandOff(*incoming.key, incoming.grant.generation), OpenHandOff(*incoming.key, 0)
            incoming.misses = 0 if granted in listed or offered in listed else incoming.misses + 1
            if incoming.misses >= 2:
                self._book.close(incoming, "the giver has forgotten it", writer_done=False, now_s=now_s)
        return self._book.flush()

    def peer_lost(self, peer: PeerRef, reason: str, now_s: float) -> list[Action]:
        """Close all grants of a peer. Where it may still be writing, pages stay quarantined until it cannot."""
        for incoming in open_grants(self._book):
            if incoming.offer.giver == peer:
                self._book.close(incoming, reason, writer_done=False, now_s=now_s)
        return self._book.flush()

    def tick(self, now_s: float) -> list[Action]:
        """Free what a dead giver left in quarantine; ask living ones again; repeat what carried givers wait for."""
        for incoming in self._book:
            if incoming.closed is not None and incoming.direct and self._book.process_gone(incoming):
                self._book.writer_done(incoming, now_s)
            elif now_s - incoming.said_at_s >= self._limits.beat_s:
                incoming.said_at_s = now_s
                if incoming.closed is not None:
                    self._book.say_abort(incoming, now_s)
                elif not incoming.direct:
                    self._say_taken(incoming)
        return self._book.flush()

    @property
    def num_open(self) -> int:
        """Grants that wait for their Commit."""
        return len(open_grants(self._book))

    @property
    def num_quarantined(self) -> int:
        """Closed grants whose writer is not known to be done."""
        return len(list(self._book)) - self.num_open


def _ack(grant: Grant) -> Ack:
    return Ack(request_id=grant.request_id, epoch=grant.epoch, generation=grant.generation)
