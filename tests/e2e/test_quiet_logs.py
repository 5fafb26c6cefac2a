"""At log level debug, no service writes down what clients ask, what they are told or who they are."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.fleet import DEMO, Fleet
from support.redis_server import RedisServer

from fleet.keys import KeyRegistry
from fleet.redis_client import connect

pytestmark = pytest.mark.e2e

ASKED = "xylophonequartz"
WORKER = {"model": DEMO, "served_model_name": "demo", "dtype": "float32", "max_model_len": 256}
PROMPT = f"Once upon a time {ASKED} went out. "
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TURNS = [{"role": "user", "content": PROMPT}]
GOOD: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": TURNS, "max_tokens": 24, "stop": [ASKED * 2], "user": ASKED}),
    (TEXT, {"prompt": PROMPT, "max_tokens": 24, "logprobs": 2, "ignore_eos": True}),
    ("/v1/responses", {"input": PROMPT, "max_output_tokens": 24, "metadata": {"about": ASKED}}),
    ("/v1/messages", {"messages": TURNS, "max_tokens": 24}),
    ("/v1/embeddings", {"input": PROMPT}),
    ("/tokenize", {"prompt": PROMPT}),
]
BAD: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": TURNS, "temperature": ASKED}),
    (CHAT, {"messages": [{"role": ASKED, "content": PROMPT}]}),
    (CHAT, {"messages": TURNS, "response_format": {"type": ASKED}}),
    (CHAT, {"messages": TURNS, "guided_regex": f"({ASKED}"}),
    (CHAT, {"messages": TURNS, "chat_template_kwargs": {"x": ASKED}, "n": 0}),
    (TEXT, {"prompt": PROMPT * 200, "max_tokens": 4}),
    (TEXT, {"prompt": {ASKED: 1}}),
    ("/v1/messages", {"messages": TURNS, "max_tokens": ASKED}),
    ("/v1/responses", {"input": [{"type": ASKED}]}),
]


def logs_of(fleet: Fleet) -> str:
    return "".join(service.text() for service in fleet.services.values())


def pieces(text: str, size: int = 14) -> set[str]:
    """Every `size` characters of an output, as they would stand in a log line."""
    return {text[i : i + size] for i in range(len(text) - size + 1)}


async def test_logs_hold_no_prompt_no_output_and_no_key(module_redis: RedisServer, tmp_path: Path) -> None:
    async with connect(module_redis.url) as redis:
        _, secret = await KeyRegistry(redis, namespace="test").create("alice")
    with Fleet(module_redis, tmp_path, settings={"lease_s": "1", "log_level": "debug"}) as fleet:
        fleet.start("prefill_svc", "p", **WORKER)
        fleet.start("decode_svc", "d", **WORKER)
        url = await asyncio.to_thread(fleet.gateway, worker_wait_s=1)
        await asyncio.to_thread(fleet.wait_ready)
        headers = {"authorization": f"Bearer {secret}"}
        unsaid: set[str] = set()
        async with httpx.AsyncClient(base_url=url, timeout=30, headers=headers) as client:
            for path, body in GOOD:
                answer = await client.post(path, json={"model": "demo", **body})
                assert answer.status_code in (200, 201), (path, answer.text)
            told = await client.post(TEXT, json={"model": "demo", **GOOD[1][1]})
            unsaid |= pieces(told.json()["choices"][0]["text"])
            ids = (await client.post("/tokenize", json={"model": "demo", "prompt": PROMPT})).json()["tokens"]
            unsaid.add(", ".join(str(token_id) for token_id in ids[1:7]))
            for path, body in BAD:
                answer = await client.post(path, json={"model": "demo", **body})
                assert 400 <= answer.status_code < 500, (path, body, answer.status_code)
            broken = await client.post(CHAT, content=f'{{"messages": "{ASKED}', params={"q": ASKED})
            assert broken.status_code == 400
            for name in ("authorization", "x-api-key"):
                refused = await client.post(
                    CHAT,
                    json={"model": "demo", "messages": TURNS},
                    headers={"authorization": "", name: f"Bearer {ASKED}"},
                )
                assert refused.status_code == 401
            body = {"model": "demo", "prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "stream": True}
            failed = False
            async with client.stream("POST", TEXT, json=body) as stream:
                async for line in stream.aiter_lines():
                    if "d" in fleet.services:
                        fleet.forget("d").kill()
                    if line.startswith("data: {"):
                        failed = failed or "error" in json.loads(line.removeprefix("data: "))
            assert failed
        written = logs_of(fleet) + (tmp_path / "d.log").read_text(encoding="utf-8")
    assert "prompt taken" in written
    assert "sequence adopted" in written
    assert ASKED not in written
    assert secret not in written
    assert secret.rpartition("-")[2] not in written
    assert len(unsaid) > 10
    assert not {piece for piece in unsaid if piece.strip() and piece in written}
