"""How the command sees that a service is ready: by the same signs that the fleet itself goes by."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from baton.child import Child
from fleet.redis_client import UNAVAILABLE, Redis
from fleet.registry import Registry

PROBE_TIMEOUT_S = 2.0

Probe = Callable[[Child], Awaitable[bool]]
"""Whether this child is ready; never raises for one that is not yet."""


@dataclass(frozen=True, slots=True)
class FleetProbe:
    """Asks Redis, the registry, or the gateway, according to the child's role.

    Attributes:
        redis: client of the fleet's Redis.
        registry: on the same Redis.
        host, port: where the gateway can be reached from this machine.
    """

    redis: Redis
    registry: Registry
    host: str
    port: int

    async def __call__(self, child: Child) -> bool:
        """Redis answers; a worker of this process id is registered; the gateway says that it can serve."""
        match child.spec.role:
            case "redis":
                return await self.redis_answers()
            case "gateway":
                return await asyncio.to_thread(http_ok, self.host, self.port, "/health/ready")
            case _:
                return await self._is_registered(child)

    async def redis_answers(self) -> bool:
        """Whether PING is answered."""
        try:
            return bool(await self.redis.ping())
        except UNAVAILABLE:
            return False

    async def _is_registered(self, child: Child) -> bool:
        try:
            workers = await self.registry.workers()
        except UNAVAILABLE:
            return False
        # The record of an earlier life stays until its lease runs out, under the same name but another process id.
        return any(
            worker.pid == child.pid and worker.peer.name == child.spec.environ["BATON_NAME"] for worker in workers
        )


def http_ok(host: str, port: int, path: str) -> bool:
    """Whether a GET is answered with 200. Blocking, for at most `PROBE_TIMEOUT_S`."""
    connection = http.client.HTTPConnection(host, port, timeout=PROBE_TIMEOUT_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
