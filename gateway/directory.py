"""The directory: which workers live, as this gateway itself hears them.

Redis only introduces: a worker found in the registry is greeted, and counts from its first heartbeat on the bus until
it is silent for the lease, its connection breaks, it says goodbye, or another incarnation takes its name. So routing
goes on when Redis is away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fleet.bus import Bus
from fleet.logs import get_logger
from fleet.messages import GatewayHello, Heartbeat, MetricFamily, RequestNote
from fleet.types import PeerRef, Role, WorkerRecord

_log = get_logger("directory")


@dataclass(eq=False, slots=True)
class Worker:
    """A live worker.

    Attributes:
        heard_s: monotonic time of its last heartbeat.
        booked_tokens: tokens that this gateway has sent its way and that are not done yet; booked when a worker is
            picked, since bursts race on polled figures.
        booked_requests: likewise.
        foreign_requests: that it runs for other gateways, as of its last heartbeat.
        refuses: it said that we have our share of it; until its next heartbeat.
        free_tokens: that its free pages hold: as of its last heartbeat, less what was booked since.
    """

    record: WorkerRecord
    heard_s: float
    metrics: list[MetricFamily] = field(default_factory=list)
    booked_tokens: int = 0
    booked_requests: int = 0
    foreign_requests: int = 0
    refuses: bool = False
    free_tokens: int = 0

    @property
    def peer(self) -> PeerRef:
        """Name, incarnation, address."""
        return self.record.peer

    @property
    def labels(self) -> dict[str, str]:
        """Its labels in the metrics."""
        return {"worker": self.record.peer.name, "role": self.record.role.value, "model": self.record.model}

    def serves(self, model: str) -> bool:
        """Whether it takes new requests for this served name."""
        return not self.record.draining and model == self.record.model

    @property
    def takes_more(self) -> bool:
        """Whether this gateway may send it more. A quarter of the bound is for what it has not let go of yet."""
        bound = self.record.max_requests_per_gateway
        return not self.refuses and (bound == 0 or self.booked_requests < bound * 0.75)

    def has_room(self, num_tokens: int) -> bool:
        """Whether a decode worker has a seat and, unless it is idle, pages for a sequence of so many tokens."""
        if not self.takes_more:
            return False
        num_here = self.booked_requests + self.foreign_requests
        return num_here == 0 or (num_here < self.record.max_num_seqs and self.free_tokens >= num_tokens)

    def hear(self, beat: Heartbeat) -> None:
        """Take over what a heartbeat says."""
        self.record = beat.record
        self.heard_s = time.monotonic()
        self.metrics = beat.metrics
        self.refuses = False
        load = beat.record.load
        self.foreign_requests = max(0, load.num_running - len(beat.requests))
        num_free = load.free_pages if load.total_pages else beat.record.num_pages
        self.free_tokens = num_free * beat.record.page_size


class Directory:
    """Live workers by name. Callbacks tell who came, who left, and what a heartbeat listed."""

    def __init__(self, *, bus: Bus, me: PeerRef, lease_s: float) -> None:
        self._bus = bus
        self._me = me
        self._lease_s = lease_s
        self._workers: dict[str, Worker] = {}  # by name
        self._introduced: dict[str, PeerRef] = {}
        self.on_joined: Callable[[Worker], None] = lambda _: None
        self.on_lost: Callable[[Worker, str], None] = lambda _worker, _reason: None
        self.on_left: Callable[[Worker], None] = lambda _: None
        self.on_notes: Callable[[Worker, list[RequestNote]], None] = lambda _worker, _notes: None
        bus.on_peer_lost(self._connection_lost)

    def workers(self, *, model: str | None = None, role: Role | None = None) -> list[Worker]:
        """Live workers, by name; with `model`, those that take new requests for it."""
        return [
            worker
            for worker in self._workers.values()
            if (role is None or worker.record.role is role) and (model is None or worker.serves(model))
        ]

    def get(self, peer: PeerRef | None) -> Worker | None:
        """The live worker of exactly this life."""
        if peer is None:
            return None
        worker = self._workers.get(peer.name)
        return worker if worker is not None and worker.peer.incarnation == peer.incarnation else None

    def introduce(self, records: Iterable[WorkerRecord]) -> None:
        """Greet every worker that the registry lists, and forget introductions it no longer lists."""
        listed = {record.peer.name: record.peer for record in records}
        for name, peer in self._introduced.items():
            if listed.get(name) != peer and self.get(peer) is None:
                self._bus.forget(peer.address)
        self._introduced = listed

    def greet(self) -> None:
        """Say hello to all known workers; each answers with heartbeats for as long as it hears it."""
        hello = GatewayHello(gateway=self._me)
        addresses = {peer.address for peer in self._introduced.values()}
        addresses.update(worker.peer.address for worker in self._workers.values())
        for address in addresses:
            self._bus.send(address, hello)

    def heartbeat(self, beat: Heartbeat) -> None:
        """A worker lives: refresh or admit it, then report the requests it holds for us."""
        peer = beat.record.peer
        known = self._workers.get(peer.name)
        if known is not None and known.peer.incarnation != peer.incarnation:
            self._drop(known, "replaced by a new incarnation")
            known = None
        is_new = known is None
        if known is None:
            known = Worker(record=beat.record, heard_s=time.monotonic())
            self._workers = dict(sorted({**self._workers, peer.name: known}.items()))
        known.hear(beat)
        if is_new:
            _log.info("worker joined", worker=peer.name, role=beat.record.role.value, model=beat.record.model)
            self.on_joined(known)
        self.on_notes(known, beat.requests)

    def goodbye(self, peer: PeerRef) -> None:
        """A worker left in order."""
        worker = self.get(peer)
        if worker is not None:
            self._remove(worker, "left")
            self.on_left(worker)

    def sweep(self) -> None:
        """Drop workers that were silent for the lease."""
        deadline = time.monotonic() - self._lease_s
        for worker in [w for w in self._workers.values() if w.heard_s < deadline]:
            self._drop(worker, f"silent for {self._lease_s:g} s")

    def _connection_lost(self, address: str) -> None:
        for worker in [w for w in self._workers.values() if w.peer.address == address]:
            self._drop(worker, "connection lost")

    def _drop(self, worker: Worker, reason: str) -> None:
        self._remove(worker, reason)
        self.on_lost(worker, reason)

    def _remove(self, worker: Worker, reason: str) -> None:
        del self._workers[worker.peer.name]
        self._bus.forget(worker.peer.address)
        _log.info("worker gone", worker=worker.peer.name, role=worker.record.role.value, reason=reason)
