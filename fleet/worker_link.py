"""A worker's link to the fleet: its lease in Redis, its heartbeats to gateways, and what its steps have to say.

Gateways introduce themselves with a hello on the bus and repeat it; a worker answers each with heartbeats for as long
as it hears it. One that falls silent for the lease is gone, and its requests with it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from fleet.bus import Bus
from fleet.errors import NameTaken
from fleet.logs import get_logger
from fleet.messages import (
    Event,
    GatewayHello,
    Goodbye,
    Heartbeat,
    MetricFamily,
    Publication,
    RequestNote,
)
from fleet.model_files import ModelFiles
from fleet.redis_client import UNAVAILABLE, Redis
from fleet.registry import Registry
from fleet.settings import FleetSettings
from fleet.types import PeerRef, WorkerRecord

FILES_EVERY_BEATS = 20

_log = get_logger("worker_link")


class Holder(Protocol):
    """The worker, as its link needs to know it."""

    def record(self) -> WorkerRecord:
        """Its registry record with current load."""
        ...

    def notes(self) -> Iterable[tuple[PeerRef, RequestNote]]:
        """Every request it holds, with the gateway that owns it."""
        ...

    def metrics(self) -> list[MetricFamily]:
        """A snapshot of its metrics."""
        ...

    def gateway_lost(self, gateway: PeerRef) -> None:
        """A gateway is gone: free what it owns."""
        ...


class WorkerLink:
    """Keeps a worker known, and carries its events to the gateways in one message per step and gateway."""

    def __init__(
        self,
        *,
        peer: PeerRef,
        holder: Holder,
        bus: Bus,
        registry: Registry,
        files: ModelFiles,
        published: tuple[str, dict[str, bytes]],
        lease_s: float,
        liveness_file: str,
    ) -> None:
        self.peer = peer
        self._holder = holder
        self._bus = bus
        self._registry = registry
        self._files = files
        self._published = published
        self._lease_s = lease_s
        self._liveness_file = Path(liveness_file) if liveness_file else None
        self._gateways: dict[str, tuple[PeerRef, float]] = {}
        self._outbox: dict[str, list[Event]] = {}
        bus.on_peer_lost(self._connection_lost)

    @classmethod
    def of(
        cls,
        settings: FleetSettings,
        *,
        peer: PeerRef,
        holder: Holder,
        bus: Bus,
        redis: Redis,
        published: tuple[str, dict[str, bytes]],
    ) -> WorkerLink:
        """A link as a service's settings say; `published` is digest and content of the model's files."""
        return cls(
            peer=peer,
            holder=holder,
            bus=bus,
            registry=Registry(redis, namespace=settings.namespace, lease_s=settings.lease_s),
            files=ModelFiles(redis, namespace=settings.namespace),
            published=published,
            lease_s=settings.lease_s,
            liveness_file=settings.liveness_file,
        )

    def publish(self, gateway: PeerRef, event: Event) -> None:
        """Queue an event for the gateway that owns the request; `flush` sends it."""
        self._outbox.setdefault(gateway.address, []).append(event)

    def flush(self) -> None:
        """Send everything queued: one Publication per gateway."""
        for address, events in self._outbox.items():
            self._bus.send(address, Publication(worker=self.peer, events=events))
        self._outbox.clear()

    def hear_hello(self, hello: GatewayHello) -> None:
        """A gateway lives."""
        self._hear(hello.gateway)

    def know(self, gateway: PeerRef) -> None:
        """A gateway sent work: if it has never said hello, it too is gone once it is silent for the lease."""
        if gateway.address not in self._gateways:
            self._hear(gateway)

    def _hear(self, gateway: PeerRef) -> None:
        """One that is new gets a heartbeat at once, so that it need not wait for the next."""
        known = self._gateways.get(gateway.address)
        self._gateways[gateway.address] = (gateway, time.monotonic())
        if known is None:
            _log.info("gateway joined", gateway=gateway.name)
            self._beat_to({gateway.address: gateway})

    async def announce(self) -> None:
        """Take the worker's name in the registry and publish its model's files; waits out an old lease of the name.

        Raises:
            NameTaken: another live process keeps the name.
        """
        deadline = time.monotonic() + self._lease_s * 1.5
        while True:
            try:
                await self._registry.announce_worker(self._holder.record())
                await self._files.ensure(*self._published)
            except NameTaken:
                if time.monotonic() > deadline:
                    raise
            except UNAVAILABLE as error:
                _log.warning("Redis is away, trying again", error=str(error))
            else:
                return
            await asyncio.sleep(self._lease_s / 6)

    async def run(self) -> None:
        """Renew the lease until cancelled; a task of the service's group. The bus beats do not wait for Redis."""
        beats = 0
        away = False
        while True:
            try:
                await self._registry.announce_worker(self._holder.record())
                if beats % FILES_EVERY_BEATS == 0:
                    await self._files.ensure(*self._published)
                away = False
            except UNAVAILABLE as error:
                if not away:
                    _log.warning("Redis is away, working on without it", error=str(error))
                away = True
            beats += 1
            await asyncio.sleep(self._lease_s / 6)

    async def beat(self) -> None:
        """Send heartbeats to all gateways until cancelled; a task of the service's group."""
        while True:
            self.beat_now()
            if self._liveness_file is not None:
                self._liveness_file.touch()
            await asyncio.sleep(self._lease_s / 6)

    def beat_now(self) -> None:
        """Drop gateways that fell silent, and tell the others of load and held requests."""
        deadline = time.monotonic() - self._lease_s
        for gateway, heard_s in list(self._gateways.values()):
            if heard_s < deadline:
                self._lose(gateway, "silent")
        self._beat_to({address: gateway for address, (gateway, _) in self._gateways.items()})

    def _beat_to(self, gateways: dict[str, PeerRef]) -> None:
        if not gateways:
            return
        # Tokens first: a gateway that compares notes must not miss what was said before them.
        self.flush()
        notes: dict[str, list[RequestNote]] = {address: [] for address in gateways}
        for gateway, note in self._holder.notes():
            if gateway.address in notes:
                notes[gateway.address].append(note)
        record, metrics = self._holder.record(), self._holder.metrics()
        for address, held in notes.items():
            self._bus.send(address, Heartbeat(record=record, requests=held, metrics=metrics))

    def _connection_lost(self, address: str) -> None:
        known = self._gateways.get(address)
        if known is not None:
            self._lose(known[0], "connection lost")

    def _lose(self, gateway: PeerRef, reason: str) -> None:
        del self._gateways[gateway.address]
        self._outbox.pop(gateway.address, None)
        self._bus.forget(gateway.address)
        _log.info("gateway gone", gateway=gateway.name, reason=reason)
        self._holder.gateway_lost(gateway)

    async def leave(self) -> None:
        """Withdraw from registry and gateways, last thing of an orderly end."""
        self.flush()
        for address in self._gateways:
            self._bus.send(address, Goodbye(peer=self.peer))
        try:
            await self._registry.withdraw_worker(self.peer)
        except UNAVAILABLE as error:
            _log.warning("could not withdraw, the lease will run out", error=str(error))
