"""Reading back what gateways write of requests: for operators, and for any gateway to answer with."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from fleet.hops import Hop, decode_hops
from fleet.redis_client import Redis, as_bytes
from fleet.types import RequestState


class RequestStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A request as Redis knows it, live or ended lately. It lags by some milliseconds and holds no text.

    Attributes:
        created, updated, first_token: Unix times in seconds.
        output_tokens: at the last change of state; counted to the end once it has ended.
        replay_reason: of the latest replay.
    """

    id: str
    state: RequestState
    epoch: int
    created: float
    updated: float
    model: str | None = None
    gateway: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    first_token: float | None = None
    prefill_worker: str | None = None
    decode_worker: str | None = None
    transport: str | None = None
    finish_reason: str | None = None
    replay_reason: str | None = None
    hops: list[Hop] = []


_PLAIN_FIELDS = frozenset(RequestStatus.__struct_fields__) - {"id", "hops"}


class RequestStatusReader:
    """Reads `{namespace}:request:{request_id}`."""

    def __init__(self, redis: Redis, *, namespace: str) -> None:
        self._redis = redis
        self._namespace = namespace

    async def read(self, request_id: str) -> RequestStatus | None:
        """The request, or None if it is unknown or ended too long ago. Raises: what Redis raises."""
        stored = await self._redis.hgetall(f"{self._namespace}:request:{request_id}")
        return _status(request_id, {as_bytes(name).decode(): as_bytes(value) for name, value in stored.items()})


def _status(request_id: str, fields: Mapping[str, bytes]) -> RequestStatus | None:
    known: dict[str, object] = {"id": request_id, "hops": decode_hops(fields.get("hops", b"[]"))}
    known |= {name: raw.decode() for name, raw in fields.items() if name in _PLAIN_FIELDS}
    try:
        return msgspec.convert(known, RequestStatus, strict=False)
    except msgspec.ValidationError:
        return None
