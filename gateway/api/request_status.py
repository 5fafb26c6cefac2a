"""`GET /v1/requests/{id}`: where a request is and where it has been, from Redis, so that any gateway can answer."""

from __future__ import annotations

from typing import Protocol

from litestar import Response
from litestar.di import NamedDependency
from litestar.params import FromPath, SkipValidation

from fleet.redis_client import UNAVAILABLE
from fleet.request_status import RequestStatus
from gateway.api.context import require_admin
from gateway.api.documentation import answers
from gateway.api.replies import AnyRequest, json_reply
from gateway.api.routes import readable
from gateway.errors import Unavailable, UnknownRequest

MAX_ID_CHARS = 128


class RequestStatuses(Protocol):
    """Where requests are remembered."""

    async def read(self, request_id: str) -> RequestStatus | None:
        """The request, or None if it is unknown. Raises: what Redis raises while it is away."""
        ...


class NoStatuses:
    """Remembers nothing; for an application without Redis."""

    async def read(self, request_id: str) -> RequestStatus | None:  # noqa: ARG002 - see the Protocol
        """None."""
        return None


Statuses = NamedDependency[SkipValidation[RequestStatuses]]


@readable(
    "/v1/requests/{request_id:str}",
    summary="Where a request is and has been",
    tags=["Baton"],
    responses=answers(RequestStatus),
)
async def request_status(request: AnyRequest, statuses: Statuses, request_id: FromPath[str]) -> Response[bytes]:
    """State, workers, times, token counts and hops of a live or lately ended request; needs an admin key, if any.

    The id is the one in the answer (`chatcmpl-…`); further samples of an answer have it with `-1`, `-2`, … behind.
    """
    require_admin(request)
    if len(request_id) > MAX_ID_CHARS:
        raise UnknownRequest(request_id[:MAX_ID_CHARS])
    try:
        status = await statuses.read(request_id)
    except UNAVAILABLE as error:
        raise Unavailable("Redis is away, where requests are remembered.", retry_after_s=1) from error
    if status is None:
        raise UnknownRequest(request_id)
    return json_reply(status, headers={"cache-control": "no-store"})
