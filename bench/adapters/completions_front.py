"""The OpenAI completions API over an engine that has no server for concurrent streams: enough for the load test.

Standard library alone, since it runs in the peers' own environments. `POST /v1/completions` takes token ids and streams
server-sent events; `GET /v1/models` lists one model. Decoding is greedy and ends at `max_tokens`, like `ignore_eos`.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

MODEL = "bench"


@dataclass
class Request:
    """One prompt and where its tokens go; `emit` may be called from any thread, with None after the last."""

    prompt: list[int]
    max_tokens: int
    emit: Callable[[int | None], None]


class Engine(Protocol):
    """What serves requests."""

    def submit(self, request: Request) -> None:
        """Take a request; returns at once."""

    def run(self) -> None:
        """Compute until the process ends; called on a thread of its own."""


def serve(engine: Engine, port: int) -> None:
    """Serve on loopback until the process is ended."""
    threading.Thread(target=engine.run, daemon=True).start()
    asyncio.run(_serve(engine, port))


async def _serve(engine: Engine, port: int) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (head := await _read_head(reader)) is not None:
                await _answer(engine, writer, *head)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


async def _read_head(reader: asyncio.StreamReader) -> tuple[str, str, bytes] | None:
    """Method, path and body of the next request; None when the client has left."""
    line = await reader.readline()
    if not line:
        return None
    method, path, _ = line.decode("latin-1").split(" ", 2)
    length = 0
    while (header := (await reader.readline()).strip()) != b"":
        name, _, value = header.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    return method, path, await reader.readexactly(length)


async def _answer(engine: Engine, writer: asyncio.StreamWriter, method: str, path: str, body: bytes) -> None:
    if (method, path) == ("GET", "/v1/models"):
        _whole(writer, 200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
    elif (method, path) == ("POST", "/v1/completions"):
        asked = json.loads(body)
        if not isinstance(asked.get("prompt"), list):
            _whole(writer, 400, {"error": {"message": "prompt must be a list of token ids"}})
        else:
            await _stream(engine, writer, asked)
    else:
        _whole(writer, 404, {"error": {"message": f"no {path} here"}})
    await writer.drain()


def _whole(writer: asyncio.StreamWriter, status: int, content: Any) -> None:
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)


async def _stream(engine: Engine, writer: asyncio.StreamWriter, asked: dict[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    tokens: asyncio.Queue[int | None] = asyncio.Queue()

    def emit(token: int | None) -> None:
        loop.call_soon_threadsafe(tokens.put_nowait, token)

    engine.submit(Request(asked["prompt"], asked["max_tokens"], emit))
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    count = 0
    while (token := await tokens.get()) is not None:
        count += 1
        _event(writer, {"choices": [{"index": 0, "text": f" {token}", "finish_reason": None}]})
        await writer.drain()
    usage = {"prompt_tokens": len(asked["prompt"]), "completion_tokens": count}
    _event(writer, {"choices": [{"index": 0, "text": "", "finish_reason": "length"}], "usage": usage})
    _event(writer, "[DONE]")
    writer.write(b"0\r\n\r\n")


def _event(writer: asyncio.StreamWriter, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    data = f"data: {text}\n\n".encode()
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
