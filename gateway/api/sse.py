"""Server-sent events: framing, and a response that starts with its first event.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import structlog
from litestar.response.base import ASGIResponse, Response
from litestar.types import Receive, Scope, Send

from gateway.api.client_watch import ClientGone
from gateway.api.replies import as_api_error, error_body
from gateway.errors import ApiError

DONE = b"data: [DONE]\n\n"
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}

# Line readers that follow Python's str.splitlines would break events at these
_LINE_BREAKS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}

_encode = msgspec.json.Encoder().encode


def json_text(text: str) -> bytes:
    """A string as JSON, without any character that some reader takes for the end of a line."""
    encoded = _encode(text)
    return encoded if text.isascii() else encoded.decode().translate(_LINE_BREAKS).encode()


def json_value(value: Any) -> bytes:
    """A value as JSON, like `json_text`."""
    encoded = _encode(value)
    return encoded if encoded.isascii() else encoded.decode().translate(_LINE_BREAKS).encode()


def typed_event(kind: str, value: Any) -> bytes:
    """One event with a name of its own, as OpenAI's Responses and Anthropic's Messages have them."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), json_value(value))


class EventStream:
    """The sending side of one stream. The response starts with the first `send`."""

    def __init__(self, send: Send, headers: dict[str, str]) -> None:
        self._send = send
        self._headers = {**HEADERS, **headers}
        self.started = False

    async def send(self, events: bytes) -> None:
        """Send whole events. Waits while the client reads slower than we write."""
        if not self.started:
            self.started = True
            await self._send(
                {
                    "type": "http.response.start",
                    "status": 200,
                    "headers": [(name.encode(), value.encode()) for name, value in self._headers.items()],
                }
            )
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def end(self, events: bytes) -> None:
        """Send the last events and close the body."""
        if not self.started:
            await self.send(b"")
        await self._send({"type": "http.response.body", "body": events, "more_body": False})


Producer = Callable[[EventStream, Receive], Awaitable[None]]
ErrorEvent = Callable[[ApiError], bytes]


def openai_error_event(error: ApiError) -> bytes:
    """An error amid a stream of chunks."""
    return b"data: " + json_value(error_body(error)) + b"\n\n"


class StreamedAnswer(Response[bytes]):
    """An answer in events, written by a producer.

    What the producer raises before its first event becomes an ordinary HTTP error; later, an error event that ends
    the stream, in the API's own shape (`error_event`). A client that leaves ends it in silence.
    """

    def __init__(
        self, producer: Producer, headers: dict[str, str], *, error_event: ErrorEvent = openai_error_event
    ) -> None:
        super().__init__(content=b"")
        self._producer = producer
        self._stream_headers = headers
        self._error_event = error_event

    def to_asgi_response(self, *_: Any, **__: Any) -> ASGIResponse:
        """Litestar's way from a response to something it can call."""
        return _AsgiStream(self._producer, self._stream_headers, self._error_event)


class _AsgiStream(ASGIResponse):
    """Serves one stream."""

    __slots__ = ("_error_event", "_producer", "_stream_headers")

    def __init__(self, producer: Producer, headers: dict[str, str], error_event: ErrorEvent) -> None:
        super().__init__()
        self._error_event = error_event
        self._producer = producer
        self._stream_headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = EventStream(send, self._stream_headers)
        try:
            await self._producer(stream, receive)
        except ClientGone:
            return
        except Exception as error:
            if not stream.started:
                raise
            if not isinstance(error, ApiError):
                structlog.get_logger("gateway.api").exception("stream failed", path=scope["path"])
            await stream.end(self._error_event(as_api_error(error)))
