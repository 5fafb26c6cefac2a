"""Which sequences a decode worker gives to its peers, and to whom: counts alone, nothing is moved here.

Moving a sequence costs its client a step or two; giving it back for want of pages costs a prefill. So a worker moves
some when either holds (as Llumnix does, OSDI 2024):

- It is short of pages: fewer are free than half of what its sequences may want within their lookahead. It moves as
  many as leave the whole of that free.
- It is much fuller than the emptiest peer, by `gap`. It moves as many as bring it down to the mean of all, itself
  included: what several full workers have above the mean is what the empty ones lack, so they do not overfill one.

Both begin far from where they end. A move of the second kind leaves the taker no fuller than the giver; one of the
first is granted only where the taker has the lookahead of all its sequences free (`DecodeScheduler.reserve`). Hence
nothing comes straight back. Sequences with the most tokens to come go first: they would stay longest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fleet.types import PeerRef

MIN_TO_COME = 32
"""Tokens still to come below which evening out is not worth the pause; a shortage always is."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a worker holds, of what it can hold: sequences and pages."""

    num_seqs: int
    max_num_seqs: int
    num_used_pages: int
    num_pages: int

    @property
    def fullness(self) -> float:
        """The larger share, of seats or of pages; 1 is full."""
        return max(self.num_seqs / self.max_num_seqs, self.num_used_pages / self.num_pages)

    def plus(self, num_seqs: int, num_pages: int) -> Room:
        """With so many more."""
        return replace(self, num_seqs=self.num_seqs + num_seqs, num_used_pages=self.num_used_pages + num_pages)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sequence that may move.

    Attributes:
        index: the caller's name for it.
        num_pages: that it holds.
        num_wanted_pages: that it may want within the lookahead, beyond those.
        num_to_come: tokens that it may still say.
    """

    index: int
    num_pages: int
    num_wanted_pages: int
    num_to_come: int


def page_shortage(*, num_free: int, num_wanted: int) -> int:
    """Pages that ought to become free, 0 while at least half of the wanted ones are."""
    return num_wanted - num_free if 2 * num_free < num_wanted else 0


def choose(
    candidates: Iterable[Candidate],
    *,
    me: Room,
    peers: Mapping[PeerRef, Room],
    shortage: int,
    gap: float,
    limit: int,
) -> list[tuple[Candidate, PeerRef]]:
    """At most `limit` moves. `me` without what is on its way out, `peers` with what is on its way to them."""
    if not peers:
        return []
    rooms = dict(peers)
    mean = _mean([me, *rooms.values()])
    too_full = me.fullness - min(room.fullness for room in rooms.values()) >= gap
    chosen: list[tuple[Candidate, PeerRef]] = []
    for candidate in sorted(candidates, key=lambda one: -one.num_to_come):
        left = me.plus(-1, -candidate.num_pages)
        evens_out = too_full and left.fullness >= mean and candidate.num_to_come >= MIN_TO_COME
        if len(chosen) >= limit or not (shortage > 0 or evens_out):
            break
        peer = min(rooms, key=lambda one: (rooms[one].fullness, one.name))
        taken = rooms[peer].plus(1, candidate.num_pages + candidate.num_wanted_pages)
        if taken.fullness > (1.0 if shortage > 0 else left.fullness):
            continue  # a smaller one may fit
        chosen.append((candidate, peer))
        rooms[peer], me = taken, left
        shortage -= candidate.num_pages + candidate.num_wanted_pages
    return chosen


def _mean(rooms: Sequence[Room]) -> float:
    return sum(room.fullness for room in rooms) / len(rooms)
