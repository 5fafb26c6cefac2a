"""uvicorn's HTTP protocol with bounds on what arrives before the application sees it.

httptools reads heads of any size for as long as a client likes. Here a head is at most `MAX_HEAD_BYTES` long, and both
head and whole request have a time by which they must be there; bodies are bounded in size by the application.
"""

from __future__ import annotations

import asyncio
from typing import cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
HEAD_S = 20.0
REQUEST_S = 300.0


class BoundedHttp(HttpToolsProtocol):
    """One connection. Too long a head gets 400, too slow a request gets 408, and both are closed."""

    head_s = HEAD_S
    request_s = REQUEST_S
    _head_len = 0
    _in_head = True
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Expect the first head."""
        super().connection_made(cast("asyncio.Transport", transport))
        self._expect_within(self.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is expected any more."""
        self._expect_nothing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, and refuse a head that does not end."""
        if self._in_head:
            self._head_len += len(data)
        super().data_received(data)
        if self._in_head and self._head_len > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._expect_nothing()
            self.send_400_response(f"Request line and headers are longer than {MAX_HEAD_BYTES} bytes.")

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._in_head = True
        self._expect_within(self.head_s)

    def on_headers_complete(self) -> None:
        """Refuse a long head that came in one piece; then the body has its time. Raises: ValueError."""
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            raise ValueError("the head is too long")  # httptools makes a parser error of it, uvicorn a 400
        self._in_head = False
        self._head_len = 0
        self._expect_within(self.request_s)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """All of the request is there; keep-alive has uvicorn's timeout."""
        self._expect_nothing()
        super().on_message_complete()

    def _expect_within(self, seconds: float) -> None:
        self._expect_nothing()
        self._deadline = self.loop.call_later(seconds, self._late)

    def _expect_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        answering = self.cycle is not None and not self.cycle.response_complete
        if self.pipeline or (self._in_head and answering):  # an earlier request on this connection has its answer first
            self._expect_within(self.head_s)
            return
        if self._in_head:
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()
