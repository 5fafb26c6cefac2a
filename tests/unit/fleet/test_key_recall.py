"""A gateway's copy of the keys: revoked ones go, lost ones are written back, never mistaken for each other."""

from __future__ import annotations

import pytest

from fleet.keys import KeyRegistry
from fleet.redis_client import Redis
from gateway.key_store import CachedKeys


@pytest.mark.parametrize("first", [0, 1])
async def test_a_redis_that_comes_back_empty_opens_no_gateway(redis: Redis, first: int) -> None:
    registry = KeyRegistry(redis, namespace=f"recall-{first}")
    gateways = [CachedKeys(registry, always_required=False) for _ in range(2)]
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


async def test_keys_and_the_mark_of_their_making_are_read_together(redis: Redis) -> None:
    registry = KeyRegistry(redis, namespace="together")
    assert await registry.recall() == ({}, False)
    key, _ = await registry.create("bob")
    stored, remembers = await registry.recall()
    assert (list(stored.values()), remembers) == ([key], True)
    await registry.revoke(key.key_id)
    assert await registry.recall() == ({}, True)
