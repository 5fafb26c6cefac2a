"""What giver and taker say to each other while a sequence moves (DESIGN section 2).

`generation` numbers a grant on its taker; a write or Commit with another one is refused.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

from fleet.bus_message import BusMessage, Index
from fleet.types import Epoch, Fingerprint, Passport, PeerRef


class RefuseReason(StrEnum):
    """Why an Offer or Commit is refused."""

    FULL = "full"
    LAYOUT = "layout"
    DRAINING = "draining"
    CANCELLED = "cancelled"
    STALE = "stale"
    TRANSPORT = "transport"


class PoolRef(msgspec.Struct, frozen=True, kw_only=True):
    """Where a taker's pages lie, for transports that write straight into them.

    Attributes:
        name: of the shared-memory object (begins with `baton`); empty where there is none.
        num_pages, page_bytes: its size; page `i` starts at `i * page_bytes`.
    """

    name: str
    num_pages: int
    page_bytes: int


class Offer(BusMessage, frozen=True, kw_only=True):
    """Giver to taker: will you take this sequence?

    Attributes:
        offer: numbers this Offer on its giver and, holding bits of the giver's incarnation, in the fleet; answers
            echo it. The same number again is a repetition; a giver sends a higher number for the same request only
            once no write of the former is or will be in flight.
        page_hashes: names of the full pages of `passport.token_ids`, in order.
        num_pages: pages that the sequence will have at Commit, a last partial one included.
        transports: what the giver can write over to this taker, best first.
        host, pid, start_ticks: of the giver's process; `start_ticks` is its start time since boot (proc(5)), so that
            the taker can see on the same host whether that very process still lives.
    """

    offer: Index
    giver: PeerRef
    passport: Passport
    fingerprint: Fingerprint
    page_hashes: list[bytes]
    num_pages: int
    transports: tuple[str, ...]
    host: str
    pid: int
    start_ticks: int = 0


class Grant(BusMessage, frozen=True, kw_only=True):
    """Taker to giver: yes. Write pages `num_held_pages`, … of the sequence to `page_ids`, in order.

    The first `num_held_pages` pages lie in the taker's prefix cache already. `generation` holds bits of the taker's
    incarnation, so that no grant of an earlier process life can be mistaken for this one.
    """

    request_id: str
    epoch: Epoch
    offer: Index
    generation: int
    taker: PeerRef
    transport: str
    num_held_pages: Index
    page_ids: list[int]
    pool: PoolRef


class Refuse(BusMessage, frozen=True, kw_only=True):
    """Taker to giver: no. `message` explains it to a person; `retry_after_ms` is a hint when full.

    Answers an Offer (then `generation` is 0) or a Commit (then `offer` is 0).
    """

    request_id: str
    epoch: Epoch
    offer: Index = 0
    reason: RefuseReason
    message: str
    taker: PeerRef
    retry_after_ms: int = 0
    generation: int = 0


class Pages(BusMessage, frozen=True, kw_only=True):
    """Giver to taker: pages `first` to `first + count` of the grant ride along, one payload frame each.

    `first` indexes `Grant.page_ids`. Transports that write straight into the taker's memory send none: Commit alone
    says that all is written.
    """

    request_id: str
    epoch: Epoch
    generation: int
    first: Index
    count: Annotated[int, msgspec.Meta(ge=1)]


class PagesTaken(BusMessage, frozen=True, kw_only=True):
    """Taker to giver: pages up to `count` of the grant have arrived; the giver's window moves."""

    request_id: str
    epoch: Epoch
    generation: int
    count: Index


class Commit(BusMessage, frozen=True, kw_only=True):
    """Giver to taker: all pages are there; the sequence is yours. The giver is silent from here on."""

    giver: PeerRef
    passport: Passport
    generation: int
    num_computed_tokens: Index


class Ack(BusMessage, frozen=True, kw_only=True):
    """Taker to giver: adopted."""

    request_id: str
    epoch: Epoch
    generation: int


class Abort(BusMessage, frozen=True, kw_only=True):
    """Either side: this hand-off is off. From a giver it also says that no write of it is or will be in flight.

    `generation` is 0 where the giver never saw a Grant for `offer`.
    """

    sender: PeerRef
    request_id: str
    epoch: Epoch
    offer: Index
    generation: int
    reason: str


class Released(BusMessage, frozen=True, kw_only=True):
    """Giver to taker, after the taker's Abort: no write of this grant is or will be in flight."""

    request_id: str
    epoch: Epoch
    generation: int


class OpenHandOff(msgspec.Struct, frozen=True, array_like=True):
    """One hand-off that the sender of an Alive believes open."""

    request_id: str
    epoch: int
    generation: int


class Alive(BusMessage, frozen=True, kw_only=True):
    """Giver and taker to each other while they share hand-offs: I live, and these I believe open.

    `beat` rises with every Alive of this sender, so that a late one is known for what it is. An Offer without a Grant
    is listed with generation 0. What one side lists no longer for two beats, the other closes; silence beyond the
    liveness deadline closes all.
    """

    sender: PeerRef
    beat: Index
    hand_offs: list[OpenHandOff]


HandOffMessage = Offer | Grant | Refuse | Pages | PagesTaken | Commit | Ack | Abort | Released | Alive
