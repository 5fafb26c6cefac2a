"""HTTP/1.1 with the clock read as close to the socket as Python allows.

The general HTTP clients queue each piece of a body for a task to pick up, so a chunk's time would include
the wait for that task. Here the event loop's read callback takes the time first and hands each piece of the
body, with that time, to a :class:`Sink`; the parsing itself is llhttp's (``httptools``).
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Protocol, cast

import httptools

from loadtest.errors import BadAnswer, ConnectFailed, ConnectionBroken, ExchangeError

Clock = Callable[[], float]
"""A monotonic clock, seconds."""

# Servers commonly drop a connection after 5 idle seconds; reusing one just then would fail a request for
# the client's own reason.
_MAX_IDLE_S = 2.0


class Sink(Protocol):
    """Takes one answer. Called from the read callback: must be quick and must not raise."""

    def on_head(self, status: int, headers: dict[str, str], at_s: float) -> None:
        """Status and headers (names in lower case) have come at clock time ``at_s``."""

    def on_body(self, data: bytes, at_s: float) -> None:
        """A piece of the body has come, transfer coding removed."""


class Connection(asyncio.Protocol):
    """One connection; carries one exchange at a time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._sink: Sink | None = None
        self._done: asyncio.Future[None] | None = None
        self._headers: dict[str, str] = {}
        self._at_s = 0.0
        self._in_body = False
        self.reusable = True
        self.idle_since_s = 0.0

    async def exchange(self, request: bytes, sink: Sink) -> None:
        """Send ``request`` (head and body) and feed the answer to ``sink`` until it is whole.

        A cancelled exchange closes the connection, which is how the server learns that its client left.
        Raises: ConnectionBroken, BadAnswer.
        """
        if self._transport is None or not self.reusable:
            raise ConnectionBroken("the connection closed before the request was sent")
        self._parser = httptools.HttpResponseParser(self)
        self._sink = sink
        self._headers = {}
        self._in_body = False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._done
        except BaseException:
            self.close()
            raise
        finally:
            self._sink = None
            self.idle_since_s = self._clock()

    def close(self) -> None:
        """Drop the connection at once. Idempotent."""
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Read the clock, then parse."""
        self._at_s = self._clock()
        if self._sink is None:
            self.close()  # bytes that nobody asked for
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(BadAnswer(f"not an HTTP answer: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Finish a body that ends with the connection; fail any other exchange in progress."""
        self.reusable = False
        until_close = "content-length" not in self._headers and "chunked" not in self._headers.get(
            "transfer-encoding", ""
        )
        if exc is None and self._in_body and until_close:
            self._finish()
        else:
            reason = f" ({exc})" if exc else ""
            self._fail(ConnectionBroken(f"the server closed the connection mid-answer{reason}"))

    # What httptools calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect one header; a repeated one keeps its last value."""
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Hand over the head, unless it is an interim (1xx) one."""
        status = self._parser.get_status_code()
        if status >= 200 and self._sink is not None:
            self._in_body = True
            self._sink.on_head(status, self._headers, self._at_s)

    def on_body(self, body: bytes) -> None:
        """Hand over a piece of the body."""
        if self._sink is not None:
            self._sink.on_body(body, self._at_s)

    def on_message_complete(self) -> None:
        """End the exchange, unless this was an interim answer."""
        if not self._in_body:
            self._headers = {}
            return
        self.reusable = self.reusable and self._parser.should_keep_alive()
        self._finish()

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _fail(self, error: ExchangeError) -> None:
        self.reusable = False
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


class Pool:
    """Connections to one server, as many as are needed at once; kept open between requests."""

    def __init__(
        self, host: str, port: int, tls: ssl.SSLContext | None, clock: Clock, *, connect_timeout_s: float
    ) -> None:
        self._host = host
        self._port = port
        self._tls = tls
        self._clock = clock
        self._connect_timeout_s = connect_timeout_s
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()

    async def send(self, request: bytes, sink: Sink) -> None:
        """Carry out one exchange on an idle connection, or on a new one.

        Raises: ConnectFailed, ConnectionBroken, BadAnswer.
        """
        connection = self._take() or await self._connect()
        self._open.add(connection)
        try:
            await connection.exchange(request, sink)
        finally:
            if connection.reusable:
                self._idle.append(connection)
            else:
                connection.close()
                self._open.discard(connection)

    def close(self) -> None:
        """Drop every connection."""
        for connection in self._open:
            connection.close()
        self._open.clear()
        self._idle.clear()

    def _take(self) -> Connection | None:
        # Last in, first out: the rest grow old and are dropped.
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and self._clock() - connection.idle_since_s < _MAX_IDLE_S:
                return connection
            connection.close()
            self._open.discard(connection)
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: Connection(self._clock), self._host, self._port, ssl=self._tls
                )
        except TimeoutError as error:
            raise ConnectFailed(f"no connection within {self._connect_timeout_s:g} s") from error
        except OSError as error:
            raise ConnectFailed(error.strerror or str(error)) from error
        return connection
