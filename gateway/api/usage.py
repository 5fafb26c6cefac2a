"""`/v1/usage`: what API keys have used."""

from __future__ import annotations

import time
from typing import Annotated, Literal

import msgspec
from litestar import Response
from litestar.params import QueryParameter

from fleet.redis_client import UNAVAILABLE
from fleet.usage import BUCKETS, UsageRow, bucketed, of_key, span
from gateway.api.context import Api, caller_key
from gateway.api.documentation import answers
from gateway.api.replies import AnyRequest, json_reply
from gateway.api.routes import readable
from gateway.errors import InvalidRequest, NotAllowed, Unavailable


class UsageEntry(msgspec.Struct):
    """The counts of one key and model in the bucket that begins at `start`; `key_id` is null where no key was asked."""

    start: int
    key_id: str | None
    model: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    total_tokens: int


class UsageReport(msgspec.Struct):
    """Answer of `/v1/usage`. Times are Unix seconds; buckets are aligned to UTC, and empty ones left out."""

    start: int
    end: int
    bucket: str
    data: list[UsageEntry]
    object: Literal["usage"] = "usage"


@readable(
    "/v1/usage",
    summary="Tokens and requests per key, model and hour",
    tags=["Baton"],
    responses=answers(UsageReport, 403),
)
async def list_usage(
    request: AnyRequest,
    api: Api,
    from_time: Annotated[
        str | None, QueryParameter(name="from", description="Unix seconds or ISO 8601; default: 24 hours before `to`")
    ] = None,
    to_time: Annotated[str | None, QueryParameter(name="to", description="likewise; default: now")] = None,
    bucket: Annotated[str | None, QueryParameter(name="bucket", description="hour (the default) or day")] = None,
    key_id: Annotated[str | None, QueryParameter(name="key_id", description="of this key alone")] = None,
) -> Response[bytes]:
    """A key sees its own usage; an admin key, and anybody on an open server, everybody's."""
    bucket = bucket or "hour"
    if bucket not in BUCKETS:
        raise InvalidRequest("'bucket' is hour or day.", param="bucket", code="invalid_value")
    try:
        from_s, to_s = span(from_time, to_time, now_s=time.time())
    except ValueError as error:
        name, problem = error.args
        raise InvalidRequest(f"{name!r} {problem}.", param=name, code="invalid_value") from error
    key = caller_key(request)
    if key is not None and not key.admin:
        if key_id not in (None, key.key_id):
            raise NotAllowed("This API key may see its own usage alone.", param="key_id")
        key_id = key.key_id
    try:
        rows = await api.usage.read(from_s, to_s)
    except UNAVAILABLE as error:
        raise Unavailable("Usage cannot be read at the moment.", retry_after_s=1) from error
    entries = [_entry(row) for row in bucketed(of_key(rows, key_id), BUCKETS[bucket])]
    return json_reply(UsageReport(from_s, to_s, bucket, entries))


def _entry(row: UsageRow) -> UsageEntry:
    counts = row.counts
    return UsageEntry(
        start=row.start_s,
        key_id=row.key_id or None,
        model=row.model,
        requests=counts.requests,
        prompt_tokens=counts.prompt_tokens,
        cached_tokens=counts.cached_tokens,
        completion_tokens=counts.completion_tokens,
        total_tokens=counts.prompt_tokens + counts.completion_tokens,
    )
