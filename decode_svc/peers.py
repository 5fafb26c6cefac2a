"""Where this worker's sequences could go on: the other decode workers, as the registry last showed them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from decode_svc.balance import Room
from fleet.logs import get_logger
from fleet.redis_client import UNAVAILABLE
from fleet.registry import Registry
from fleet.types import PeerRef, WorkerRecord

_log = get_logger("peers")


@dataclass(frozen=True, slots=True)
class _Seen:
    record: WorkerRecord
    since_s: float


class Peers:
    """Reads the registry now and then, off the step path; while Redis is away the last list stands.

    Args:
        registry: of the fleet.
        me: this worker's record; only workers of its role, model and fingerprint are peers.
        lease_s: how often to look, and by its parts how often while the list is wanted and how long a newcomer has
            to be known: the gateways learn of it in the same way, and a sequence must not move to a stranger.
    """

    def __init__(
        self, registry: Registry, me: WorkerRecord, *, lease_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._registry = registry
        self._me = me
        self._lease_s = lease_s
        self._clock = clock
        self._seen: dict[PeerRef, _Seen] = {}
        self._picked: Counter[PeerRef] = Counter()
        self._picked_pages: Counter[PeerRef] = Counter()
        self._wanted = asyncio.Event()

    async def run(self) -> None:
        """Keep the list until cancelled; a task of the service's group."""
        away = False
        while True:
            try:
                self.learn(await self._registry.workers())
                away = False
            except UNAVAILABLE as error:
                if not away:
                    _log.warning("Redis is away, the last known peers stand", error=str(error), known=len(self._seen))
                away = True
            if self._wanted.is_set():
                await asyncio.sleep(self._lease_s / 6)
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._lease_s):
                        await self._wanted.wait()

    def want(self) -> None:
        """Look at once, and often from now on."""
        self._wanted.set()

    def learn(self, records: Iterable[WorkerRecord]) -> None:
        """Replace the list. Mutates: picks are forgotten, since the records' loads now show them."""
        now_s = self._clock()
        me = self._me
        self._picked.clear()
        self._picked_pages.clear()
        self._seen = {
            record.peer: _Seen(record, self._seen[record.peer].since_s if record.peer in self._seen else now_s)
            for record in records
            if (record.role, record.model, record.fingerprint) == (me.role, me.model, me.fingerprint)
            and record.peer.name != me.peer.name
            and not record.draining
        }

    def pick(self, turn: int) -> list[PeerRef]:
        """Peers to ask, least loaded first; later turns of one sequence begin further down the list.

        Mutates: the first one counts as busier until the registry is read again.
        """
        known = self._known()
        known.sort(key=lambda record: (self._num_seqs(record) / record.max_num_seqs, record.peer.name))
        if not known:
            return []
        first = turn % len(known)
        peers = [record.peer for record in known[first:] + known[:first]]
        self.book(peers[0], 0)
        return peers

    def rooms(self) -> dict[PeerRef, Room]:
        """What each peer holds, with what was booked on it since the registry was read."""
        return {
            record.peer: Room(
                num_seqs=self._num_seqs(record),
                max_num_seqs=record.max_num_seqs,
                num_used_pages=record.num_pages - record.load.free_pages + self._picked_pages[record.peer],
                num_pages=record.num_pages,
            )
            for record in self._known()
        }

    def book(self, peer: PeerRef, num_pages: int) -> None:
        """A sequence is offered to it. Mutates: it counts as so much fuller until the registry is read again."""
        self._picked[peer] += 1
        self._picked_pages[peer] += num_pages

    def _known(self) -> list[WorkerRecord]:
        settled_s = self._clock() - self._lease_s / 2
        return [seen.record for seen in self._seen.values() if seen.since_s <= settled_s]

    def _num_seqs(self, record: WorkerRecord) -> int:
        return record.load.num_running + record.load.num_waiting + self._picked[record.peer]
