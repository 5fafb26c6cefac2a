"""A gateway's copy of the keys: revoked ones go, lost ones are written back, and nobody mistakes the one for the other."""

from __future__ import annotations

import pytest
from support.redis_server import RedisServer

from fleet.keys import KeyRegistry
from fleet.redis_client import connect
from gateway.key_store import CachedKeys


@pytest.mark.parametrize("first", [0, 1])
async def test_a_redis_that_comes_back_empty_opens_no_gateway(module_redis: RedisServer, first: int) -> None:
    redis = connect(module_redis.url)
    registry = KeyRegistry(redis, namespace=f"recall-{first}")
    gateways = [CachedKeys(registry, always_required=False) for _ in range(2)]
    try:
        key, secret = await registry.create("alice")
        for gateway in gateways:
            await gateway.refresh()
        await redis.flushdb()
        order = (gateways[first], gateways[1 - first], gateways[first])
        for gateway in order:
            await gateway.refresh()
            assert all(one.required for one in gateways)
            assert await gateway.lookup(secret) == key
        assert set(await registry.by_hash()) == set(gateways[0]._by_hash)
        assert await registry.revoke(key.key_id)
        for gateway in gateways:
            await gateway.refresh()
            assert not gateway.required
    finally:
        await redis.aclose()


async def test_keys_and_the_mark_of_their_making_are_read_together(module_redis: RedisServer) -> None:
    redis = connect(module_redis.url)
    registry = KeyRegistry(redis, namespace="together")
    try:
        assert await registry.recall() == ({}, False)
        key, _ = await registry.create("bob")
        stored, remembers = await registry.recall()
        assert (list(stored.values()), remembers) == ([key], True)
        await registry.revoke(key.key_id)
        assert await registry.recall() == ({}, True)
    finally:
        await redis.aclose()
