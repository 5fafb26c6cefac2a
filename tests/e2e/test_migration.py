"""A decode worker leaves amid answers of every kind: they move, unharmed and without a replay, and hardly pause."""

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
MAX_TOKENS = 260
GRACE_S = 15
NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": 120, "maxItems": 120}
WAYS: list[dict[str, Any]] = [
    {},
    {"logprobs": 3},
    {"frequency_penalty": 0.7, "presence_penalty": 0.4},
    {"top_p": 0.9, "extra_body": {"repetition_penalty": 1.2, "top_k": 50}},
    {"extra_body": {"structured_outputs": {"json": NUMBERS}, "ignore_eos": False}},
    {"n": 2},
    {"extra_body": {"min_tokens": MAX_TOKENS - 50, "ignore_eos": False}},
]


@pytest.fixture(scope="module", params=["shm", "tcp"])
def fleet(
    request: pytest.FixtureRequest, module_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """One prefill and two decode workers, float32, over one transport. Prompts are computed slowly, each time anew."""
    settings = {"lease_s": "1.5", "transports": request.param}
    directory = tmp_path_factory.mktemp(f"fleet-{request.param}")
    with Fleet(module_redis, directory, namespace=f"migration-{request.param}", settings=settings) as fleet:
        add(fleet, "prefill-1", prefix_cache=False, max_step_tokens=64)
        for name in ("decode-1", "decode-2"):
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
    """What a client got: texts and finish reasons by choice, everything else about its tokens, and when."""

    texts: dict[int, str] = field(default_factory=dict)
    logprobs: list[float] = field(default_factory=list)
    finishes: dict[int, str] = field(default_factory=dict)
    num_tokens: int = 0
    times_s: list[float] = field(default_factory=list)

    @property
    def whole(self) -> tuple[dict[int, str], dict[int, str], int]:
        """What an undisturbed run must equal to the letter."""
        return self.texts, self.finishes, self.num_tokens

    def gaps_s(self, begin_s: float, end_s: float) -> list[float]:
        """Between one chunk and the next, as far as they lie in this time."""
        return [later - earlier for earlier, later in pairwise(self.times_s) if begin_s <= earlier and later <= end_s]


def request(number: int, **changes: Any) -> dict[str, Any]:
    """What `number` asks for, in its own way."""
    way = WAYS[number % len(WAYS)]
    common = {
        "model": "demo",
        "prompt": f"Tell me of page number {number}. " * (1 + 5 * (number % 3)),
        "max_tokens": MAX_TOKENS,
        "temperature": 1.0,
        "seed": number,
    }
    return common | way | {"extra_body": {"ignore_eos": True, **way.get("extra_body", {})}} | changes


async def ask(
    client: openai.AsyncOpenAI, number: int, *, seen: Callable[[], object] = lambda: None, **changes: Any
) -> Answer:
    asked = request(number, stream=True, stream_options={"include_usage": True}, **changes)
    answer = Answer()
    async for chunk in await client.completions.create(**asked):
        if chunk.usage is not None:
            answer.num_tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            answer.texts[choice.index] = answer.texts.get(choice.index, "") + choice.text
            if choice.finish_reason is not None:
                answer.finishes[choice.index] = choice.finish_reason
            if choice.logprobs is not None:
                answer.logprobs += choice.logprobs.token_logprobs
            answer.times_s.append(time.monotonic())
            seen()
    return answer


async def ask_whole(client: openai.AsyncOpenAI, number: int) -> Answer:
    """The same without a stream."""
    got = await client.completions.create(**request(number))
    assert got.usage is not None
    answer = Answer(num_tokens=got.usage.completion_tokens)
    for choice in got.choices:
        answer.texts[choice.index] = choice.text
        answer.finishes[choice.index] = choice.finish_reason
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
            within_s=20,
            what=f"no page is {state}",
        )


def has_no_pages(fleet: Fleet, state: str) -> bool:
    return fleet.metric("baton_worker_pages", state=state) == 0


