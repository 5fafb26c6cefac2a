"""What the hand-off machines ask of their owner. They themselves send nothing, copy nothing and read no clock.

Work to do: `Send`, `Write`, `Store`. News for the service: the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from fleet.hand_off_messages import Grant, HandOffMessage, RefuseReason
from fleet.types import Passport, PeerRef


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message; `page_ids` of the own pool ride along over a carried transport, one payload frame each."""

    to: PeerRef
    message: HandOffMessage
    page_ids: tuple[int, ...] = ()
    transport: str = ""


@dataclass(frozen=True, slots=True)
class Write:
    """Giver: write own pages to pages `first`, … of the grant on a transfer thread, then call `on_written(ticket)`."""

    ticket: int
    grant: Grant
    first: int
    page_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Store:
    """Taker: copy frames into own pages on a transfer thread, then call `on_stored(ticket)`."""

    ticket: int
    page_ids: tuple[int, ...]
    frames: tuple[memoryview, ...]
    transport: str


@dataclass(frozen=True, slots=True)
class Granted:
    """Giver: a taker has room. `num_held_pages` need not move."""

    request_id: str
    epoch: int
    taker: PeerRef
    transport: str
    num_held_pages: int


@dataclass(frozen=True, slots=True)
class Committing:
    """Giver: the Commit goes out right after this; from now on the giver is silent about the request."""

    request_id: str
    epoch: int
    taker: PeerRef
    transport: str


@dataclass(frozen=True, slots=True)
class Given:
    """Giver: the taker has adopted the sequence. `hand_off_s` runs from the Grant to the Ack."""

    request_id: str
    epoch: int
    taker: PeerRef
    transport: str
    num_moved_pages: int
    num_held_pages: int
    hand_off_s: float


@dataclass(frozen=True, slots=True)
class TargetRefused:
    """Giver: this target will never take this sequence (layout, transport, draining, lost); others are tried."""

    request_id: str
    epoch: int
    taker: PeerRef
    reason: RefuseReason | None
    message: str


class FailReason(StrEnum):
    """Why a hand-off ended without an Ack."""

    CANCELLED = "cancelled"  # somebody's Cancel: the request is over
    STALE = "stale"  # a newer epoch exists: the request lives elsewhere
    REFUSED = "refused"  # every target refused for good, or is lost
    UNCERTAIN = "uncertain"  # committed, but no Ack: only a replay by the gateway may go on


@dataclass(frozen=True, slots=True)
class HandOffFailed:
    """Giver: the hand-off is over and nobody has adopted the sequence, as far as the giver can know."""

    request_id: str
    epoch: int
    reason: FailReason
    message: str


@dataclass(frozen=True, slots=True)
class ReleasePages:
    """Giver: nothing reads the sequence's pages for this hand-off any more. Exactly once per `start`, at its end."""

    request_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Adopted:
    """Taker: the bank has adopted the sequence; it is ours alone now."""

    passport: Passport
    num_computed_tokens: int
    giver: PeerRef
    transport: str


@dataclass(frozen=True, slots=True)
class GrantClosed:
    """Taker: a granted sequence will not come. `quarantined`: its pages wait until the giver is known to be done."""

    request_id: str
    epoch: int
    giver: PeerRef
    reason: str
    quarantined: bool


@dataclass(frozen=True, slots=True)
class PeerLost:
    """A peer was silent beyond the deadline, broke its connection, or restarted: hand-offs with it are closed."""

    peer: PeerRef
    reason: str


Action = (
    Send
    | Write
    | Store
    | Granted
    | Committing
    | Given
    | TargetRefused
    | HandOffFailed
    | ReleasePages
    | Adopted
    | GrantClosed
    | PeerLost
)
