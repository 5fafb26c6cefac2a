"""One way to connect to Redis: bounded waits, so that an absent Redis never holds anybody up for long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from fleet.errors import SettingsError

TIMEOUT_S = 2.0

UNAVAILABLE = (RedisError, OSError)
"""What calls raise while Redis is away; callers carry on without and try again later."""


@asynccontextmanager
async def _heeding_cancellation() -> AsyncIterator[None]:
    """redis-py loses a cancellation that comes while it waits for a reply; a task could then never be stopped."""
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        yield
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError


class _Pipeline(aioredis.client.Pipeline):
    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        async with _heeding_cancellation():
            return await super().execute(raise_on_error)


class Redis(aioredis.Redis):
    """`redis.asyncio.Redis`, except that its calls can be cancelled at any moment."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """As the library's, heeding cancellation."""
        async with _heeding_cancellation():
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> _Pipeline:
        """As the library's, heeding cancellation."""
        return _Pipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


def as_bytes(value: bytes | str) -> bytes:
    """A reply of Redis as bytes, which it always is with this client; the library's types allow both."""
    return value.encode() if isinstance(value, str) else value


def connect(url: str) -> Redis:
    """A client for `redis://`, `rediss://` (TLS) or `unix://` URLs; connects at first use.

    Raises:
        SettingsError: the URL is not one.
    """
    try:
        client = Redis.from_url(
            url,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 1),
            health_check_interval=0,
        )
    except ValueError as error:
        raise SettingsError(f"BATON_REDIS_URL is not a Redis URL: {error}") from error
    assert isinstance(client, Redis), "from_url makes what it is called on"  # noqa: S101 - for the type checker
    return client
