"""One way to connect to Redis: bounded waits, so that an absent Redis never holds anybody up for long."""

from __future__ import annotations

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from fleet.errors import SettingsError

TIMEOUT_S = 2.0

Redis = aioredis.Redis
UNAVAILABLE = (RedisError, OSError)
"""What calls raise while Redis is away; callers carry on without and try again later."""


def as_bytes(value: bytes | str) -> bytes:
    """A reply of Redis as bytes, which it always is with this client; the library's types allow both."""
    return value.encode() if isinstance(value, str) else value


def connect(url: str) -> Redis:
    """A client for `redis://`, `rediss://` (TLS) or `unix://` URLs; connects at first use.

    Raises:
        SettingsError: the URL is not one.
    """
    try:
        return aioredis.Redis.from_url(
            url,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 1),
            health_check_interval=0,
        )
    except ValueError as error:
        raise SettingsError(f"BATON_REDIS_URL is not a Redis URL: {error}") from error
