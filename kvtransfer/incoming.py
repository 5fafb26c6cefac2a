"""One grant as its taker sees it, and the book of all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import msgspec

from fleet.hand_off_messages import Abort, Commit, Grant, HandOffMessage, Offer
from fleet.types import PeerRef
from kvtransfer.actions import Action, GrantClosed, Send
from kvtransfer.bank import PageBank, Reservation, WriteGate
from kvtransfer.host import ProcessIdentity, ProcessWatch
from kvtransfer.limits import HandOffLimits
from kvtransfer.remembered import Remembered


@dataclass(eq=False, slots=True)
class Incoming:
    """Pages set aside for a sequence on its way in, until it is adopted or the writer is known to be done.

    Attributes:
        direct: the giver writes these pages itself; else frames come and are stored here.
        closed: given up; it stays here only until no write can be in flight.
        num_received: carried pages that came, in order; `Grant.page_ids` index of the next one.
        storing: first page of each store in flight, by ticket.
        commit: came while pages before it were being stored, or had been lost; None before.
        misses: Alives in a row that did not list this grant.
        said_at_s: when Abort was last sent.
    """

    offer: Offer
    grant: Grant
    reservation: Reservation
    direct: bool
    closed: str | None = None
    num_received: int = 0
    storing: dict[int, int] = field(default_factory=dict)
    commit: Commit | None = None
    misses: int = 0
    said_at_s: float = 0.0

    @property
    def key(self) -> tuple[str, int]:
        """Request id and epoch."""
        return (self.grant.request_id, self.grant.epoch)

    @property
    def num_stored(self) -> int:
        """Carried pages that lie in the pool, in order."""
        return min(self.storing.values(), default=self.num_received)

    @property
    def process(self) -> ProcessIdentity:
        """Of the giver."""
        return ProcessIdentity(self.offer.pid, self.offer.start_ticks)

    def problem_with(self, commit: Commit, page_size: int) -> str | None:
        """Why a Commit of this grant can never be adopted; None if it can, now or once its pages are here."""
        num_pages = -(-commit.num_computed_tokens // page_size)
        num_granted = self.grant.num_held_pages + len(self.grant.page_ids)
        if (commit.passport.request_id, commit.passport.epoch) != self.key:
            return "the Commit is of another request than its grant"
        if num_pages > num_granted or commit.num_computed_tokens > len(commit.passport.token_ids):
            return f"{commit.num_computed_tokens} tokens computed, but {num_granted} pages were granted"
        return None

    def has_pages_of(self, commit: Commit, page_size: int) -> bool:
        """Whether all that was computed lies in the pool. A direct giver has written it before it commits."""
        num_here = self.grant.num_held_pages + self.num_stored
        return self.direct or (not self.storing and num_here * page_size >= commit.num_computed_tokens)


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of an offer: `adopted`, or closed for `reason`. The grant's page ids are left out."""

    giver: PeerRef
    grant: Grant
    adopted: bool
    reason: str = ""


