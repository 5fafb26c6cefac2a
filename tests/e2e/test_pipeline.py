"""Sixty-four mixed requests at once through real processes and the real SDK, and nothing left over afterwards."""

from __future__ import annotations

import asyncio
import random
import signal
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import redis
from support.fleet import Fleet, until

pytestmark = pytest.mark.e2e

SYSTEM = "You are a helpful assistant that knows about LLM serving. " * 6
QUESTIONS = (
    "What is TTFT?",
    "Explain continuous batching.",
    "Tell me a short story.",
    "What does PagedAttention do?",
    "What is 3 + 4?",
    "How are you?",
)


@dataclass(frozen=True)
class Ask:
    """One request of the mix."""

    messages: list[dict[str, str]]
    max_tokens: int
    temperature: float
    seed: int
    stream: bool
    cancel_after: int | None


def mix(count: int) -> list[Ask]:
    rng = random.Random(7)
    asks = []
    for number in range(count):
        messages = [{"role": "user", "content": f"{rng.choice(QUESTIONS)} ({number % 7})"}]
        if number % 3 == 0:
            messages.insert(0, {"role": "system", "content": SYSTEM})
        if number % 8 == 5:
            messages[-1]["content"] += " and " + " ".join(rng.choice(QUESTIONS) for _ in range(40))
        stream = number % 2 == 0
        asks.append(
            Ask(
                messages=messages,
                max_tokens=rng.choice((1, 8, 40, 120)) if number % 6 else 300,
                temperature=rng.choice((0.0, 0.7, 1.0)),
                seed=number,
                stream=stream,
                cancel_after=rng.randint(1, 5) if number % 6 == 0 else None,
            )
        )
    return asks


async def answer(client: openai.AsyncOpenAI, ask: Ask) -> tuple[str, str | None, int]:
    """Text, finish reason and completion tokens; a cancelled one ends early with reason None."""
    options: dict[str, Any] = {
        "model": "demo",
        "messages": ask.messages,
        "max_tokens": ask.max_tokens,
        "temperature": ask.temperature,
        "seed": ask.seed,
    }
    if not ask.stream:
        whole = await client.chat.completions.create(**options)
        return whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage.completion_tokens
    if ask.cancel_after is not None:
        options["extra_body"] = {"ignore_eos": True}
    text, finish, used, seen = "", None, 0, 0
    stream = await client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    async for chunk in stream:
        if chunk.usage is not None:
            used = chunk.usage.completion_tokens
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
            seen += bool(choice.delta.content)
        if ask.cancel_after is not None and seen >= ask.cancel_after:
            await stream.close()
            return text, None, 0
    return text, finish, used


def idle_pages(fleet: Fleet) -> bool:
    """Whether no page of any worker is used or quarantined and no request is live."""
    return (
        fleet.metric("baton_worker_pages", state="used") == 0
        and fleet.metric("baton_worker_pages", state="quarantined") == 0
        and fleet.metric("baton_requests_live") == 0
    )


async def test_sixty_four_at_once_equal_one_at_a_time(own_demo_fleet: Fleet) -> None:
    fleet = own_demo_fleet
    asks = mix(64)
    async with openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="x", max_retries=0, timeout=90) as client:
        alone = [await answer(client, ask) for ask in asks if ask.cancel_after is None]
        before = {
            name: fleet.metric("baton_worker_computed_tokens_total", worker=name)
            for name in ("prefill-1", "prefill-2", "decode-1", "decode-2")
        }
        together = await asyncio.gather(*(answer(client, ask) for ask in asks))
    whole = [result for ask, result in zip(asks, together, strict=True) if ask.cancel_after is None]
    assert whole == alone
    assert any(finish == "stop" for _, finish, _ in whole)
    assert any(finish == "length" for _, finish, _ in whole)
    cancelled = [result for ask, result in zip(asks, together, strict=True) if ask.cancel_after is not None]
    assert cancelled
    assert all(finish is None for _, finish, _ in cancelled)
    until(lambda: idle_pages(fleet), within_s=20, what="all pages are back")
    for name, tokens in before.items():
        assert fleet.metric("baton_worker_computed_tokens_total", worker=name) > tokens, f"{name} did no work"
    assert fleet.metric("baton_worker_hand_offs_total", transport="shm", outcome="given") > 0
    assert fleet.metric("baton_worker_prefix_hit_tokens") > 0


def test_redis_shows_every_request_ended(own_demo_fleet: Fleet) -> None:
    client = redis.Redis.from_url(own_demo_fleet.redis.url)
    own_demo_fleet.client().completions.create(model="demo", prompt="TTFT is", max_tokens=4)

    def states() -> list[bytes] | None:
        found = [client.hget(key, "state") for key in client.scan_iter("test:request:*")]
        return found if found and set(found) <= {b"finished"} else None

    found = until(states, within_s=20, what="every request is finished in Redis")
    assert len(found) >= 1
    client.close()


def test_leaving_frees_pages_on_both_workers_within_a_step(own_demo_fleet: Fleet) -> None:
    body = {"model": "demo", "prompt": "Once upon a time " * 20, "max_tokens": 3000, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{own_demo_fleet.url}/v1/completions", json=body, timeout=30) as answer:
        lines = answer.iter_lines()
        for _ in range(6):
            next(lines)
        until(lambda: not idle_pages(own_demo_fleet), within_s=20, what="pages in use are reported")
    until(lambda: idle_pages(own_demo_fleet), within_s=20, what="pages are back")


def test_transport_and_hand_off_times_are_metrics(own_demo_fleet: Fleet) -> None:
    text = httpx.get(f"{own_demo_fleet.url}/metrics").text
    for name in (
        "baton_ttft_seconds_bucket",
        "baton_itl_seconds_bucket",
        "baton_worker_hand_off_seconds_bucket",
        "baton_worker_hand_off_bytes_total",
        "baton_worker_hand_off_copy_seconds_total",
        "baton_requests_queued",
        "baton_worker_running",
        "baton_output_tokens_total",
    ):
        assert f"\n{name}" in text, name


def test_every_service_leaves_in_order_and_nothing_stays(own_demo_fleet: Fleet) -> None:
    fleet = own_demo_fleet
    assert fleet.shared_memory()
    codes = {}
    for service in fleet.services.values():
        service.process.send_signal(signal.SIGTERM)
    for name, service in fleet.services.items():
        codes[name] = service.stop()
    assert set(codes.values()) == {0}, {name: fleet.services[name].text()[-2000:] for name, c in codes.items() if c}
    assert fleet.shared_memory() == []
    for service in fleet.services.values():
        assert "Traceback" not in service.text()
        assert "was never awaited" not in service.text()
        assert "Task was destroyed" not in service.text()
    client = redis.Redis.from_url(fleet.redis.url)
    kept = (b"test:request:", b"test:model_files:", b"test:usage:")  # each with a time to live
    left = [key for key in client.scan_iter("test:*") if not key.startswith(kept)]
    assert all(client.ttl(key) > 0 for key in client.scan_iter("test:*"))
    client.close()
    assert left == []
