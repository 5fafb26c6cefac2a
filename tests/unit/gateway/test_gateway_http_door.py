"""Heads without end and requests that trickle: bounded, and nobody else waits for them."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import httpx
import pytest
from gateway_kit import MODEL, FakePipeline, make_app, serving

from gateway.http_door import MAX_HEAD_BYTES, BoundedHttp

GET = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


async def converse(address: str, *pieces: bytes) -> bytes:
    """Send these and read until the server closes the connection."""
    where = urlsplit(address)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        async with asyncio.timeout(10):
            try:
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
                return await reader.read()
            except ConnectionResetError:
                return b""
    finally:
        writer.close()


async def test_a_long_head_gets_400_in_one_piece_and_in_many(pipeline: FakePipeline) -> None:
    long = b"x-long: " + b"a" * (MAX_HEAD_BYTES + 1)
    many = b"".join(b"x-%d: %s\r\n" % (number, b"a" * 1000) for number in range(70))
    async with serving(make_app(pipeline)) as address, httpx.AsyncClient(base_url=address) as client:
        for head in (long, many):
            whole = GET + head + b"\r\n\r\n"
            assert (await converse(address, whole)).startswith(b"HTTP/1.1 400")
        endless = GET + long  # its end never comes
        assert (await converse(address, endless)).startswith(b"HTTP/1.1 400")
        assert (await client.get("/health", headers={"x-fits": "a" * 32_000})).status_code == 200


async def test_requests_that_trickle_end_and_others_are_served_meanwhile(
    pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BoundedHttp, "head_s", 0.5)
    monkeypatch.setattr(BoundedHttp, "request_s", 0.8)
    body = {"model": MODEL, "prompt": "a"}
    async with serving(make_app(pipeline)) as address, httpx.AsyncClient(base_url=address) as client:
        slow = [
            asyncio.create_task(converse(address, head)) for head in (b"", GET, POST + b"content-length: 9\r\n\r\n{")
        ]
        for _ in range(3):
            assert (await client.post("/v1/completions", json=body)).status_code == 200
        assert not any(task.done() for task in slow)
        silent, half_head, half_body = await asyncio.gather(*slow)
        assert silent.startswith(b"HTTP/1.1 408")
        assert half_head.startswith(b"HTTP/1.1 408")
        assert b"200 OK" not in half_body
        assert (await client.post("/v1/completions", json=body)).status_code == 200