class IncomingBook:
    """Grants of a taker, open and quarantined, and the actions that piled up for its owner. Used by `Taker` alone."""

    def __init__(
        self, peer: PeerRef, bank: PageBank, gate: WriteGate, watch: ProcessWatch, limits: HandOffLimits
    ) -> None:
        self._peer = peer
        self._bank = bank
        self._gate = gate
        self._watch = watch
        self._grants: dict[int, Incoming] = {}
        self._tickets = itertools.count(1)
        self._actions: list[Action] = []
        memory_s, max_entries = limits.memory_s, limits.memory_entries
        self.settled: Remembered[int, Settled] = Remembered(memory_s=memory_s, max_entries=max_entries)
        self._offers_of: Remembered[int, int] = Remembered(memory_s=memory_s, max_entries=max_entries)

    def __iter__(self) -> Iterator[Incoming]:
        return iter(list(self._grants.values()))

    def emit(self, action: Action) -> None:
        """Queue an action."""
        self._actions.append(action)

    def send(self, to: PeerRef, message: HandOffMessage) -> None:
        """Queue a message."""
        self._actions.append(Send(to, message))

    def flush(self) -> list[Action]:
        """Hand the queued actions out."""
        actions, self._actions = self._actions, []
        return actions

    def new_ticket(self) -> int:
        """For a Store."""
        return next(self._tickets)

    def of_offer(self, offer: int) -> Incoming | None:
        """The grant that answers this offer, open or quarantined."""
        return self._find(lambda incoming: incoming.offer.offer == offer)

    def of_generation(self, generation: int) -> Incoming | None:
        """The grant of this number, open or quarantined."""
        return self._grants.get(generation)

    def of_ticket(self, ticket: int) -> Incoming | None:
        """The grant for which this store runs."""
        return self._find(lambda incoming: ticket in incoming.storing)

    def _find(self, fits: Callable[[Incoming], bool]) -> Incoming | None:
        return next((incoming for incoming in self._grants.values() if fits(incoming)), None)

    def settled_grant(self, generation: int, now_s: float) -> Settled | None:
        """What became of a grant that is in the book no longer; None once forgotten."""
        offer = self._offers_of.get(generation, now_s)
        return self.settled.get(offer, now_s) if offer is not None else None

    def open(self, incoming: Incoming) -> None:
        """Note a new grant, and let its giver write if it does so itself. Mutates: the write gate."""
        if incoming.direct:
            self._gate.open_pages(incoming.reservation.page_ids, incoming.grant.generation)
        self._grants[incoming.grant.generation] = incoming

    def adopt(self, incoming: Incoming, now_s: float) -> None:
        """The grant has become a sequence: its writer is done. Mutates: the write gate; the caller tells the bank."""
        self._leave(incoming, adopted=True, now_s=now_s)

    def close(self, incoming: Incoming, reason: str, *, writer_done: bool, now_s: float) -> None:
        """Give a grant up. Its pages are free at once if nobody can be writing them, else quarantined until so.

        `writer_done` says that the giver writes no more; stores of our own are counted besides. Tells the giver
        unless it said so itself. Mutates: the bank, the write gate.
        """
        incoming.closed = reason
        if incoming.direct:
            self._gate.close_pages(incoming.reservation.page_ids)
        done = not incoming.storing and (writer_done or not incoming.direct or self.process_gone(incoming))
        self._bank.cancel(incoming.reservation, writer_done=done)
        if not writer_done:
            self.say_abort(incoming, now_s)
        giver = incoming.offer.giver
        self.emit(GrantClosed(*incoming.key, giver=giver, reason=reason, quarantined=not done))
        if done:
            self._leave(incoming, adopted=False, now_s=now_s)

    def writer_done(self, incoming: Incoming, now_s: float) -> None:
        """The writer of a closed grant let go: free its pages, once our own stores have ended. Mutates: the bank."""
        if not incoming.storing:
            self._bank.writer_gone(incoming.reservation.generation)
            self._leave(incoming, adopted=False, now_s=now_s)

    def process_gone(self, incoming: Incoming) -> bool:
        """Whether the giver's process is known to be dead. Only asked of direct grants, so it ran on this host."""
        return self._watch.is_gone(incoming.process)

    def say_abort(self, incoming: Incoming, now_s: float) -> None:
        """Tell the giver that the grant is closed, and ask it to answer once no write is in flight."""
        incoming.said_at_s = now_s
        self.send(incoming.offer.giver, self.abort_of(incoming.grant, incoming.closed or ""))

    def abort_of(self, grant: Grant, reason: str) -> Abort:
        """The Abort for a grant."""
        return Abort(
            sender=self._peer,
            request_id=grant.request_id,
            epoch=grant.epoch,
            offer=grant.offer,
            generation=grant.generation,
            reason=reason,
        )

    def _leave(self, incoming: Incoming, *, adopted: bool, now_s: float) -> None:
        if incoming.direct:
            self._gate.close_pages(incoming.reservation.page_ids)
        del self._grants[incoming.grant.generation]
        self._offers_of.put(incoming.grant.generation, incoming.offer.offer, now_s)
        grant = msgspec.structs.replace(incoming.grant, page_ids=[])
        settled = Settled(incoming.offer.giver, grant, adopted, incoming.closed or "")
        self.settled.put(incoming.offer.offer, settled, now_s)


def open_grants(book: Iterable[Incoming]) -> list[Incoming]:
    """Those that are not closed."""
    return [incoming for incoming in book if incoming.closed is None]
