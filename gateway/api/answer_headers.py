"""Headers that answers carry whatever becomes of the request: `x-request-id`, and what handlers note on the way.

The id is the client's own where it is harmless, from the header or from the body, else made here.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping

from litestar.types import Message, Scope

from gateway.errors import InvalidRequest

HEADER = b"x-request-id"
REQUEST_ID = r"^[A-Za-z0-9._:/+=-]{1,128}$"
_ACCEPTED = re.compile(REQUEST_ID.removesuffix("$") + r"\Z")  # `$` alone would let a line break through
_ID_STATE = "x_request_id"
_NOTED_STATE = "answer_headers"


def request_id_of(scope: Scope) -> str:
    """The id of this HTTP request, the same on every call for one scope."""
    state = scope["state"]
    known = state.get(_ID_STATE)
    if known is None:
        sent = next((value for name, value in scope["headers"] if name == HEADER), b"").decode("latin-1")
        known = state[_ID_STATE] = sent if _ACCEPTED.match(sent) else f"req_{uuid.uuid4().hex}"
    return str(known)


def name_request(scope: Scope, request_id: str | None) -> None:
    """Take the id that the body gives, if it gives one. Raises: InvalidRequest."""
    if request_id is None:
        return
    if not _ACCEPTED.match(request_id):
        raise InvalidRequest("'request_id' may not hold a line break.", param="request_id", code="invalid_value")
    scope["state"][_ID_STATE] = request_id


def note_headers(scope: Scope, headers: Mapping[str, str]) -> None:
    """Have the answer carry these headers, be it a success, an error or a stream."""
    scope["state"].setdefault(_NOTED_STATE, {}).update(headers)


async def add_headers(message: Message, scope: Scope) -> None:
    """A Litestar `before_send` hook. Mutates: the headers of the response's start."""
    if message["type"] != "http.response.start":
        return
    own = [(HEADER, request_id_of(scope).encode("ascii"))]
    own += [(name.encode(), value.encode()) for name, value in scope["state"].get(_NOTED_STATE, {}).items()]
    replaced = {name for name, _ in own}
    message["headers"] = [*(header for header in message["headers"] if header[0].lower() not in replaced), *own]
