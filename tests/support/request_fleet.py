"""A gateway's request table with a fleet around it that the test plays."""

from __future__ import annotations

from typing import cast

from prometheus_client import CollectorRegistry

from fleet.bus import Bus
from fleet.messages import HandingOff, Heartbeat, MoveReason, PrefillRequest, Publication, TokenChunk
from fleet.request_state import Transition
from fleet.types import Fingerprint, Passport, PeerRef, Role, SamplingParams, WorkerRecord
from gateway.admission import Admission
from gateway.directory import Directory
from gateway.live import LiveRequest
from gateway.metrics import GatewayMetrics
from gateway.requests import RequestTable
from gateway.router import Router
from gateway.waiting_room import WaitingRoom
from support.fake_bus import FakeBus
from support.records import make_record

GATEWAY = PeerRef("g", 1, "tcp://g")


def record(
    name: str,
    role: Role,
    *,
    incarnation: int = 1,
    model: str = "m",
    layers: int = 1,
    seats: int = 64,
    max_per_gateway: int = 0,
) -> WorkerRecord:
    return make_record(
        PeerRef(name, incarnation, f"tcp://{name}.{incarnation}"),
        role,
        model=model,
        fingerprint=Fingerprint("f", "float32", layers, 1, 8, 16, "page-major-1", 1),
        max_num_seqs=seats,
        max_requests_per_gateway=max_per_gateway,
    )


class Fleet:
    """A gateway's table with a made-up fleet around it."""

    def __init__(self, *, max_queued: int = 100, max_wait_s: float = 0.0, worker_wait_s: float = 10.0) -> None:
        self.bus = FakeBus()
        self.states: list[Transition] = []
        bus = cast("Bus", self.bus)
        self.directory = Directory(bus=bus, me=GATEWAY, lease_s=1.0)
        self.metrics = GatewayMetrics(CollectorRegistry())
        self.table = RequestTable(
            bus=bus,
            directory=self.directory,
            router=Router(self.directory, seed=0),
            metrics=self.metrics,
            record=self.states.append,
            admission=Admission(WaitingRoom(worker_wait_s), max_queued=max_queued, max_wait_s=max_wait_s),
            worker_wait_s=worker_wait_s,
            settle_s=0.0,
        )

    def join(self, name: str, role: Role, **kwargs: object) -> PeerRef:
        joined = record(name, role, **kwargs)  # type: ignore[arg-type]
        self.directory.heartbeat(Heartbeat(record=joined, requests=[]))
        return joined.peer

    def admit(self, request_id: str = "r", **fields: object) -> LiveRequest:
        return self.table.admit(self.passport(request_id, **fields))  # type: ignore[arg-type]

    def passport(self, request_id: str = "r", *, priority: int = 0, **params: object) -> Passport:
        return Passport(
            request_id=request_id,
            epoch=0,
            model="m",
            token_ids=[1, 2, 3],
            prompt_len=3,
            params=SamplingParams(**{"max_tokens": 10, **params}),  # type: ignore[arg-type]
            gateway=GATEWAY,
            priority=priority,
        )

    def dispatched(self) -> list[PrefillRequest]:
        return [cast("PrefillRequest", message) for _, message in self.bus.take(PrefillRequest)]

    def counted(self, name: str, **labels: str) -> float:
        """A metric's sample; 0 where there is none yet."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def say(self, worker: PeerRef, *events: object) -> None:
        self.table.hear(Publication(worker=worker, events=list(events)))  # type: ignore[arg-type]


def tokens(index: int, *ids: int, epoch: int = 0, request_id: str = "r") -> TokenChunk:
    return TokenChunk(request_id=request_id, epoch=epoch, index=index, token_ids=list(ids))


def handing(taker: PeerRef, epoch: int = 0, reason: MoveReason = MoveReason.PREFILLED) -> HandingOff:
    return HandingOff(request_id="r", epoch=epoch, taker=taker, transport="shm", reason=reason)
