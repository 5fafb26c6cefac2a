"""The small files of a model, published by its workers, so that a gateway needs no copy of the checkpoint.

They lie in Redis as one hash per digest: `{namespace}:model_files:{digest}`, field = file name.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fleet.redis_client import Redis, as_bytes

NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
TTL_S = 86_400


def read(directory: Path) -> dict[str, bytes]:
    """Those of `NAMES` that the checkpoint has."""
    return {name: (directory / name).read_bytes() for name in NAMES if (directory / name).is_file()}


def digest_of(files: dict[str, bytes]) -> str:
    """Names the set of files by content."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + hashlib.blake2b(files[name]).digest())
    return digest.hexdigest()


class ModelFiles:
    """The published files of all models of a fleet."""

    def __init__(self, redis: Redis, *, namespace: str) -> None:
        self._redis = redis
        self._namespace = namespace

    def _key(self, digest: str) -> str:
        return f"{self._namespace}:model_files:{digest}"

    async def ensure(self, digest: str, files: dict[str, bytes]) -> None:
        """Publish unless they are there, and keep them for another day. Workers repeat this now and then."""
        key = self._key(digest)
        if not await self._redis.expire(key, TTL_S):
            pipe = self._redis.pipeline(transaction=True)
            pipe.hset(key, mapping=dict(files.items()))
            pipe.expire(key, TTL_S)
            await pipe.execute()

    async def fetch(self, digest: str) -> dict[str, bytes]:
        """The files, or an empty dict when nobody has published them (yet)."""
        stored = await self._redis.hgetall(self._key(digest))
        return {as_bytes(name).decode(): as_bytes(content) for name, content in stored.items()}
