"""Background responses of this gateway: started here, or taken over from a gateway that vanished."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from litestar import Litestar

from fleet.keys import ApiKey
from fleet.logs import get_logger
from fleet.redis_client import UNAVAILABLE, as_bytes
from fleet.scripts import lua
from gateway.api.context import ApiContext
from gateway.api.requests import ChatCompletionRequest
from gateway.api.responses_api.background_run import BackgroundRun
from gateway.api.responses_api.event_log import LIVE_TTL_S, EventLog, Lease
from gateway.api.responses_api.narrator import Narrator
from gateway.api.responses_api.objects import ResponseObject
from gateway.api.responses_api.prepare import Plan
from gateway.api.responses_api.store import ResponseStore, StoredResponse, away
from gateway.errors import GenerationFailed, Overloaded, Unavailable

CLAIM_AT_ONCE = 8
MAX_LIVES = 5
"""A response whose gateways vanished this often is suspected of bringing them down, and fails."""

_log = get_logger("responses")
_chat = msgspec.json.Decoder(ChatCompletionRequest)
_key = msgspec.msgpack.Decoder(ApiKey | None)
_response = msgspec.json.Decoder(ResponseObject)


class BackgroundRuns:
    """Holds runs under leases in Redis. `lifespan` is entered by the application; all runs are tasks of its group.

    Args:
        lease_s: a gateway that is silent so long loses its runs to another one.
    """

    def __init__(self, api: ApiContext, store: ResponseStore, *, lease_s: float) -> None:
        self._api = api
        self._store = store
        self._lease_ms = int(lease_s * 1000)
        self.log = EventLog(store, lease_ms=self._lease_ms)
        self._renew = store.redis.register_script(lua("response_renew"))
        self._claim = store.redis.register_script(lua("response_claim"))
        self._held: dict[asyncio.Task[None], Lease] = {}
        self._group: asyncio.TaskGroup | None = None

    @asynccontextmanager
    async def lifespan(self, _: Litestar) -> AsyncIterator[None]:
        """Run what is held until the application stops; then leave it to other gateways, or to the next start."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            keepers = [group.create_task(self.log.run()), group.create_task(self._keep())]
            try:
                yield
            finally:
                self._group = None
                leases = list(self._held.values())
                for task in (*keepers, *self._held):
                    task.cancel()
        try:
            await self.log.flush()
            await self._renew_all(leases, lease_ms=0)
        except UNAVAILABLE as error:
            _log.warning("could not let go of responses, their leases will run out", error=str(error))

    async def start(self, plan: Plan, key: ApiKey | None) -> bytes:
        """Keep a response as queued and begin to compute it. Returns its JSON.

        Raises: Overloaded with too many under way; Unavailable while Redis is away.
        """
        if len(self._held) >= self._api.config.max_generations:
            raise Overloaded(f"{len(self._held)} background responses are under way already", retry_after_s=5)
        response, store = plan.response, self._store
        lease = Lease(response.id, f"{secrets.token_hex(8)}/{response.id}")
        events = Narrator(response, None).created()
        num_events = events.count(b"\n\n")
        body = msgspec.json.encode(response)
        fields = store.fields(response, body=body, items=plan.items, ancestors=plan.ancestors, key=key)
        fields |= {
            "owner": lease.owner,
            "lives": 1,
            "streams": int(bool(plan.chat.stream)),
            "request": msgspec.json.encode(plan.chat),
            "api_key": msgspec.msgpack.encode(key),
        }
        events_key = store.events_key(response.id)
        entry: dict[Any, Any] = {
            "n": num_events,
            "events": events,
            "tokens": msgspec.msgpack.encode([]),
        }
        pipe = store.redis.pipeline(transaction=True)
        pipe.hset(store.key(response.id), mapping=fields)
        pipe.expire(store.key(response.id), store.ttl_s)
        pipe.xadd(events_key, entry, id=f"1-{num_events - 1}")
        pipe.expire(events_key, LIVE_TTL_S)
        await self._renew(keys=self._keys(lease), args=self._renewal(lease, self._lease_ms), client=pipe)
        try:
            await pipe.execute()
        except UNAVAILABLE as error:
            raise away() from error
        self._spawn(
            BackgroundRun(
                self._api,
                self.log,
                lease,
                response=response,
                chat=plan.chat,
                key=key,
                job=plan.job,
                num_events=num_events,
            )
        )
        return body

    async def cancel(self, stored: StoredResponse) -> bool:
        """End a run, wherever it is; False if it had ended. Raises: Unavailable while Redis is away."""
        try:
            return await self.log.end(msgspec.structs.replace(stored.response, status="cancelled"))
        except UNAVAILABLE as error:
            raise away() from error
        finally:
            for lease in self._held.values():
                if lease.response_id == stored.response.id:
                    lease.lost.set()

    def _spawn(self, run: BackgroundRun) -> None:
        if self._group is None:
            raise Unavailable("The gateway is shutting down.", retry_after_s=1)
        task = self._group.create_task(run.serve())
        self._held[task] = run.lease
        task.add_done_callback(self._held.pop)

    async def _keep(self) -> None:
        """Renew leases and look for runs that nobody holds; until cancelled."""
        is_away = False
        while True:
            try:
                await self._renew_all(list(self._held.values()), lease_ms=self._lease_ms)
                await self._take_over()
                is_away = False
            except UNAVAILABLE as error:
                if not is_away:
                    _log.warning("Redis is away, leases of responses cannot be renewed", error=str(error))
                is_away = True
            await asyncio.sleep(self._lease_ms / 3_000)

    def _keys(self, lease: Lease) -> list[str]:
        return [self._store.key(lease.response_id), self._store.runs_key]

    def _renewal(self, lease: Lease, lease_ms: int) -> list[str | bytes | int]:
        return [lease.owner, lease.response_id, lease_ms]

    async def _renew_all(self, leases: list[Lease], *, lease_ms: int) -> None:
        pipe = self._store.redis.pipeline(transaction=False)
        for lease in leases:
            await self._renew(keys=self._keys(lease), args=self._renewal(lease, lease_ms), client=pipe)
        for lease, is_ours in zip(leases, await pipe.execute(), strict=True):
            if not is_ours:
                lease.lost.set()

    async def _take_over(self) -> None:
        if len(self._held) >= self._api.config.max_generations:
            return
        token = secrets.token_hex(8)
        arguments: list[str | bytes | int] = [token, self._lease_ms, CLAIM_AT_ONCE, self._store.key("")]
        for raw in await self._claim(keys=[self._store.runs_key], args=arguments):
            response_id = as_bytes(raw).decode()
            _log.info("background response taken over", id=response_id)
            try:
                self._spawn(await self._adopt(Lease(response_id, f"{token}/{response_id}")))
            except (msgspec.DecodeError, TypeError) as error:  # deleted just now, or another version's
                _log.error("background response cannot be taken over", id=response_id, error=str(error))
                await self._store.redis.zrem(self._store.runs_key, response_id)

    async def _adopt(self, lease: Lease) -> BackgroundRun:
        """The run of a response that another gateway held. Raises what Redis raises: the next claim tries again."""
        names = ["response", "request", "api_key", "lives"]
        stored: list[Any] = await self._store.redis.hmget(self._store.key(lease.response_id), names)
        response, chat, key, lives = stored
        num_events, tokens = await self.log.replay(lease.response_id)
        return BackgroundRun(
            self._api,
            self.log,
            lease,
            response=_response.decode(response),
            chat=_chat.decode(chat),
            key=_key.decode(key),
            num_events=num_events,
            tokens=tokens,
            fails=GenerationFailed("The gateways that computed this response vanished.")
            if int(lives) > MAX_LIVES
            else None,
        )
