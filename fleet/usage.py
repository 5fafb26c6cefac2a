"""Who used how much: requests and tokens per API key, model and hour.

Counts are added in memory at the end of each request and written behind to Redis, a hash per hour with the fields
`{key id}:{count}:{model}`. Each batch has a number, so that one whose answer got lost is not added twice.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import msgspec

from fleet.logs import get_logger
from fleet.redis_client import UNAVAILABLE, Redis, as_bytes
from fleet.scripts import lua

HOUR_S = 3_600
DAY_S = 24 * HOUR_S
TTL_S = 100 * DAY_S
MAX_SPAN_S = 93 * DAY_S
FLUSH_S = 0.5
BUCKETS = {"hour": HOUR_S, "day": DAY_S}

_READ_BATCH = 256
_log = get_logger("usage")


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """What requests came to."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})


class UsageRow(msgspec.Struct, frozen=True, kw_only=True):
    """The counts of one key and model in one bucket of time.

    Attributes:
        start_s: Unix time at which the bucket begins; buckets are aligned to UTC.
        key_id: empty for requests without a key.
    """

    start_s: int
    key_id: str
    model: str
    counts: Counts


class MemoryUsage:
    """Counts of this process alone."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._counts: defaultdict[tuple[int, str, str], Counts] = defaultdict(Counts)

    def add(self, key_id: str, model: str, counts: Counts) -> None:
        """Count. Never waits."""
        self._counts[int(self._clock()) // HOUR_S * HOUR_S, key_id, model] += counts

    async def read(self, from_s: int, to_s: int) -> list[UsageRow]:
        """Hourly rows of the hours that begin in `[from_s, to_s)`, in order of time, key and model."""
        rows = (UsageRow(start_s=s, key_id=k, model=m, counts=c) for (s, k, m), c in self._counts.items())
        return bucketed((row for row in rows if from_s <= row.start_s < to_s), HOUR_S)

    def take(self) -> dict[tuple[int, str, str], Counts]:
        """All counts, which begin anew."""
        taken = dict(self._counts)
        self._counts.clear()
        return taken


class RedisUsage:
    """Counts of all gateways, kept in Redis. While it is away they wait here, one entry per hour, key and model."""

    def __init__(self, redis: Redis, *, namespace: str, clock: Callable[[], float] = time.time) -> None:
        self._redis = redis
        self._prefix = f"{namespace}:usage:"
        self._script = redis.register_script(lua("add_usage"))
        self._writer = secrets.token_hex(8)
        self._fresh = MemoryUsage(clock)
        self._unsure: list[tuple[int, int, dict[str, int]]] = []  # hour, number, amounts: sent, not confirmed
        self._last_number = 0
        self._wake = asyncio.Event()
        self._writing = asyncio.Lock()

    def add(self, key_id: str, model: str, counts: Counts) -> None:
        """Count. Never waits."""
        self._fresh.add(key_id, model, counts)
        self._wake.set()

    async def run(self) -> None:
        """Write until cancelled; a task of the service's group."""
        away = False
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self.flush()
                away = False
            except UNAVAILABLE as error:
                if not away:
                    _log.warning("Redis is away, usage will catch up", error=str(error))
                away = True
                self._wake.set()
            await asyncio.sleep(FLUSH_S)

    async def flush(self) -> None:
        """Write what is counted. Raises what Redis raises, and keeps the counts then."""
        async with self._writing:
            by_hour: defaultdict[int, dict[str, int]] = defaultdict(dict)
            for (start_s, key_id, model), counts in self._fresh.take().items():
                for name in counts.__struct_fields__:
                    by_hour[start_s // HOUR_S][f"{key_id}:{name}:{model}"] = getattr(counts, name)
            for hour, amounts in by_hour.items():
                self._last_number += 1
                self._unsure.append((hour, self._last_number, amounts))
            while self._unsure:
                hour, number, amounts = self._unsure[0]
                pairs = [item for pair in amounts.items() for item in pair]
                await self._script(keys=[f"{self._prefix}{hour}"], args=[TTL_S, self._writer, number, *pairs])
                del self._unsure[0]

    async def read(self, from_s: int, to_s: int) -> list[UsageRow]:
        """As `MemoryUsage.read`, with all that this process has counted. Raises what Redis raises."""
        await self.flush()
        hours = range(-(-from_s // HOUR_S), -(-to_s // HOUR_S))
        rows: list[UsageRow] = []
        for first in range(0, len(hours), _READ_BATCH):
            batch = hours[first : first + _READ_BATCH]
            pipe = self._redis.pipeline(transaction=False)
            for hour in batch:
                pipe.hgetall(f"{self._prefix}{hour}")
            for hour, stored in zip(batch, await pipe.execute(), strict=True):
                rows += _rows_of(hour * HOUR_S, stored)
        return bucketed(rows, HOUR_S)


def _rows_of(start_s: int, stored: dict[bytes, bytes]) -> list[UsageRow]:
    amounts: defaultdict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for field, amount in stored.items():
        text = as_bytes(field).decode()
        if not text.startswith("#"):
            key_id, name, model = text.split(":", 2)
            amounts[key_id, model][name] = int(amount)
    return [
        UsageRow(start_s=start_s, key_id=key_id, model=model, counts=msgspec.convert(found, Counts))
        for (key_id, model), found in amounts.items()
    ]


def bucketed(rows: Iterable[UsageRow], bucket_s: int) -> list[UsageRow]:
    """Rows summed up per bucket, key and model, in that order."""
    sums: defaultdict[tuple[int, str, str], Counts] = defaultdict(Counts)
    for row in rows:
        sums[row.start_s // bucket_s * bucket_s, row.key_id, row.model] += row.counts
    return [UsageRow(start_s=s, key_id=k, model=m, counts=c) for (s, k, m), c in sorted(sums.items(), key=_order)]


def _order(item: tuple[tuple[int, str, str], Counts]) -> tuple[int, str, str]:
    return item[0]


def span(from_text: str | None, to_text: str | None, *, now_s: float) -> tuple[int, int]:
    """The time that two texts bound, each Unix seconds or ISO 8601 (UTC unless it says); by default the last 24 hours.

    Raises: ValueError whose first argument is `from` or `to`, and whose second says what is wrong.
    """
    to_s = int(now_s) + 1 if to_text is None else _moment("to", to_text)
    from_s = max(0, (to_s - DAY_S) // HOUR_S * HOUR_S) if from_text is None else _moment("from", from_text)
    if from_s >= to_s:
        raise ValueError("from", "is not before 'to'")
    if to_s - from_s > MAX_SPAN_S:
        raise ValueError("from", f"is more than {MAX_SPAN_S // DAY_S} days before 'to'")
    return from_s, to_s


def _moment(name: str, text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 11:
        return int(text)
    try:
        moment = dt.datetime.fromisoformat(text)
        return max(0, int((moment if moment.tzinfo is not None else moment.replace(tzinfo=dt.UTC)).timestamp()))
    except (ValueError, OverflowError):
        raise ValueError(name, "is neither Unix seconds nor a time such as 2026-01-31T12:00:00Z") from None


def of_key(rows: Sequence[UsageRow], key_id: str | None) -> list[UsageRow]:
    """The rows of one key; of all for None."""
    return [row for row in rows if key_id is None or row.key_id == key_id]
