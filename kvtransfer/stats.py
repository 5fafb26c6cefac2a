"""Counts of hand-offs per transport, for metrics. They only ever rise."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from enum import StrEnum


class StaleReason(StrEnum):
    """Why a message was too late to do anything.

    `epoch`: of a request that was cancelled or replayed since. `grant`: about a hand-off or a grant that is over.
    `incarnation`: a sign of life of a former life of its sender, or the answer to a former life of this process.
    """

    EPOCH = "epoch"
    GRANT = "grant"
    INCARNATION = "incarnation"


@dataclass(slots=True)
class TransportCount:
    """One direction over one transport.

    Attributes:
        hand_offs: that ended well.
        pages, bytes: that moved, those of failed hand-offs included.
        held_pages: that did not need to move.
        copy_s: time spent copying, on transfer threads (direct writes, stores) or in the bus (sends).
        hand_off_s: from Grant to Ack, summed; counted by givers.
    """

    hand_offs: int = 0
    pages: int = 0
    bytes: int = 0
    held_pages: int = 0
    copy_s: float = 0.0
    hand_off_s: float = 0.0


@dataclass(slots=True)
class TransferStats:
    """Of one endpoint. `given` and `taken` by transport, the others by reason; `stale` counts dropped messages."""

    given: defaultdict[str, TransportCount] = field(default_factory=lambda: defaultdict(TransportCount))
    taken: defaultdict[str, TransportCount] = field(default_factory=lambda: defaultdict(TransportCount))
    refusals_sent: Counter[str] = field(default_factory=Counter)
    refusals_heard: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    broken_writes: Counter[str] = field(default_factory=Counter)
    stale: Counter[StaleReason] = field(default_factory=Counter)
    lost_peers: int = 0
    dropped_sends: int = 0
