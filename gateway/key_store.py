"""API keys as this gateway knows them: a copy of Redis, refreshed behind the requests."""

from __future__ import annotations

import asyncio

from fleet.keys import ApiKey, KeyRegistry, hash_secret
from fleet.logs import get_logger
from fleet.redis_client import UNAVAILABLE

REFRESH_S = 1.0

_log = get_logger("keys")


class CachedKeys:
    """Looks keys up in memory; a revoked key works for at most `REFRESH_S` longer, and all go on while Redis is away.

    Args:
        registry: where keys are kept.
        always_required: ask for a key even while none exists, because the gateway listens beyond loopback.
    """

    def __init__(self, registry: KeyRegistry, *, always_required: bool) -> None:
        self._registry = registry
        self._always_required = always_required
        self._by_hash: dict[str, ApiKey] = {}

    @property
    def required(self) -> bool:
        """Whether requests must carry a key: from the moment that one exists."""
        return self._always_required or bool(self._by_hash)

    @property
    def num_keys(self) -> int:
        """Keys that exist."""
        return len(self._by_hash)

    async def lookup(self, secret: str) -> ApiKey | None:
        """The key that a secret belongs to, or None."""
        return self._by_hash.get(hash_secret(secret))

    async def refresh(self) -> None:
        """Read all keys. A Redis that has come back empty is given those that are known here. Raises what Redis raises.

        Revoked keys are told from lost ones by the mark that making one leaves behind.
        """
        stored, remembers = await self._registry.recall()
        if (stored or self._by_hash) and not remembers:
            _log.warning("Redis has no memory of API keys, writing them back", count=len(self._by_hash | stored))
            stored = self._by_hash | stored
            await self._registry.put(stored)
        self._by_hash = stored

    async def run(self) -> None:
        """Refresh until cancelled; a task of the service's group."""
        away = False
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                await self.refresh()
                away = False
            except UNAVAILABLE as error:
                if not away:
                    _log.warning("Redis is away, keys stay as they were", error=str(error))
                away = True
