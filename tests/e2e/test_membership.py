"""Workers come, leave and die under load: no request fails, no token is lost."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator

import openai
import pytest
from support.fleet import DEMO, Fleet, until
from support.redis_server import RedisServer

pytestmark = pytest.mark.e2e

PROMPTS = [f"What is the KV cache? Answer number {number}." for number in range(8)]


@pytest.fixture(scope="module")
def fleet(module_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One worker of each kind, float32."""
    with Fleet(module_redis, tmp_path_factory.mktemp("fleet"), settings={"lease_s": "1.5"}) as fleet:
        for role in ("prefill", "decode"):
            add(fleet, role, 1)
        fleet.gateway()
        fleet.wait_ready()
        yield fleet


def add(fleet: Fleet, role: str, number: int) -> None:
    fleet.start(
        f"{role}_svc", f"{role}-{number}", model=DEMO, served_model_name="demo", dtype="float32", drain_timeout_s=20
    )


async def ask(
    client: openai.AsyncOpenAI, number: int, max_tokens: int = 150, *, seen: Callable[[], object] = lambda: None
) -> str:
    """The text of one stream; `seen` is called at each chunk."""
    stream = await client.completions.create(
        model="demo",
        prompt=PROMPTS[number % len(PROMPTS)],
        max_tokens=max_tokens,
        temperature=1.0,
        seed=number,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    text = ""
    async for chunk in stream:
        for choice in chunk.choices:
            text += choice.text
            seen()
    return text


def client_of(fleet: Fleet) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="x", max_retries=0, timeout=60)


async def test_workers_added_and_drained_under_load(fleet: Fleet) -> None:
    async with client_of(fleet) as client:
        undisturbed = await asyncio.gather(*(ask(client, number) for number in range(4)))
        texts: dict[int, list[str]] = {number: [] for number in range(4)}
        stop = asyncio.Event()

        async def load(number: int) -> None:
            while not stop.is_set():
                texts[number].append(await ask(client, number))

        async with asyncio.TaskGroup() as tasks:
            for number in range(4):
                tasks.create_task(load(number))
            for role in ("prefill", "decode"):
                add(fleet, role, 2)
            await asyncio.to_thread(fleet.wait_ready, prefill=2, decode=2)
            await asyncio.sleep(1)
            for role in ("prefill", "decode"):
                leaving = fleet.forget(f"{role}-1")
                assert await asyncio.to_thread(leaving.stop, signal.SIGTERM) == 0, leaving.text()[-3000:]
            await asyncio.sleep(0.5)
            stop.set()
    for number, expected in enumerate(undisturbed):
        assert texts[number]
        assert set(texts[number]) == {expected}


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_kill_9_under_load_costs_a_pause_and_no_token(fleet: Fleet, role: str) -> None:
    async with client_of(fleet) as client:
        undisturbed = await asyncio.gather(*(ask(client, number, 300) for number in range(6)))
        victim = next(name for name in fleet.services if name.startswith(role))
        add(fleet, role, 10 + len(fleet.services))
        await asyncio.to_thread(fleet.wait_ready, **{role: 2})
        replays = fleet.metric("baton_replays_total")
        chunks = asyncio.Semaphore(0)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(ask(client, number, 300, seen=chunks.release)) for number in range(6)]
            # A prefill worker dies while some still wait for it, a decode worker in the middle of the streams.
            for _ in range(1 if role == "prefill" else 120):
                await chunks.acquire()
            fleet.forget(victim).kill()
        assert [task.result() for task in running] == undisturbed
        if role == "decode":
            assert fleet.metric("baton_replays_total") > replays


async def test_a_frozen_worker_costs_a_pause_and_wakes_up_clean(fleet: Fleet) -> None:
    async with client_of(fleet) as client:
        undisturbed = await asyncio.gather(*(ask(client, number, 200) for number in range(4)))
        victim = next(name for name in fleet.services if name.startswith("decode"))
        add(fleet, "decode", 20)
        await asyncio.to_thread(fleet.wait_ready, decode=2)
        chunks = asyncio.Semaphore(0)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(ask(client, number, 200, seen=chunks.release)) for number in range(4)]
            for _ in range(60):
                await chunks.acquire()
            frozen = fleet.services[victim].process
            frozen.send_signal(signal.SIGSTOP)
            stale = fleet.metric("baton_worker_stale_messages_total")
            # Some of these are offered to the frozen one, which says yes when it wakes up.
            running += [tasks.create_task(ask(client, number, 200)) for number in range(4)]
        assert [task.result() for task in running] == 2 * undisturbed
        frozen.send_signal(signal.SIGCONT)
        await asyncio.to_thread(fleet.wait_ready, decode=2)
        await asyncio.to_thread(
            until,
            lambda: fleet.metric("baton_worker_pages", state="used", worker=victim) == 0,
            within_s=20,
            what="the woken worker has freed its pages",
        )
        await asyncio.to_thread(
            until,
            lambda: fleet.metric("baton_worker_stale_messages_total") > stale,
            within_s=20,
            what="what the woken worker still had to say is counted",
        )
        assert await asyncio.gather(*(ask(client, number, 200) for number in range(4))) == undisturbed
