"""A decode worker leaves in the middle of streams: they move, unharmed and without a replay, and hardly pause."""

from __future__ import annotations

import asyncio
import json
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import openai
import pytest
from support.fleet import DEMO, Fleet, Service, until
from support.redis_server import RedisServer

pytestmark = pytest.mark.e2e

NUM_STREAMS = 8
MAX_TOKENS = 400
GRACE_S = 15
WAYS: list[dict[str, Any]] = [
    {},
    {"logprobs": 3},
    {"frequency_penalty": 0.7, "presence_penalty": 0.4},
    {"top_p": 0.9, "extra_body": {"repetition_penalty": 1.2, "top_k": 50}},
]


@pytest.fixture(scope="module", params=["shm", "tcp"])
def fleet(
    request: pytest.FixtureRequest, module_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """One prefill and two decode workers, float32, over one transport."""
    settings = {"lease_s": "1.5", "transports": request.param}
    directory = tmp_path_factory.mktemp(f"fleet-{request.param}")
    with Fleet(module_redis, directory, namespace=f"migration-{request.param}", settings=settings) as fleet:
        for name in ("prefill-1", "decode-1", "decode-2"):
            add(fleet, name)
        fleet.gateway()
        fleet.wait_ready(decode=2)
        yield fleet


def add(fleet: Fleet, name: str, **settings: object) -> Service:
    module = f"{name.partition('-')[0]}_svc"
    worker = {"model": DEMO, "served_model_name": "demo", "dtype": "float32", "drain_timeout_s": GRACE_S, **settings}
    return fleet.start(module, name, **worker)


@dataclass
class Answer:
    """What a client got: the text, everything else about its tokens, and when."""

    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None
    times_s: list[float] = field(default_factory=list)

    def gaps_s(self, begin_s: float, end_s: float) -> list[float]:
        """Between one chunk and the next, as far as they lie in this time."""
        return [later - earlier for earlier, later in pairwise(self.times_s) if begin_s <= earlier and later <= end_s]


async def ask(
    client: openai.AsyncOpenAI, number: int, *, seen: Callable[[], object] = lambda: None, max_tokens: int = MAX_TOKENS
) -> Answer:
    way = dict(WAYS[number % len(WAYS)])
    extra = {"ignore_eos": True, **way.pop("extra_body", {})}
    stream = await client.completions.create(
        model="demo",
        prompt=f"Tell me of page number {number}. " * (1 + 5 * (number % 3)),
        max_tokens=max_tokens,
        temperature=1.0,
        seed=number,
        stream=True,
        extra_body=extra,
        **way,
    )
    answer = Answer()
    async for chunk in stream:
        for choice in chunk.choices:
            answer.text += choice.text
            answer.finish = choice.finish_reason or answer.finish
            if choice.logprobs is not None:
                answer.logprobs += choice.logprobs.token_logprobs
            answer.times_s.append(time.monotonic())
            seen()
    return answer


def client_of(fleet: Fleet) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="x", max_retries=0, timeout=60)


async def leave(fleet: Fleet, name: str) -> Service:
    """SIGTERM; the worker must be gone, in order, within its grace period."""
    service = fleet.forget(name)
    began_s = time.monotonic()
    assert await asyncio.to_thread(service.stop, signal.SIGTERM) == 0, service.text()[-4000:]
    assert time.monotonic() - began_s < GRACE_S
    return service


async def all_pages_back(fleet: Fleet) -> None:
    for state in ("used", "quarantined"):
        await asyncio.to_thread(
            until,
            partial(has_no_pages, fleet, state),
            within_s=5,
            what=f"no page is {state}",
        )


def has_no_pages(fleet: Fleet, state: str) -> bool:
    return fleet.metric("baton_worker_pages", state=state) == 0


async def test_streams_move_when_their_worker_leaves(fleet: Fleet) -> None:
    rounds = 2
    async with client_of(fleet) as client:
        undisturbed = await asyncio.gather(*(ask(client, number) for number in range(NUM_STREAMS)))
        replays = fleet.metric("baton_replays_total")
        for turn in range(rounds):
            migrations = fleet.metric("baton_migrations_total", reason="drain")
            paused_s = fleet.metric("baton_migration_pause_seconds_sum")
            chunks = asyncio.Semaphore(0)
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(ask(client, number, seen=chunks.release)) for number in range(NUM_STREAMS)]
                for _ in range(NUM_STREAMS * 30):
                    await chunks.acquire()
                began_s = time.monotonic()
                service = await leave(fleet, f"decode-{1 + turn}")
                gone_s = time.monotonic()
            answers = [task.result() for task in running]
            for answer, expected in zip(answers, undisturbed, strict=True):
                assert (answer.text, answer.finish) == (expected.text, expected.finish)
                assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-3)
            moved = service.text().count("sequence moved")
            assert moved > 0
            assert fleet.metric("baton_replays_total") == replays
            # A stream that ends in the middle of its move is no migration to the gateway.
            assert migrations < fleet.metric("baton_migrations_total", reason="drain") <= migrations + moved
            pauses_s = fleet.metric("baton_migration_pause_seconds_sum") - paused_s
            report(turn, moved, pauses_s / moved, answers, began_s, gone_s)
            await all_pages_back(fleet)
            assert not any("Traceback" in other.text() for other in (service, *fleet.services.values()))
            add(fleet, f"decode-{3 + turn}")
            await asyncio.to_thread(fleet.wait_ready, decode=2)


async def test_a_taker_killed_amid_the_moves_costs_no_token(fleet: Fleet) -> None:
    leaving, dying = sorted(name for name in fleet.services if name.startswith("decode"))[:2]
    add(fleet, "decode-9")
    await asyncio.to_thread(fleet.wait_ready, decode=3)
    async with client_of(fleet) as client:
        undisturbed = await asyncio.gather(*(ask(client, number) for number in range(NUM_STREAMS)))
        chunks = asyncio.Semaphore(0)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(ask(client, number, seen=chunks.release)) for number in range(NUM_STREAMS)]
            for _ in range(NUM_STREAMS * 30):
                await chunks.acquire()
            service = fleet.services[leaving]
            going = tasks.create_task(leave(fleet, leaving))
            await asyncio.to_thread(until, partial(is_moving, service), within_s=5, what="a move")
            fleet.forget(dying).kill()
        assert [task.result().text for task in running] == [answer.text for answer in undisturbed]
        assert "Traceback" not in going.result().text()
    await all_pages_back(fleet)


def is_moving(service: Service) -> bool:
    return "sequence moved" in service.text()


def report(turn: int, moved: int, pause_s: float, answers: list[Answer], began_s: float, gone_s: float) -> None:
    """Print the gaps that clients saw before and while the worker left."""
    before = [gap for answer in answers for gap in answer.gaps_s(0.0, began_s)]
    during = sorted((gap for answer in answers for gap in answer.gaps_s(began_s, gone_s)), reverse=True)
    figures = {
        "turn": turn,
        "left_within_s": round(gone_s - began_s, 2),
        "moved": moved,
        "mean_pause_at_gateway_ms": round(pause_s * 1e3, 1),
        "interval_before_ms": {
            "p50": ms(statistics.median(before)),
            "p99": ms(statistics.quantiles(before, n=100)[-1]),
        },
        "interval_during_ms": {"p50": ms(statistics.median(during)), "worst": [ms(gap) for gap in during[:8]]},
    }
    print(json.dumps(figures))


def ms(seconds: float) -> float:
    return round(seconds * 1e3, 1)
