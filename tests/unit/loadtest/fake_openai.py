"""A small OpenAI server with known delays and faults, on a loopback port in its own thread."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

TEMPLATE_TOKENS = 5
"""What the made-up chat template adds to each prompt."""


@dataclass
class Fake:
    """How the server behaves, and what it saw. ``fault(n)`` names what goes wrong with generation n.

    Faults: ``reject`` (429), ``unavailable`` (503), ``error_event``, ``cut`` (connection closed mid-stream),
    ``unfinished`` (clean end without finish), ``garbage`` (no JSON), ``plain`` (200 without a stream),
    ``hang``. The probe requests before a run are generations too, but see no fault.
    """

    ttft_s: float = 0.02
    itl_s: float = 0.01
    tokens_per_chunk: int = 1
    models: tuple[str, ...] = ("fake",)
    tokenizer: bool = True
    usage: bool = True
    refused_fields: frozenset[str] = frozenset()
    api_key: str | None = None
    fault: Callable[[int], str | None] = lambda _: None
    port: int = 0
    running: int = 0
    peak_running: int = 0
    abandoned: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def measured(self) -> list[dict[str, Any]]:
        """The bodies of requests that were not probes (those ask for one token)."""
        return [body for body in self.bodies if limit_of(body) > 1]


def limit_of(body: dict[str, Any]) -> int:
    return int(body.get("max_tokens") or body.get("max_completion_tokens") or 0)


def tokens_of(text: str) -> list[int]:
    """Tokenize like a small BPE would: a token for each started three letters of each word."""
    return [hash_of(word, start) for word in text.split() for start in range(0, len(word), 3)]


def hash_of(word: str, start: int) -> int:
    return int.from_bytes(word[start : start + 3].encode(), "big") % 50_000


@contextlib.contextmanager
def serve(fake: Fake) -> Iterator[Fake]:
    """Run the server for the length of the context; fills in ``port``."""
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def main() -> None:
        server = await asyncio.start_server(lambda r, w: _connection(fake, r, w), "127.0.0.1", fake.port)
        fake.port = server.sockets[0].getsockname()[1]
        ready.set()
        await stop.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    ready.wait(5)
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(5)
        loop.close()


async def _connection(fake: Fake, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            method_path = head.split(" ", 2)[:2]
            if fake.api_key is not None and headers.get("authorization") != f"bearer {fake.api_key}":
                _json(writer, 401, {"error": {"message": "bad key"}})
                continue
            await _route(fake, writer, " ".join(method_path), json.loads(body or b"{}"))
    writer.close()


async def _route(fake: Fake, writer: asyncio.StreamWriter, what: str, body: dict[str, Any]) -> None:
    if what == "GET /v1/models":
        _json(writer, 200, {"object": "list", "data": [{"id": name} for name in fake.models]})
    elif what == "POST /tokenize" and fake.tokenizer:
        tokens = tokens_of(body["prompt"])
        _json(writer, 200, {"count": len(tokens), "tokens": tokens})
    elif what in {"POST /v1/chat/completions", "POST /v1/completions"}:
        refused = fake.refused_fields & body.keys()
        if refused:
            _json(writer, 400, {"error": {"message": f"unknown field {min(refused)}"}})
            return
        fake.bodies.append(body)
        number = len(fake.measured) - 1
        fault = fake.fault(number) if limit_of(body) > 1 else None
        fake.running += 1
        fake.peak_running = max(fake.peak_running, fake.running)
        try:
            await _generate(fake, writer, body, fault, chat="chat" in what)
        except ConnectionError:
            fake.abandoned += 1
            raise
        finally:
            fake.running -= 1
    else:
        _json(writer, 404, {"error": {"message": "no such path"}})


async def _generate(
    fake: Fake, writer: asyncio.StreamWriter, body: dict[str, Any], fault: str | None, *, chat: bool
) -> None:
    if fault == "reject":
        _json(writer, 429, {"error": {"message": "full"}}, "Retry-After: 0.2\r\n")
        return
    if fault == "unavailable":
        _json(writer, 503, {"error": {"message": "no worker"}})
        return
    if fault == "plain":
        _json(writer, 200, {"choices": []})
        return
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    if chat:
        _event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    total = limit_of(body)
    for first in range(0, total, fake.tokens_per_chunk):
        await asyncio.sleep(fake.ttft_s if first == 0 else fake.itl_s)
        if first > 0 and fault is not None and await _misbehave(writer, fault):
            return
        text = "é " * min(fake.tokens_per_chunk, total - first)
        _event(writer, {"choices": [{"index": 0, **({"delta": {"content": text}} if chat else {"text": text})}]})
        await writer.drain()
    if fault != "unfinished":
        _event(writer, {"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "length"}]})
        if fake.usage and body.get("stream_options", {}).get("include_usage"):
            prompt = body["messages"][0]["content"] if chat else body["prompt"]
            count = len(tokens_of(prompt)) if isinstance(prompt, str) else len(prompt)
            usage = {"prompt_tokens": count + TEMPLATE_TOKENS * chat, "completion_tokens": total}
            _event(writer, {"choices": [], "usage": usage})
        _chunk(writer, b"data: [DONE]\n\n")
    writer.write(b"0\r\n\r\n")
    await writer.drain()


async def _misbehave(writer: asyncio.StreamWriter, fault: str) -> bool:
    """Carry out a fault in mid-stream; return whether the generation is over."""
    if fault == "cut":
        writer.close()
        raise ConnectionResetError
    if fault == "hang":
        while not writer.is_closing():
            await asyncio.sleep(0.01)
            _chunk(writer, b": still here\n\n")
        raise ConnectionResetError
    if fault in {"error_event", "garbage"}:
        _chunk(
            writer,
            b'event: error\ndata: {"error": {"message": "worker lost"}}\n\n'
            if fault == "error_event"
            else b"data: {not json\n\n",
        )
        writer.write(b"0\r\n\r\n")
        return True
    return False


def _event(writer: asyncio.StreamWriter, payload: dict[str, Any]) -> None:
    _chunk(writer, b"data: " + json.dumps(payload, ensure_ascii=False).encode() + b"\n\n")


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


def _json(writer: asyncio.StreamWriter, status: int, body: dict[str, Any], extra: str = "") -> None:
    data = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{extra}Content-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
