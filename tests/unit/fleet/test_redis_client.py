"""The Redis client: calls end when their task is cancelled, and bad URLs say so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from fleet.errors import SettingsError
from fleet.redis_client import Redis, connect


async def one_by_one(redis: Redis) -> None:
    while True:
        await redis.blpop("nothing", timeout=1)


async def in_pipelines(redis: Redis) -> None:
    while True:
        pipe = redis.pipeline(transaction=False)
        pipe.blpop("nothing", timeout=1)
        await pipe.execute()


@pytest.mark.parametrize("work", [one_by_one, in_pipelines])
async def test_a_task_in_a_call_can_be_cancelled(
    redis: Redis, work: Callable[[Redis], Coroutine[Any, Any, None]]
) -> None:
    task = asyncio.create_task(work(redis))
    await asyncio.sleep(0.1)
    task.cancel()
    async with asyncio.timeout(3):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await redis.ping()


def test_a_bad_url_is_named() -> None:
    with pytest.raises(SettingsError, match="BATON_REDIS_URL"):
        connect("http://nowhere")
