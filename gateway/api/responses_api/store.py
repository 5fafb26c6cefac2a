"""Responses in Redis: what can be retrieved and continued. The keys are catalogued in `docs/redis.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from fleet.keys import ApiKey
from fleet.redis_client import UNAVAILABLE, Redis, as_bytes
from gateway.api.responses_api.items import Item
from gateway.api.responses_api.objects import ResponseObject
from gateway.errors import Unavailable

_response = msgspec.json.Decoder(ResponseObject)
_items = msgspec.json.Decoder(list[Item])
_encode = msgspec.json.encode


class StoredResponse(msgspec.Struct, kw_only=True):
    """What lies in Redis of one response.

    Attributes:
        response: as it stands.
        body: the same as JSON, byte for byte what its creator was sent.
        items: its own input, with ids.
        ancestors: ids of the responses before it, oldest first.
        streams: made with `background` and `stream`, so its events can be read again.
    """

    response: ResponseObject
    body: bytes
    items: list[Item]
    ancestors: list[str]
    streams: bool = False


class ResponseStore:
    """Reads and writes responses.

    Args:
        ttl_s: how long a response is kept after its last use: being made, or being continued.
    """

    def __init__(self, redis: Redis, *, namespace: str, ttl_s: int) -> None:
        self.redis = redis
        self.ttl_s = ttl_s
        self._namespace = namespace

    def key(self, response_id: str) -> str:
        """The hash of a response."""
        return f"{self._namespace}:response:{response_id}"

    def events_key(self, response_id: str) -> str:
        """The stream of a background response's events."""
        return f"{self._namespace}:response_events:{response_id}"

    @property
    def runs_key(self) -> str:
        """The sorted set of background responses under way, by the end of their lease."""
        return f"{self._namespace}:response_runs"

    async def save(
        self, response: ResponseObject, *, items: Sequence[Item], ancestors: Sequence[str], key: ApiKey | None
    ) -> bytes:
        """Keep a finished response; returns its JSON. Raises what Redis raises."""
        body = _encode(response)
        pipe = self.redis.pipeline(transaction=True)
        fields = self.fields(response, body=body, items=items, ancestors=ancestors, key=key)
        pipe.hset(self.key(response.id), mapping=fields)
        pipe.expire(self.key(response.id), self.ttl_s)
        await pipe.execute()
        return body

    def fields(
        self,
        response: ResponseObject,
        *,
        body: bytes,
        items: Sequence[Item],
        ancestors: Sequence[str],
        key: ApiKey | None,
    ) -> dict[Any, Any]:
        """The fields of a response's hash that every response has."""
        return {
            "key_id": owner_id(key),
            "status": response.status,
            "response": body,
            "items": _encode(items),
            "ancestors": " ".join(ancestors),
        }

    async def get(self, response_id: str, key: ApiKey | None) -> StoredResponse | None:
        """A response of this key's own, else None. Raises: Unavailable while Redis is away."""
        try:
            found = await self.redis.hgetall(self.key(response_id))
        except UNAVAILABLE as error:
            raise away() from error
        stored = _fields(found)
        if not stored or stored["key_id"].decode() != owner_id(key):
            return None
        return _stored(stored)

    async def chain(self, last: StoredResponse) -> list[StoredResponse | None]:
        """All that came before a response, and itself, oldest first; None where one is gone.

        They are kept longer, since they are in use. Raises: Unavailable while Redis is away.
        """
        pipe = self.redis.pipeline(transaction=False)
        for response_id in last.ancestors:
            pipe.hgetall(self.key(response_id))
        for response_id in [*last.ancestors, last.response.id]:
            pipe.expire(self.key(response_id), self.ttl_s)
        try:
            answers = await pipe.execute()
        except UNAVAILABLE as error:
            raise away() from error
        found = [_fields(raw) for raw in answers[: len(last.ancestors)]]
        return [*[_stored(one) if one else None for one in found], last]

    async def delete(self, response_id: str) -> None:
        """Forget a response and its events; a run of it stops. Raises: Unavailable while Redis is away."""
        pipe = self.redis.pipeline(transaction=True)
        pipe.delete(self.key(response_id), self.events_key(response_id))
        pipe.zrem(self.runs_key, response_id)
        try:
            await pipe.execute()
        except UNAVAILABLE as error:
            raise away() from error


def owner_id(key: ApiKey | None) -> str:
    """Whose a response is: the key's, or everybody's on an open server."""
    return "" if key is None else key.key_id


def away() -> Unavailable:
    """What a client hears while Redis cannot be asked."""
    return Unavailable("Stored responses cannot be reached at the moment.", retry_after_s=1)


def _fields(raw: Mapping[Any, Any]) -> dict[str, bytes]:
    return {as_bytes(name).decode(): as_bytes(value) for name, value in raw.items()}


def _stored(fields: Mapping[str, bytes]) -> StoredResponse:
    return StoredResponse(
        response=_response.decode(fields["response"]),
        body=fields["response"],
        items=_items.decode(fields["items"]),
        ancestors=fields["ancestors"].decode().split(),
        streams=fields.get("streams") == b"1",
    )