async def test_streams_move_when_their_worker_leaves(fleet: Fleet) -> None:
    rounds = 2
    async with client_of(fleet) as client:
        undisturbed = await asyncio.gather(*(ask(client, number) for number in range(NUM_STREAMS)))
        # All but its beginning is the start of a stop string that comes to its end late: the gateway holds it back.
        plain = undisturbed[0].texts[0]
        held_from = len(plain) // 8
        stop = plain[held_from : held_from + min(1000, len(plain) // 2)]
        replays = fleet.metric("baton_replays_total")
        for turn in range(rounds):
            migrations = fleet.metric("baton_migrations_total", reason="drain")
            paused_s = fleet.metric("baton_migration_pause_seconds_sum")
            chunks = asyncio.Semaphore(0)
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(ask(client, number, seen=chunks.release)) for number in range(NUM_STREAMS)]
                unstreamed = tasks.create_task(ask_whole(client, 2))
                half_matched = tasks.create_task(ask(client, 0, stop=[stop]))
                for _ in range(NUM_STREAMS * 30):
                    await chunks.acquire()
                began_s = time.monotonic()
                service = await leave(fleet, f"decode-{1 + turn}")
                gone_s = time.monotonic()
            answers = [task.result() for task in running]
            for answer, expected in zip(answers, undisturbed, strict=True):
                assert answer.whole == expected.whole
                assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-3)
            assert unstreamed.result().whole == undisturbed[2].whole
            assert half_matched.result().whole[:2] == ({0: plain[:held_from]}, {0: "stop"})
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
    add(fleet, "decode-9")
    await asyncio.to_thread(fleet.wait_ready, decode=3)
    async with client_of(fleet) as client:
        undisturbed = await asyncio.gather(*(ask(client, number) for number in range(NUM_STREAMS)))
        chunks = asyncio.Semaphore(0)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(ask(client, number, seen=chunks.release)) for number in range(NUM_STREAMS)]
            for _ in range(NUM_STREAMS * 30):
                await chunks.acquire()
            workers = [name for name in fleet.services if name.startswith("decode")]
            dying, *_, leaving = sorted(workers, key=lambda name: fleet.metric("baton_worker_running", worker=name))
            service = fleet.services[leaving]
            going = tasks.create_task(leave(fleet, leaving))
            await asyncio.to_thread(until, partial(is_moving, service), within_s=20, what="a move")
            fleet.forget(dying).kill()
        assert [task.result().whole for task in running] == [answer.whole for answer in undisturbed]
        assert "Traceback" not in going.result().text()
    await all_pages_back(fleet)


async def test_a_prompt_on_its_way_to_a_leaving_worker_is_not_stranded(fleet: Fleet) -> None:
    leaving = min(name for name in fleet.services if name.startswith("decode"))
    add(fleet, "decode-10")
    await asyncio.to_thread(fleet.wait_ready, decode=2)
    prompts = [[11 + (at * step) % 300 for at in range(1500)] for step in (3, 5, 7, 11)]
    async with client_of(fleet) as client:

        async def ask_all() -> list[Answer]:
            asked = (ask(client, 0, prompt=prompt, max_tokens=60) for prompt in prompts)
            return await asyncio.gather(*asked)

        undisturbed = await ask_all()
        replays = fleet.metric("baton_replays_total")
        again = asyncio.create_task(ask_all())
        await asyncio.to_thread(until, partial(is_taking, fleet, leaving), within_s=10, what="a grant of a prompt")
        await leave(fleet, leaving)
        assert [answer.whole for answer in await again] == [answer.whole for answer in undisturbed]
        assert fleet.metric("baton_replays_total") == replays
    await all_pages_back(fleet)


def is_taking(fleet: Fleet, worker: str) -> bool:
    return fleet.metric("baton_worker_hand_offs_open", worker=worker, side="taking") > 0


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
