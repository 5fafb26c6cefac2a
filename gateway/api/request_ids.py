"""`x-request-id`: taken from the client where it is harmless, else made; on every answer."""

from __future__ import annotations

import re
import uuid

from litestar.types import Message, Scope

HEADER = b"x-request-id"
ACCEPTED = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}\Z")


def request_id_of(scope: Scope) -> str:
    """The id of this HTTP request, the same on every call for one scope."""
    state = scope["state"]
    known = state.get("x_request_id")
    if known is None:
        sent = next((value for name, value in scope["headers"] if name == HEADER), b"")
        known = sent.decode("ascii") if ACCEPTED.match(sent) else f"req_{uuid.uuid4().hex}"
        state["x_request_id"] = known
    return str(known)


async def add_request_id(message: Message, scope: Scope) -> None:
    """A Litestar `before_send` hook. Mutates: the headers of the response's start."""
    if message["type"] == "http.response.start":
        headers = [header for header in message["headers"] if header[0].lower() != HEADER]
        message["headers"] = [*headers, (HEADER, request_id_of(scope).encode("ascii"))]
