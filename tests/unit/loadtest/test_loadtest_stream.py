"""Server-sent events, OpenAI chunks and HTTP answers, cut in every awkward place."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from loadtest.chunks import StreamSink, message_of, parse_retry_after
from loadtest.connection import Pool
from loadtest.errors import BadAnswer, ConnectFailed, ConnectionBroken
from loadtest.record import Tally
from loadtest.sse import MAX_EVENT_BYTES, Event, SseParser

STREAM = (
    "\ufeff: hello\n"
    'data: {"text": "né😀"}\n\n'
    "event: error\r\ndata: one\r\ndata:two\r\n\r\n"
    "id: 3\nretry: 9\n\n"
    ":\n\n"
    "data\n\n"
    "data: last\r\r"
).encode()
EVENTS = [
    Event("", '{"text": "né😀"}'.encode()),
    Event("error", b"one\ntwo"),
    Event("", b""),
    Event("", b"last"),
]


def feed(pieces: Iterator[bytes] | list[bytes]) -> list[Event]:
    parser = SseParser()
    return [event for piece in pieces for event in parser.feed(piece)]


def test_events_come_out_whole_however_they_are_cut() -> None:
    assert feed([STREAM]) == EVENTS
    for size in range(1, 12):
        assert feed(STREAM[at : at + size] for at in range(0, len(STREAM), size)) == EVENTS
    for cut in range(len(STREAM)):
        assert feed([STREAM[:cut], b"", STREAM[cut:]]) == EVENTS


def test_an_event_is_given_out_with_its_last_byte() -> None:
    parser = SseParser()
    assert parser.feed(b"data: a\n") == []
    assert parser.feed(b"\n") == [Event("", b"a")]
    assert parser.feed(b"data: b\r\n\r") == [Event("", b"b")]
    assert parser.feed(b"\ndata: c\n\n") == [Event("", b"c")]


def test_an_endless_event_is_refused() -> None:
    parser = SseParser()
    mebibyte = b"x" * 2**20
    for _ in range(MAX_EVENT_BYTES // len(mebibyte)):
        assert parser.feed(mebibyte) == []
    with pytest.raises(BadAnswer):
        parser.feed(mebibyte)


def streamed(*pieces: bytes, status: int = 200) -> StreamSink:
    sink = StreamSink(Tally())
    sink.on_head(status, {"content-type": "text/event-stream"}, 0.0)
    for number, piece in enumerate(pieces):
        sink.on_body(piece, float(number))
    return sink


def test_only_chunks_with_content_are_stamped() -> None:
    sink = streamed(
        b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n',
        b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n',
        b": keep-alive\n\n",
        b'data: {"choices": [{"delta": {"reasoning_content": "b"}}]}\n\ndata: {"choices": [{"text": "c"}]}\n\n',
        b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n',
        b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 9}}\n\ndata: [DONE]\n\n',
    )
    assert sink.content_at_s.tolist() == [1.0, 3.0, 3.0]
    assert (sink.finish_reason, sink.done, sink.failure, sink.fault()) == ("stop", True, None, None)
    assert sink.usage is not None
    assert (sink.usage.prompt_tokens, sink.usage.completion_tokens) == (7, 9)


@pytest.mark.parametrize(
    ("pieces", "broken", "words"),
    [
        ([b'event: error\ndata: {"error": {"message": "lost"}}\n\n'], False, "lost"),
        ([b'data: {"error": {"message": "gone", "code": 500}}\n\n'], False, "gone"),
        ([b'data: {"choices": [{"delta": {}, "finish_reason": "abort"}]}\n\n'], False, "abort"),
        ([b"data: {oops\n\n"], True, "unreadable"),
        ([b'data: {"choices": 3}\n\n'], True, "unreadable"),
        ([b'data: {"choices": [{"text": "\xff"}]}\n\n'], True, "unreadable"),
    ],
)
def test_a_stream_that_fails_says_why(pieces: list[bytes], broken: bool, words: str) -> None:
    sink = streamed(*pieces, b"data: [DONE]\n\n")
    assert sink.broken is broken
    assert sink.failure is not None
    assert words in sink.failure


def test_a_stream_without_end_is_not_whole() -> None:
    assert "finish reason" in (streamed(b'data: {"choices": [{"text": "a"}]}\n\n').fault() or "")
    assert "no server-sent events" in (streamed(b"{}").fault() or "")


def test_error_bodies() -> None:
    assert streamed(b'{"error": {"mess', b'age": "too long"}}', status=400).error_message() == "too long"
    assert message_of(b'{"detail": "nope"}') == "nope"
    assert message_of(b"<h1>Bad gateway</h1>") == "<h1>Bad gateway</h1>"


def test_retry_after_in_seconds_and_as_a_date() -> None:
    now = datetime(2026, 1, 5, 12, 0, 0, tzinfo=UTC)
    assert parse_retry_after("1.5", now) == 1.5
    assert parse_retry_after("Mon, 05 Jan 2026 12:00:30 GMT", now) == 30.0
    assert parse_retry_after("Mon, 05 Jan 2026 11:00:00 GMT", now) == 0.0
    assert parse_retry_after("soon", now) is None
    assert parse_retry_after("nan", now) is None


class Body:
    """A sink that keeps status and body."""

    def __init__(self) -> None:
        self.status = 0
        self.data = b""

    def on_head(self, status: int, headers: dict[str, str], at_s: float) -> None:  # noqa: ARG002
        self.status = status

    def on_body(self, data: bytes, at_s: float) -> None:  # noqa: ARG002
        self.data += data


async def exchange(answer: bytes, *, linger: bool = False) -> Body:
    """Ask a server that sends ``answer`` byte by byte and then hangs up, or with ``linger`` stays."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for byte in answer:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        if linger:
            await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    loop = asyncio.get_running_loop()
    pool = Pool("127.0.0.1", port, None, loop.time, connect_timeout_s=2)
    body = Body()
    async with asyncio.timeout(5), server:
        try:
            await pool.send(b"GET / HTTP/1.1\r\n\r\n", body)
        finally:
            pool.close()  # a server waits for its connections before it is closed
    return body


async def test_http_bodies_in_each_framing() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
    assert (await exchange(chunked, linger=True)).data == b"abc"
    counted = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 No\r\nContent-Length: 3\r\n\r\nabc"
    answer = await exchange(counted, linger=True)
    assert (answer.status, answer.data) == (404, b"abc")
    assert (await exchange(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nabc")).data == b"abc"


async def test_http_answers_that_are_none() -> None:
    with pytest.raises(BadAnswer):
        await exchange(b"SSH-2.0-OpenSSH_9.7\r\n")
    with pytest.raises(ConnectionBroken):
        await exchange(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n")
    with pytest.raises(ConnectionBroken):
        await exchange(b"")


async def test_a_closed_port_is_a_failed_connection() -> None:
    server = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    pool = Pool("127.0.0.1", port, None, asyncio.get_running_loop().time, connect_timeout_s=2)
    with pytest.raises(ConnectFailed):
        await pool.send(b"GET / HTTP/1.1\r\n\r\n", Body())
