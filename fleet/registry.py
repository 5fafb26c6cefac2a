"""The registry: who lives, under a lease in Redis that each process renews itself."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from fleet.errors import NameTaken
from fleet.logs import get_logger
from fleet.redis_client import Redis, as_bytes
from fleet.scripts import lua
from fleet.types import PeerRef, WorkerRecord

T = TypeVar("T")

_log = get_logger("registry")
_encoder = msgspec.msgpack.Encoder()
_workers = msgspec.msgpack.Decoder(WorkerRecord)
_peers = msgspec.msgpack.Decoder(PeerRef)


class Registry:
    """Leases of workers and gateways under `{namespace}:`; the keys are described in `docs/redis.md`."""

    def __init__(self, redis: Redis, *, namespace: str, lease_s: float) -> None:
        self._redis = redis
        self._namespace = namespace
        self._lease_ms = int(lease_s * 1000)
        self._announce = redis.register_script(lua("announce"))
        self._withdraw = redis.register_script(lua("withdraw"))

    def _keys(self, kind: str, name: str) -> list[str]:
        return [f"{self._namespace}:{kind}:{name}", f"{self._namespace}:{kind}s"]

    async def announce_worker(self, record: WorkerRecord) -> None:
        """Publish a worker's record and renew its lease.

        Raises:
            NameTaken: another live process holds the name.
        """
        await self._publish("worker", record.peer, _encoder.encode(record))

    async def announce_gateway(self, peer: PeerRef) -> None:
        """Publish a gateway and renew its lease. Raises NameTaken like `announce_worker`."""
        await self._publish("gateway", peer, _encoder.encode(peer))

    async def _publish(self, kind: str, peer: PeerRef, record: bytes) -> None:
        arguments: list[str | bytes | int] = [peer.name, str(peer.incarnation), record, self._lease_ms]
        if not await self._announce(keys=self._keys(kind, peer.name), args=arguments):
            raise NameTaken(f"another live process is registered as {kind} {peer.name!r}; set BATON_NAME to another")

    async def withdraw_worker(self, peer: PeerRef) -> None:
        """Remove a worker, if this incarnation still holds the name."""
        await self._withdraw(keys=self._keys("worker", peer.name), args=[peer.name, str(peer.incarnation)])

    async def withdraw_gateway(self, peer: PeerRef) -> None:
        """Remove a gateway, if this incarnation still holds the name."""
        await self._withdraw(keys=self._keys("gateway", peer.name), args=[peer.name, str(peer.incarnation)])

    async def workers(self) -> list[WorkerRecord]:
        """Live workers, by name. Records that do not decode (another version's) are skipped and logged."""
        return await self._live("worker", _workers)

    async def gateways(self) -> list[PeerRef]:
        """Live gateways, by name."""
        return await self._live("gateway", _peers)

    async def _live(self, kind: str, decoder: msgspec.msgpack.Decoder[T]) -> list[T]:
        index = f"{self._namespace}:{kind}s"
        names = sorted(as_bytes(name).decode() for name in await self._redis.smembers(index))
        if not names:
            return []
        pipe = self._redis.pipeline(transaction=False)
        for name in names:
            pipe.hget(f"{self._namespace}:{kind}:{name}", "record")
        found: list[T] = []
        gone: list[str] = []
        for name, raw in zip(names, await pipe.execute(), strict=True):
            if raw is None:
                gone.append(name)
                continue
            try:
                found.append(decoder.decode(raw))
            except msgspec.DecodeError as error:
                _log.warning("record skipped", kind=kind, name=name, error=str(error))
        if gone:
            await self._redis.srem(index, *gone)
        return found
