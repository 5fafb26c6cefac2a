"""Usage counts: hourly in Redis, never twice, caught up after an outage."""

from __future__ import annotations

import pytest

from fleet.redis_client import Redis
from fleet.usage import (
    DAY_S,
    HOUR_S,
    MAX_SPAN_S,
    TTL_S,
    Counts,
    MemoryUsage,
    RedisUsage,
    UsageRow,
    bucketed,
    of_key,
    span,
)

ONE = Counts(requests=1, prompt_tokens=10, cached_tokens=4, completion_tokens=3)
NOON = 500_000 * HOUR_S


class Clock:
    now_s = NOON + 5.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize("kind", ["memory", "redis"])
async def test_counts_add_up_per_hour_key_and_model(kind: str, redis: Redis) -> None:
    clock = Clock()
    ledger = MemoryUsage(clock) if kind == "memory" else RedisUsage(redis, namespace="n", clock=clock)
    for key_id, model in (("a", "org/m:1"), ("a", "org/m:1"), ("b", "org/m:1"), ("", "x")):
        ledger.add(key_id, model, ONE)
    assert await ledger.read(NOON, NOON + HOUR_S) != []
    clock.now_s += HOUR_S
    ledger.add("a", "org/m:1", ONE)
    rows = await ledger.read(NOON - 300 * HOUR_S, NOON + 2 * HOUR_S)
    assert [(row.start_s - NOON, row.key_id, row.model, row.counts.requests) for row in rows] == [
        (0, "", "x", 1),
        (0, "a", "org/m:1", 2),
        (0, "b", "org/m:1", 1),
        (HOUR_S, "a", "org/m:1", 1),
    ]
    assert rows[1].counts == ONE + ONE
    assert [row.start_s for row in await ledger.read(NOON + 1, NOON + 2 * HOUR_S)] == [NOON + HOUR_S]
    assert await ledger.read(NOON, NOON + 1) == rows[:3]


async def test_gateways_add_to_one_another_and_old_hours_expire(redis: Redis) -> None:
    gateways = [RedisUsage(redis, namespace="n", clock=Clock()) for _ in range(2)]
    for gateway in gateways * 2:
        gateway.add("a", "m", ONE)
        await gateway.flush()
    (row,) = await gateways[0].read(NOON, NOON + 1)
    assert row.counts.requests == 4
    assert 0 < await redis.ttl(f"n:usage:{NOON // HOUR_S}") <= TTL_S


async def test_a_batch_whose_answer_is_lost_is_not_added_twice(redis: Redis) -> None:
    usage = RedisUsage(redis, namespace="n", clock=Clock())
    script, lost = usage._script, []

    async def losing(**arguments: object) -> object:
        answer = await script(**arguments)  # type: ignore[arg-type]
        if not lost:
            lost.append(answer)
            raise ConnectionError
        return answer

    usage._script = losing  # type: ignore[assignment]
    usage.add("a", "m", ONE)
    with pytest.raises(ConnectionError):
        await usage.flush()
    usage.add("a", "m", ONE)
    (row,) = await usage.read(NOON, NOON + 1)
    assert row.counts == ONE + ONE


def test_buckets_and_keys() -> None:
    rows = [UsageRow(start_s=hour * HOUR_S, key_id=key, model="m", counts=ONE) for hour in range(30) for key in "ab"]
    assert [(row.start_s, row.counts.requests) for row in of_key(bucketed(rows, DAY_S), "a")] == [(0, 24), (DAY_S, 6)]
    assert of_key(rows, None) == rows


def test_times_are_unix_seconds_or_iso() -> None:
    assert span(None, None, now_s=NOON + 9.5) == ((NOON + 10 - DAY_S) // HOUR_S * HOUR_S, NOON + 10)
    assert span("1970-01-02", "1970-01-02T01:00:00+00:30", now_s=0) == (DAY_S, DAY_S + 1800)
    assert span("60", "1970-01-01T00:02:00Z", now_s=0) == (60, 120)
    for bad, name in (
        (("x", None), "from"),
        ((None, "²"), "to"),
        ((None, ""), "to"),
        (("5", "5"), "from"),
        (("0", str(MAX_SPAN_S + 1)), "from"),
        (("9999-12-31T23:59:59-23:59", None), "from"),
    ):
        with pytest.raises(ValueError, match=name) as refused:
            span(*bad, now_s=NOON)
        assert refused.value.args[0] == name
