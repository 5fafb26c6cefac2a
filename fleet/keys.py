"""API keys: shown once, stored hashed, looked up by hash.

A key is `bt-{key_id}-{256 random bits}`. With that much randomness a plain SHA-256 is enough.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from typing import Any

import msgspec

from fleet.redis_client import Redis, as_bytes


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a key. `None` limits are unlimited, empty `models` means all.

    One with `admin` may look at what all keys do.
    """

    key_id: str
    name: str
    created_s: float
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    models: tuple[str, ...] = ()
    admin: bool = False


def hash_secret(secret: str) -> str:
    """Under which name a key lies in Redis."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


class KeyRegistry:
    """Keys in the hash `{namespace}:keys`: field = hash of the secret, value = msgpack of `ApiKey`."""

    def __init__(self, redis: Redis, *, namespace: str) -> None:
        self._redis = redis
        self._key = f"{namespace}:keys"
        self._made = f"{namespace}:keys_made"
        self._decoder = msgspec.msgpack.Decoder(ApiKey)

    async def create(
        self,
        name: str,
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        models: tuple[str, ...] = (),
        admin: bool = False,
    ) -> tuple[ApiKey, str]:
        """Make a key; returns what is stored and the secret, which is shown here for the only time."""
        key_id = secrets.token_hex(4)
        secret = f"bt-{key_id}-{secrets.token_urlsafe(32)}"
        key = ApiKey(
            key_id=key_id,
            name=name,
            created_s=time.time(),
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            models=models,
            admin=admin,
        )
        await self.put({hash_secret(secret): key})
        return key, secret

    async def put(self, by_hash: dict[str, ApiKey]) -> None:
        """Store keys by the hash of their secret; also those that a Redis without memory has lost."""
        pipe = self._redis.pipeline()
        pipe.hset(self._key, mapping={digest: msgspec.msgpack.encode(key) for digest, key in by_hash.items()})
        pipe.set(self._made, b"1")
        await pipe.execute()

    async def recall(self) -> tuple[dict[str, ApiKey], bool]:
        """All keys by the hash of their secret, and whether Redis knows that keys were made.

        If it does not and a key is missing, it has lost its data. Both are read in one transaction: apart, another
        gateway could write its keys back between them, and lost keys would look like revoked ones.
        """
        pipe = self._redis.pipeline()
        pipe.hgetall(self._key)
        pipe.exists(self._made)
        stored, made = await pipe.execute()
        return self._decoded(stored), bool(made)

    def _decoded(self, stored: Any) -> dict[str, ApiKey]:
        return {as_bytes(name).decode(): self._decoder.decode(as_bytes(raw)) for name, raw in stored.items()}

    async def list(self) -> list[ApiKey]:
        """All keys, oldest first."""
        stored = await self._redis.hgetall(self._key)
        return sorted(self._decoded(stored).values(), key=lambda key: key.created_s)

    async def by_hash(self) -> dict[str, ApiKey]:
        """All keys by the hash of their secret, for a gateway to cache."""
        return self._decoded(await self._redis.hgetall(self._key))

    async def revoke(self, key_id: str) -> bool:
        """Delete a key; False when there is none of this id."""
        for digest, key in (await self.by_hash()).items():
            if key.key_id == key_id:
                return bool(await self._redis.hdel(self._key, digest))
        return False
