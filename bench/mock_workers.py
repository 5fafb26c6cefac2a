"""Workers without a model, for measuring everything around it: they speak the protocol and make tokens up.

A made-up prefill worker answers a PrefillRequest with the first token and gives the request to the first of its targets
among `decoders`, which live in the same process. Those send one token per request at a fixed interval, all requests'
tokens of one beat in one Publication, as a real step does.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fleet import model_files
from fleet.bus import Bus, BusConfig, Delivery
from fleet.lifecycle import new_peer
from fleet.messages import (
    Cancel,
    GatewayHello,
    HandedOff,
    HandingOff,
    MetricFamily,
    PrefillRequest,
    RequestFinished,
    RequestNote,
    TokenChunk,
)
from fleet.model_files import ModelFiles
from fleet.redis_client import connect
from fleet.registry import Registry
from fleet.types import Fingerprint, FinishReason, Passport, PeerRef, Role, WorkerRecord
from fleet.worker_link import WorkerLink

FINGERPRINT = Fingerprint("mock", "float32", 1, 1, 8, 16, "page-major-1", 1)
MODEL = "mock"


@dataclass
class Running:
    """A request that a mock decodes."""

    passport: Passport
    index: int = 1
    due_s: float = 0.0


@dataclass
class MockWorker:
    """One mock. `on_received` and `on_sent` tell a bench when a request came and a token left (monotonic seconds)."""

    redis_url: str
    namespace: str
    model_dir: Path
    role: Role
    interval_s: float = 0.01
    token_id: int = 100
    on_received: Callable[[str, float], None] = lambda _request, _at: None
    on_sent: Callable[[str, int, float], None] = lambda _request, _index, _at: None
    running: dict[str, Running] = field(default_factory=dict)
    link: WorkerLink = field(init=False)
    peer: PeerRef = field(init=False)
    decoders: list[MockWorker] = field(default_factory=list)

    def record(self) -> WorkerRecord:
        """As any worker's."""
        return WorkerRecord(
            peer=self.peer,
            role=self.role,
            model=MODEL,
            fingerprint=FINGERPRINT,
            model_files=self.published[0],
            max_model_len=4096,
            max_num_seqs=4096,
            page_size=16,
            num_pages=100_000,
            host="mock",
            pid=os.getpid(),
            transports=("tcp",),
            started_at_s=time.time(),
        )

    def notes(self) -> list[tuple[PeerRef, RequestNote]]:
        """What it holds."""
        return [
            (run.passport.gateway, RequestNote(request_id, run.passport.epoch, run.index))
            for request_id, run in self.running.items()
        ]

    def metrics(self) -> list[MetricFamily]:
        """None."""
        return []

    def gateway_lost(self, gateway: PeerRef) -> None:
        """Forget its requests."""
        self.running = {k: run for k, run in self.running.items() if run.passport.gateway != gateway}

    async def run(self) -> None:
        """Serve until cancelled."""
        files = model_files.read(self.model_dir)
        self.published = (model_files.digest_of(files), files)
        redis = connect(self.redis_url)
        async with Bus(BusConfig()) as bus, asyncio.TaskGroup() as group:
            self.peer = new_peer(name="", kind=f"mock-{self.role}", address=bus.address)
            self.link = WorkerLink(
                peer=self.peer,
                holder=self,
                bus=bus,
                registry=Registry(redis, namespace=self.namespace, lease_s=3),
                files=ModelFiles(redis, namespace=self.namespace),
                published=self.published,
                lease_s=3,
                liveness_file="",
            )
            await self.link.announce()
            for part in (self._listen(bus), bus.watch_peers(), self.link.run(), self.link.beat(), self._decode()):
                group.create_task(part)

    async def _listen(self, bus: Bus) -> None:
        async for delivery in bus.receive():
            self._handle(delivery)
            self.link.flush()

    def _handle(self, delivery: Delivery) -> None:
        match delivery.message:
            case GatewayHello() as hello:
                self.link.hear_hello(hello)
            case Cancel(request_id=request_id):
                self.running.pop(request_id, None)
                for worker in self.decoders:
                    worker.running.pop(request_id, None)
            case PrefillRequest(passport=passport, targets=targets):
                self.on_received(passport.request_id, time.monotonic())
                self._first_token(passport, targets)
            case _:
                pass

    def _first_token(self, passport: Passport, targets: list[PeerRef]) -> None:
        request_id, epoch, gateway = passport.request_id, passport.epoch, passport.gateway
        self.on_sent(request_id, 0, time.monotonic())
        self.link.publish(gateway, TokenChunk(request_id=request_id, epoch=epoch, index=0, token_ids=[self.token_id]))
        if passport.params.max_tokens == 1:
            self._finish(self.link, passport, 1)
            return
        taker = next(worker for worker in self.decoders if worker.peer == targets[0])
        self.link.publish(gateway, HandingOff(request_id=request_id, epoch=epoch, taker=taker.peer, transport="mock"))
        taker.link.publish(gateway, HandedOff(request_id=request_id, epoch=epoch))
        taker.running[request_id] = Running(passport, due_s=time.monotonic() + self.interval_s)

    def _finish(self, link: WorkerLink, passport: Passport, count: int) -> None:
        finished = RequestFinished(
            request_id=passport.request_id,
            epoch=passport.epoch,
            reason=FinishReason.LENGTH,
            num_output_tokens=count,
        )
        link.publish(passport.gateway, finished)

    async def _decode(self) -> None:
        next_s = time.monotonic()
        while True:
            next_s = max(next_s + self.interval_s, time.monotonic())
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))
            for request_id, run in list(self.running.items()):
                self.on_sent(request_id, run.index, time.monotonic())
                chunk = TokenChunk(
                    request_id=request_id, epoch=run.passport.epoch, index=run.index, token_ids=[self.token_id]
                )
                self.link.publish(run.passport.gateway, chunk)
                run.index += 1
                if run.index >= run.passport.params.max_tokens:
                    self._finish(self.link, run.passport, run.index)
                    del self.running[request_id]
            if hasattr(self, "link"):
                self.link.flush()
