"""Requests and tokens per minute and API key, with the `limits` library.

Requests count in a sliding window: a refused one costs nothing. Tokens count in a fixed window, because what an
answer will cost is known only when it is over: the prompt is charged on arrival, the output at the end, and a window
may be overdrawn by answers under way; the next request then waits for the next window.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

import structlog
from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage, Storage
from limits.aio.strategies import FixedWindowRateLimiter, SlidingWindowCounterRateLimiter

from fleet.keys import ApiKey
from fleet.redis_client import UNAVAILABLE, Redis
from gateway.errors import RateLimited

Headers = dict[str, str]
WINDOW_S = 60.0
T = TypeVar("T")

ALONE_S = 5.0
"""How long a gateway counts alone once the storage has failed it."""


class RateLimiter:
    """Counts for all gateways that share a storage. Should the storage fail, this gateway counts alone for a while.

    Args:
        storage: of the `limits` library.
        storage_errors: what the storage raises when it is away.
    """

    def __init__(self, storage: Storage, storage_errors: tuple[type[Exception], ...] = ()) -> None:
        self._errors = storage_errors
        self._shared = _Counters(storage)
        self._alone = _Counters(MemoryStorage())
        self._alone_until_s = 0.0

    @classmethod
    def in_memory(cls) -> RateLimiter:
        """A limiter of this process alone."""
        return cls(MemoryStorage())

    @classmethod
    def on_redis(cls, client: Redis, *, namespace: str) -> RateLimiter:
        """A limiter shared through Redis, over the connections of a client that the caller closes.

        Keys begin with `{namespace}:limits`.
        """
        storage = RedisStorage(
            "async+redis://",  # never dialled: the pool knows the address
            implementation="redispy",
            key_prefix=f"{namespace}:limits",
            connection_pool=cast("str", client.connection_pool),  # `limits` declares its options too narrowly
        )
        return cls(storage, UNAVAILABLE)

    async def admit(self, key: ApiKey | None, num_prompt_tokens: int) -> Headers:
        """Charge one request and its prompt. Returns the `x-ratelimit-*` headers; none for an unlimited key.

        Raises: RateLimited with `retry-after` and the same headers.
        """
        if key is None or (key.requests_per_minute is None and key.tokens_per_minute is None):
            return {}
        return await self._count(lambda counters: counters.admit(key, num_prompt_tokens))

    async def charge_output(self, key: ApiKey | None, num_tokens: int) -> None:
        """Charge the output of an admitted request."""
        if key is None or key.tokens_per_minute is None or num_tokens == 0:
            return
        await self._count(lambda counters: counters.charge(key, num_tokens))

    async def _count(self, action: Callable[[_Counters], Awaitable[T]]) -> T:
        """Do it in the shared storage, or here while that is away: nobody waits for its timeout again and again."""
        if time.monotonic() >= self._alone_until_s:
            try:
                return await action(self._shared)
            except self._errors as error:
                structlog.get_logger("gateway.api").warning("rate limits count locally", reason=str(error))
                self._alone_until_s = time.monotonic() + ALONE_S
        return await action(self._alone)


class _Counters:
    """The two windows over one storage."""

    def __init__(self, storage: Storage) -> None:
        self._requests = SlidingWindowCounterRateLimiter(storage)
        self._tokens = FixedWindowRateLimiter(storage)

    async def admit(self, key: ApiKey, num_prompt_tokens: int) -> Headers:
        headers: Headers = {}
        if key.tokens_per_minute is not None:
            await self._check_tokens(key, key.tokens_per_minute, num_prompt_tokens)
        if key.requests_per_minute is not None:
            headers |= await self._take_request(key, key.requests_per_minute)
        if key.tokens_per_minute is not None:
            await self.charge(key, num_prompt_tokens)
            headers |= (await self._token_window(key, key.tokens_per_minute))[0]
        return headers

    async def charge(self, key: ApiKey, num_tokens: int) -> None:
        item = RateLimitItemPerMinute(key.tokens_per_minute or 0)
        await self._tokens.hit(item, key.key_id, "tokens", cost=num_tokens)

    async def _take_request(self, key: ApiKey, limit: int) -> Headers:
        item = RateLimitItemPerMinute(limit)
        admitted = limit > 0 and await self._requests.hit(item, key.key_id, "requests")
        stats = await self._requests.get_window_stats(item, key.key_id, "requests")
        wait_s = max(0.0, stats.reset_time - time.time())
        if wait_s == 0 and stats.remaining < limit:  # a window that begins just now, which the library takes modulo 60
            wait_s = WINDOW_S
        headers = _headers("requests", limit, stats.remaining, wait_s)
        if not admitted:
            raise RateLimited(
                f"Rate limit reached: {limit} requests per minute for this key.",
                retry_after_s=wait_s,
                code="rate_limit_exceeded",
                headers=headers,
            )
        return headers

    async def _check_tokens(self, key: ApiKey, limit: int, num_tokens: int) -> None:
        headers, remaining, wait_s = await self._token_window(key, limit)
        if num_tokens > limit:
            raise RateLimited(
                f"Request too large: {num_tokens} prompt tokens exceed this key's {limit} tokens per minute.",
                retry_after_s=60,
                code="rate_limit_exceeded",
                headers={**headers, "x-should-retry": "false"},
            )
        if num_tokens > remaining:
            raise RateLimited(
                f"Rate limit reached: {limit} tokens per minute for this key, {remaining} left.",
                retry_after_s=wait_s,
                code="rate_limit_exceeded",
                headers=headers,
            )

    async def _token_window(self, key: ApiKey, limit: int) -> tuple[Headers, int, float]:
        stats = await self._tokens.get_window_stats(RateLimitItemPerMinute(limit), key.key_id, "tokens")
        wait_s = max(0.0, stats.reset_time - time.time())
        return _headers("tokens", limit, stats.remaining, wait_s), stats.remaining, wait_s


def _headers(kind: str, limit: int, remaining: int, reset_s: float) -> Headers:
    return {
        f"x-ratelimit-limit-{kind}": str(limit),
        f"x-ratelimit-remaining-{kind}": str(remaining),
        f"x-ratelimit-reset-{kind}": f"{math.ceil(reset_s)}s",
    }
