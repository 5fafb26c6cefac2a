"""The events of background responses in Redis: written behind in batches, read by anybody through any gateway.

A unit is the events of one piece of output with the tokens that made them. The id of its entry is `1-{number}`, the
sequence number of its last event, so a reader that has seen number N asks for the entries after `1-N`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from fleet.logs import get_logger
from fleet.redis_client import UNAVAILABLE, as_bytes
from fleet.scripts import lua
from gateway.api.responses_api.objects import LIVE, ResponseObject
from gateway.api.responses_api.store import ResponseStore, away
from gateway.api.sse import typed_event
from gateway.pipeline import Tokens

FLUSH_S = 0.03
RETRY_S = 0.5
BLOCK_MS = 1_000
PATIENCE_S = 30.0
LIVE_TTL_S = 3_600
ENDED_TTL_S = 600
READ_COUNT = 256

_log = get_logger("responses")
_tokens = msgspec.msgpack.Decoder(list[Tokens])


class Unit(msgspec.Struct, frozen=True):
    """Events that belong together.

    Attributes:
        last_number: sequence number of its last event.
        num_events: how many there are.
        events: as sent.
        tokens: what came from the fleet since the unit before.
        status, body: how the response stands after it, where that changed.
    """

    last_number: int
    num_events: int
    events: bytes
    tokens: Sequence[Tokens] = ()
    status: str = ""
    body: bytes = b""


class Lease:
    """One gateway's hold on one run, until another takes it, somebody cancels, or the end is written.

    Attributes:
        owner: names this hold; writes under another name are refused.
        lost: set when the run is not ours any more.
    """

    def __init__(self, response_id: str, owner: str) -> None:
        self.response_id = response_id
        self.owner = owner
        self.lost = asyncio.Event()
        self.pending: list[Unit] = []
        self.written = asyncio.Event()
        self.written.set()


class EventLog:
    """Writes units behind the token path, and reads them back.

    Args:
        lease_ms: a run whose gateway is silent so long may be taken over.
    """

    def __init__(self, store: ResponseStore, *, lease_ms: int) -> None:
        self._store = store
        self._lease_ms = lease_ms
        self._append = store.redis.register_script(lua("response_append"))
        self._cancel = store.redis.register_script(lua("response_cancel"))
        self._unwritten: dict[str, Lease] = {}
        self._wake = asyncio.Event()

    def write(self, lease: Lease, unit: Unit) -> None:
        """Have a unit written soon. Never waits."""
        lease.pending.append(unit)
        lease.written.clear()
        self._unwritten[lease.owner] = lease
        self._wake.set()

    async def run(self) -> None:
        """Write until cancelled; a task of the service's group. Patient while Redis is away."""
        is_away = False
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._unwritten:
                try:
                    await self.flush()
                except UNAVAILABLE as error:
                    if not is_away:
                        _log.warning("Redis is away, events of responses will catch up", error=str(error))
                    is_away = True
                    await asyncio.sleep(RETRY_S)
                else:
                    is_away = False
                    await asyncio.sleep(FLUSH_S)

    async def flush(self) -> None:
        """Write what is pending, one call per run. Raises what Redis raises, and keeps what is pending then."""
        batch = [(lease, list(lease.pending)) for lease in self._unwritten.values()]
        pipe = self._store.redis.pipeline(transaction=False)
        for lease, units in batch:
            response_id = lease.response_id
            latest = next((unit for unit in reversed(units) if unit.status), None)
            ended = latest is not None and latest.status not in LIVE
            arguments: list[str | bytes | int] = [
                lease.owner,
                response_id,
                self._lease_ms,
                ENDED_TTL_S if ended else LIVE_TTL_S,
                self._store.ttl_s,
                latest.status if latest is not None else "",
                latest.body if latest is not None else b"",
                int(ended),
            ]
            for unit in units:
                tokens = msgspec.msgpack.encode(unit.tokens)
                arguments += [unit.last_number, unit.num_events, unit.events, tokens]
            keys = [self._store.key(response_id), self._store.events_key(response_id), self._store.runs_key]
            await self._append(keys=keys, args=arguments, client=pipe)
        for (lease, units), is_ours in zip(batch, await pipe.execute(), strict=True):
            del lease.pending[: len(units)]
            if not is_ours:
                lease.lost.set()
                lease.pending.clear()
            if not lease.pending:
                self._unwritten.pop(lease.owner, None)
                lease.written.set()

    async def end(self, response: ResponseObject) -> bool:
        """End a run from outside it, as the response says. False if it had ended. Raises what Redis raises."""
        event = typed_event("response.incomplete", {"type": "response.incomplete", "response": response})
        head = event.removesuffix(b"}\n\n") + b',"sequence_number":'
        arguments: list[str | bytes | int] = [response.id, response.status, msgspec.json.encode(response)]
        arguments += [ENDED_TTL_S, head, b"}\n\n", msgspec.msgpack.encode([])]
        keys = [self._store.key(response.id), self._store.events_key(response.id), self._store.runs_key]
        return bool(await self._cancel(keys=keys, args=arguments))

    async def replay(self, response_id: str) -> tuple[int, list[Tokens]]:
        """What an earlier owner wrote: how many events, and the tokens behind them. Raises what Redis raises."""
        entries: Any = await self._store.redis.xrange(self._store.events_key(response_id))
        tokens: list[Tokens] = []
        num_events = 0
        for entry_id, fields in entries:
            num_events = _number(entry_id) + 1
            tokens += _tokens.decode(as_bytes(fields[b"tokens"]))
        return num_events, tokens

    async def follow(self, response_id: str, *, after: int) -> AsyncIterator[bytes]:
        """Events from number `after + 1` on, as first written, to the end of the run.

        Raises: Unavailable when Redis stays away, or the events are no longer kept.
        """
        redis, events_key = self._store.redis, self._store.events_key(response_id)
        patience_s = PATIENCE_S
        is_over = False
        while True:
            try:
                # The first look, and the one after the end, do not wait
                place: dict[Any, Any] = {events_key: f"1-{after}" if after >= 0 else "0"}
                answer: Any = await redis.xread(place, count=READ_COUNT)
                if not answer and not is_over:
                    status = await redis.hget(self._store.key(response_id), "status")
                    is_over = status is None or as_bytes(status).decode() not in LIVE
                    if is_over:
                        continue
                    answer = await redis.xread(place, count=READ_COUNT, block=BLOCK_MS)
            except UNAVAILABLE as error:
                if patience_s <= 0:
                    raise away() from error
                patience_s -= RETRY_S
                await asyncio.sleep(RETRY_S)
                continue
            patience_s = PATIENCE_S
            for _, entries in answer or ():
                for entry_id, fields in entries:
                    last = _number(entry_id)
                    yield _after(as_bytes(fields[b"events"]), num_skipped=after + 1 - (last - int(fields[b"n"]) + 1))
                    after = last
            if is_over and not answer:
                return


def _number(entry_id: bytes | str) -> int:
    return int(as_bytes(entry_id).rpartition(b"-")[2])


def _after(events: bytes, *, num_skipped: int) -> bytes:
    """Whole events without the first `num_skipped`. An event ends in an empty line, and JSON has none inside."""
    return b"\n\n".join(events.split(b"\n\n")[num_skipped:]) if num_skipped > 0 else events
