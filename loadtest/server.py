"""The server under test as an address: paths, headers, small JSON questions."""

import asyncio
import ssl
from typing import Any
from urllib.parse import urlsplit

import msgspec

from loadtest import __version__
from loadtest.chunks import message_of
from loadtest.connection import Clock, Pool, Sink
from loadtest.errors import BadAnswer, ConnectFailed, ExchangeError, ServerUnreachable
from loadtest.settings import Settings

_CONNECT_TIMEOUT_S = 10.0
_JSON_TIMEOUT_S = 30.0


class JsonAnswer(msgspec.Struct, frozen=True):
    """A status and the decoded body (None where it is not JSON)."""

    status: int
    body: Any
    message: str


class _WholeBody:
    """A sink that keeps the body."""

    def __init__(self) -> None:
        self.status = 0
        self.body = bytearray()

    def on_head(self, status: int, headers: dict[str, str], at_s: float) -> None:  # noqa: ARG002
        self.status = status

    def on_body(self, data: bytes, at_s: float) -> None:  # noqa: ARG002
        self.body += data


class Server:
    """Knows how to address the server and how to sign a request; owns the connections.

    ``base`` is the path of ``--url`` without a trailing slash, ``/v1`` where the address has none.
    """

    def __init__(self, settings: Settings, clock: Clock) -> None:
        parts = urlsplit(settings.url)
        secure = parts.scheme == "https"
        self.base = parts.path.rstrip("/") or "/v1"
        self.root = self.base.removesuffix("/v1")
        self.address = f"{parts.scheme}://{parts.netloc}"
        headers = {
            "Host": parts.netloc,
            "User-Agent": f"baton-loadtest/{__version__}",
            "Accept-Encoding": "identity",
        }
        if settings.api_key is not None:
            headers["Authorization"] = f"Bearer {settings.api_key}"
        headers.update(settings.headers)
        self._head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._pool = Pool(
            parts.hostname or "",  # never empty: the settings have checked it
            parts.port or (443 if secure else 80),
            ssl.create_default_context() if secure else None,
            clock,
            connect_timeout_s=min(_CONNECT_TIMEOUT_S, settings.timeout_s),
        )

    def post_bytes(self, path: str, body: bytes) -> bytes:
        """Return a whole POST request, ready for the socket."""
        head = (
            f"POST {path} HTTP/1.1\r\n{self._head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode("latin-1") + body

    async def send(self, request: bytes, sink: Sink) -> None:
        """Carry out one exchange. Raises: ExchangeError."""
        await self._pool.send(request, sink)

    async def get_json(self, path: str) -> JsonAnswer:
        """GET ``path``. Raises: ServerUnreachable, ExchangeError."""
        return await self._json(f"GET {path} HTTP/1.1\r\n{self._head}\r\n".encode("latin-1"))

    async def post_json(self, path: str, body: Any) -> JsonAnswer:
        """POST ``body`` as JSON to ``path``. Raises: ServerUnreachable, ExchangeError."""
        return await self._json(self.post_bytes(path, msgspec.json.encode(body)))

    async def get_text(self, path: str) -> str | None:
        """GET ``path`` as text, None unless it is answered with 200. Raises: ExchangeError, TimeoutError."""
        sink = _WholeBody()
        async with asyncio.timeout(_JSON_TIMEOUT_S):
            await self.send(f"GET {path} HTTP/1.1\r\n{self._head}\r\n".encode("latin-1"), sink)
        return sink.body.decode("utf-8", "replace") if sink.status == 200 else None

    def close(self) -> None:
        """Drop the connections."""
        self._pool.close()

    async def _json(self, request: bytes) -> JsonAnswer:
        sink = _WholeBody()
        try:
            async with asyncio.timeout(_JSON_TIMEOUT_S):
                await self.send(request, sink)
        except ConnectFailed as error:
            raise ServerUnreachable(self.address + self.base, str(error)) from error
        except TimeoutError as error:
            raise ExchangeError(f"no answer within {_JSON_TIMEOUT_S:g} s") from error
        body = bytes(sink.body)
        try:
            decoded = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeError):
            decoded = None
        if decoded is None and sink.status == 200:
            raise BadAnswer("the answer is not JSON")
        return JsonAnswer(sink.status, decoded, message_of(body))
