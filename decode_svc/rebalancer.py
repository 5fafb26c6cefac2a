"""Moves sequences to emptier decode workers while this one goes on, by the policy in `decode_svc.balance`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from decode_svc.balance import Candidate, Room, choose, page_shortage
from decode_svc.mover import MAX_MOVING, Mover
from decode_svc.peers import Peers
from engine.decode_scheduler import DecodeScheduler
from engine.pages import PagePool
from engine.sequence import Phase, Sequence
from fleet.logs import get_logger
from fleet.messages import MoveReason

LOOK_S = 0.25
"""How often a worker compares itself with its peers; far less than it takes to decode half the lookahead."""
MIN_STAY_S = 10.0
"""A sequence that came in the midst of its output, moved or replayed, is not moved again for so long."""
RETRY_S = 2.0
"""One that no peer took is not offered again for so long."""

_log = get_logger("rebalancer")


class Rebalancer:
    """Looks now and then, on the event loop's thread; the mover does the rest.

    Args:
        gap: how much fuller than the emptiest peer this worker must be, as a share of its seats or pages.
        max_num_seqs: seats.
    """

    def __init__(
        self,
        *,
        scheduler: DecodeScheduler,
        pool: PagePool,
        mover: Mover,
        peers: Peers,
        max_num_seqs: int,
        gap: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._pool = pool
        self._mover = mover
        self._peers = peers
        self._max_num_seqs = max_num_seqs
        self._gap = gap
        self._clock = clock
        self._rests_until_s: dict[Sequence, float] = {}
        self._stopped = False

    async def run(self) -> None:
        """Look until cancelled or stopped; a task of the service's group."""
        while not self._stopped:
            self.look()
            await asyncio.sleep(LOOK_S)

    def stop(self) -> None:
        """The worker drains: from now on everything moves, and the mover is the drain's."""
        self._stopped = True

    def look(self) -> None:
        """Offer what should move now. Mutates: peers count what is on its way to them."""
        if self._stopped:
            return
        self._mover.call_off()
        now_s = self._clock()
        self._rests_until_s = {
            sequence: self._rests_until_s.get(sequence, now_s + (MIN_STAY_S if _came_amid_output(sequence) else 0.0))
            for sequence in self._scheduler.sequences()
        }
        staying = [s for s in self._scheduler.sequences() if not self._mover.is_moving(s)]
        num_leaving_pages = sum(len(s.page_table) for s in self._rests_until_s) - sum(
            len(s.page_table) for s in staying
        )
        num_wanted = self._scheduler.num_wanted_pages(staying)
        chosen = choose(
            (self._candidate(i, s) for i, s in enumerate(staying) if self._may_move(s, now_s)),
            me=Room(
                num_seqs=len(staying) + self._scheduler.num_reserved,
                max_num_seqs=self._max_num_seqs,
                num_used_pages=self._pool.num_pages - self._pool.num_free - num_leaving_pages,
                num_pages=self._pool.num_pages,
            ),
            peers=self._peers.rooms(),
            shortage=page_shortage(num_free=self._pool.num_free + num_leaving_pages, num_wanted=num_wanted),
            gap=self._gap,
            limit=MAX_MOVING - self._mover.num_moving,
        )
        for candidate, peer in chosen:
            sequence = staying[candidate.index]
            self._rests_until_s[sequence] = now_s + RETRY_S
            self._peers.book(peer, candidate.num_pages + candidate.num_wanted_pages)
            _log.debug("sequence should move", request_id=sequence.request_id, taker=peer.name)
            self._mover.offer(sequence, [peer], MoveReason.REBALANCE)

    def _may_move(self, sequence: Sequence, now_s: float) -> bool:
        return sequence.phase is Phase.RUNNING and self._rests_until_s[sequence] <= now_s

    def _candidate(self, index: int, sequence: Sequence) -> Candidate:
        return Candidate(
            index=index,
            num_pages=len(sequence.page_table),
            num_wanted_pages=self._scheduler.num_wanted_pages([sequence]),
            num_to_come=self._mover.num_to_come(sequence),
        )


def _came_amid_output(sequence: Sequence) -> bool:
    """Whether it had said more than a prefill's one token when it came."""
    return sequence.passport.next_index > 1
