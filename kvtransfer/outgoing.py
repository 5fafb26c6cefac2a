"""One hand-off as its giver sees it: the sequence, the pages ready so far, and the attempt with the current target."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from fleet.hand_off_messages import Abort, Commit, Grant, Offer, Released
from fleet.types import Passport
from kvtransfer.actions import HandOffFailed
from kvtransfer.targets import Target, TargetRounds


class GiverState(StrEnum):
    """See the diagram in `giver.py`."""

    WAITING = "waiting"
    OFFERED = "offered"
    WRITING = "writing"
    COMMITTED = "committed"
    CLOSING = "closing"


@dataclass(eq=False, slots=True)
class Attempt:
    """One Offer and what came of it. Page counts are of the whole sequence, held pages included.

    Attributes:
        offer: the message, repeated as it is while unanswered.
        said_at_s: when Offer or Commit was last sent, or a carried page last arrived.
        direct: the giver itself writes; else pages ride on the bus.
        num_handed: pages given to the transport.
        num_done: pages known to lie at the taker.
        ticket: of the write in flight.
        turn: when this attempt last sent pages; the smallest goes next.
        misses: Alives in a row that did not list this hand-off.
    """

    target: Target
    offer: Offer
    said_at_s: float
    grant: Grant | None = None
    granted_at_s: float = 0.0
    direct: bool = False
    num_handed: int = 0
    num_done: int = 0
    ticket: int | None = None
    turn: int = 0
    misses: int = 0
    commit: Commit | None = None
    farewell: Abort | Released | None = None

    @property
    def generation(self) -> int:
        """Of the grant; 0 before it."""
        return self.grant.generation if self.grant is not None else 0

    @property
    def num_granted(self) -> int:
        """Pages that the taker has or has room for."""
        return self.grant.num_held_pages + len(self.grant.page_ids) if self.grant is not None else 0

    def problem_with(self, num_pages: int) -> str | None:
        """Why the grant cannot be used; None if it can."""
        grant = self.grant
        if grant is None or grant.taker != self.target.peer:
            return "it has restarted"
        if grant.transport not in self.offer.transports:
            return f"it grants over {grant.transport}, which was not offered"
        outside = [page_id for page_id in grant.page_ids if not 0 <= page_id < grant.pool.num_pages]
        if outside or self.num_granted < num_pages:
            return f"it grants {self.num_granted} of {num_pages} pages, ids outside its pool: {outside}"
        return None


@dataclass(eq=False, slots=True)
class Outgoing:
    """A sequence on its way out.

    Attributes:
        page_ids: own pages whose bytes are final, in order.
        num_computed_tokens: set once the sequence stands still and may be committed.
        ending: how the hand-off ends once no write is in flight; None while it goes on.
        last_refusal: why the last target did not take it.
    """

    passport: Passport
    page_hashes: list[bytes]
    num_pages: int
    rounds: TargetRounds
    state: GiverState = GiverState.WAITING
    retry_at_s: float = 0.0
    page_ids: tuple[int, ...] = ()
    num_computed_tokens: int | None = None
    attempt: Attempt | None = None
    ending: HandOffFailed | None = None
    last_refusal: str = field(default="there is no target")

    @property
    def key(self) -> tuple[str, int]:
        """Request id and epoch."""
        return (self.passport.request_id, self.passport.epoch)

    def num_movable(self, page_size: int) -> int:
        """Pages of the sequence that may be handed to the transport now, or lie at the taker already."""
        attempt = self.attempt
        if attempt is None or attempt.grant is None:
            return 0
        ready = len(self.page_ids)
        if self.num_computed_tokens is not None:
            ready = min(ready, -(-self.num_computed_tokens // page_size))
        return max(attempt.grant.num_held_pages, min(ready, attempt.num_granted))

    def may_commit(self, page_size: int) -> bool:
        """Whether the sequence stands still and its pages are written, or sent on the way that the Commit takes."""
        attempt = self.attempt
        if attempt is None or self.num_computed_tokens is None:
            return False
        return (attempt.num_done if attempt.direct else attempt.num_handed) >= self.num_movable(page_size)
