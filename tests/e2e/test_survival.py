"""Workers leave when told to, in every way; two gateways act as one; Redis goes, stands still and comes back empty."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest
import redis
from support.fleet import DEMO, Fleet, Service, until
from support.redis_server import RedisServer

from fleet.keys import KeyRegistry
from fleet.redis_client import connect

pytestmark = pytest.mark.e2e

Answer = tuple[str, int]
LEASE_S = 1.5


@pytest.fixture(scope="module")
def fleet(module_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One prefill and two decode workers, float32, behind two gateways; `fleet.url` is the first one's."""
    with Fleet(module_redis, tmp_path_factory.mktemp("fleet"), settings={"lease_s": str(LEASE_S)}) as fleet:
        for name in ("prefill-1", "decode-1", "decode-2"):
            add(fleet, name)
        fleet.gateway("g2")
        fleet.gateway("g1")
        fleet.wait_ready(decode=2)
        yield fleet


def add(fleet: Fleet, name: str, **settings: object) -> Service:
    worker = {"model": DEMO, "served_model_name": "demo", "dtype": "float32", "drain_timeout_s": 20, **settings}
    return fleet.start(f"{name.partition('-')[0]}_svc", name, **worker)


def client_of(url: str, key: str = "x") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


def second_url(fleet: Fleet) -> str:
    return "http://" + fleet.services["g2"].text().partition("url=http://")[2].split()[0]


async def ask(
    client: openai.AsyncOpenAI, number: int, max_tokens: int = 200, *, seen: Callable[[], object] = lambda: None
) -> Answer:
    """Text and counted tokens of one stream at temperature 1; `seen` is called at each piece."""
    stream = await client.completions.create(
        model="demo",
        prompt=f"What is the KV cache? Answer number {number}.",
        max_tokens=max_tokens,
        temperature=1.0,
        seed=number,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    text, used = "", 0
    async for chunk in stream:
        used = chunk.usage.completion_tokens if chunk.usage is not None else used
        for choice in chunk.choices:
            text += choice.text
            seen()
    return text, used


async def amid_streams(
    client: openai.AsyncOpenAI, action: Callable[[], object], *, streams: int = 4, max_tokens: int = 200
) -> list[Answer]:
    """What streams answer in the middle of which something happens."""
    pieces = asyncio.Semaphore(0)
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(ask(client, number, max_tokens, seen=pieces.release)) for number in range(streams)]
        for _ in range(streams * 15):
            await pieces.acquire()
        await asyncio.to_thread(action)
    return [task.result() for task in running]


def baton(fleet: Fleet, *arguments: str) -> str:
    """Run the command against this fleet's Redis; returns what it printed."""
    import subprocess

    environment = {key: value for key, value in os.environ.items() if not key.startswith("BATON_")}
    command = [sys.executable, "-m", "baton", *arguments, "--redis-url", fleet.redis.url, "--namespace", "test"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def order_at_socket(path: Path) -> None:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://worker") as client:
        assert client.get("/status").json()["draining"] is False
        assert client.post("/drain").json()["draining"] is True


async def test_a_worker_leaves_by_notice_and_at_its_socket(fleet: Fleet, tmp_path: Path) -> None:
    notice, admin = tmp_path / "notice", tmp_path / "admin.sock"
    async with client_of(fleet.url) as client:
        undisturbed = await asyncio.gather(*(ask(client, number, 600) for number in range(4)))
        replays = fleet.metric("baton_replays_total")
        ways: list[tuple[str, Callable[[], object], str]] = [
            ("decode-2", lambda: notice.write_text("going"), "reclaim"),
            ("decode-3", lambda: order_at_socket(admin), "drain"),
        ]
        coming: list[tuple[str, dict[str, object]]] = [
            ("decode-3", {"admin_address": f"unix:{admin}"}),
            ("decode-5", {}),
        ]
        fleet.forget("decode-2").stop()
        add(fleet, "decode-2", reclaim_file=notice)
        await asyncio.to_thread(fleet.wait_ready, decode=2)
        for (leaving, action, reason), (name, settings) in zip(ways, coming, strict=True):
            service = fleet.forget(leaving)
            before = fleet.metric("baton_migrations_total", reason=reason)
            await asyncio.sleep(LEASE_S / 2)  # peers pass newcomers over for so long
            answers = await amid_streams(client, action, max_tokens=600)
            assert answers == undisturbed
            assert service.process.wait(timeout=20) == 0, service.text()[-4000:]
            assert fleet.metric("baton_migrations_total", reason=reason) > before
            assert fleet.metric("baton_replays_total") == replays
            add(fleet, name, **settings)
            await asyncio.to_thread(fleet.wait_ready, decode=2)
        with pytest.raises(AssertionError, match="no worker is called 'decode-2'"):
            baton(fleet, "drain", "decode-2")


async def test_the_last_decode_worker_leaves_and_streams_wait_for_the_next(fleet: Fleet) -> None:
    async with client_of(fleet.url) as client:
        undisturbed = await asyncio.gather(*(ask(client, number) for number in range(4)))
        for name in [name for name in fleet.services if name.startswith("decode")]:
            if name != "decode-5":
                assert await asyncio.to_thread(fleet.forget(name).stop) == 0
        late: list[asyncio.Task[Answer]] = []

        def swap() -> None:
            printed = baton(fleet, "drain", "decode-5", "--timeout", "0.5")
            assert "decode-5 is draining" in printed
            assert "decode-5 has left" in printed
            loop.call_soon_threadsafe(lambda: late.append(loop.create_task(ask(client, 0))))
            assert fleet.forget("decode-5").process.wait(timeout=10) == 0
            add(fleet, "decode-6")

        loop = asyncio.get_running_loop()
        answers = await amid_streams(client, swap)
        assert answers == undisturbed
        assert await late[0] == undisturbed[0]
        assert fleet.metric("baton_replays_total", reason="draining") >= 4


async def test_a_stream_that_nobody_can_continue_ends_with_an_error_that_clients_raise(fleet: Fleet) -> None:
    fleet.gateway("g3", worker_wait_s=1)
    impatient, fleet.url = fleet.url, second_url(fleet)
    async with client_of(impatient) as client:
        await asyncio.to_thread(
            until, lambda: httpx.get(f"{impatient}/health/ready").is_success, within_s=10, what="g3"
        )
        pieces = asyncio.Semaphore(0)
        running = asyncio.create_task(ask(client, 0, 3000, seen=pieces.release))
        await pieces.acquire()
        fleet.forget("decode-6").kill()
        with pytest.raises(openai.APIError, match="no worker came"):
            await running
        with pytest.raises(openai.APIStatusError) as refused:
            await ask(client, 0)
        assert refused.value.status_code == 503
        assert int(refused.value.response.headers["retry-after"]) > 0
    assert fleet.forget("g3").stop() == 0
    add(fleet, "decode-7")
    await asyncio.to_thread(fleet.wait_ready)


async def make_key(fleet: Fleet, rpm: int | None) -> tuple[str, str]:
    client = connect(fleet.redis.url)
    key, secret = await KeyRegistry(client, namespace="test").create("alice", requests_per_minute=rpm)
    await client.aclose()
    return key.key_id, secret


def is_locked(url: str, *, locked: bool = True) -> bool:
    return (httpx.get(f"{url}/v1/models").status_code == 401) is locked


async def test_keys_and_limits_hold_across_gateways_and_outages_of_redis(fleet: Fleet) -> None:
    urls = (fleet.url, second_url(fleet))
    _, limited = await make_key(fleet, rpm=4)
    key_id, secret = await make_key(fleet, rpm=None)
    for url in urls:
        await asyncio.to_thread(until, partial(is_locked, url), within_s=5, what="keys are asked for")
    outcomes = []
    for number in range(6):
        async with client_of(urls[number % 2], limited) as client:
            try:
                outcomes.append((await ask(client, 0, 2))[1])
            except openai.RateLimitError as refused:
                outcomes.append(-int(refused.response.headers["retry-after"]))
    assert outcomes[:4] == [2, 2, 2, 2]
    assert all(-60 <= outcome < 0 for outcome in outcomes[4:])

    async with client_of(fleet.url, secret) as client, client_of(fleet.url, limited) as counted:
        undisturbed = await asyncio.gather(*(ask(client, number) for number in range(4)))

        def pause() -> None:
            fleet.redis.pause()

        assert await amid_streams(client, pause) == undisturbed
        await asyncio.sleep(2 * LEASE_S)
        assert await ask(client, 1) == undisturbed[1]
        assert is_locked(fleet.url)
        assert await ask(counted, 1) == undisturbed[1]  # counted by this gateway alone
        fleet.redis.resume()

        def lose_everything() -> None:
            fleet.redis.stop()
            fleet.redis.start()

        assert await amid_streams(client, lose_everything) == undisturbed
        with redis.Redis.from_url(fleet.redis.url) as kept:
            await asyncio.to_thread(until, partial(kept.hlen, "test:keys"), within_s=5, what="keys are written back")
            assert kept.hlen("test:keys") == 2
            await asyncio.to_thread(
                until, lambda: kept.scard("test:workers") == 2, within_s=5, what="workers are registered again"
            )
        assert is_locked(fleet.url)
        assert await ask(client, 2) == undisturbed[2]
        for one in (key_id, limited.split("-")[1]):
            baton(fleet, "keys", "revoke", one)
        for url in urls:
            await asyncio.to_thread(until, partial(is_locked, url, locked=False), within_s=5, what="no key is left")


async def test_a_killed_gateway_loses_its_own_connections_only(fleet: Fleet) -> None:
    async with client_of(fleet.url) as kept, client_of(second_url(fleet)) as lost:
        expected = await ask(kept, 3, 400)
        pieces = asyncio.Semaphore(0)
        dying = asyncio.create_task(ask(lost, 1, 3000, seen=pieces.release))
        running = asyncio.create_task(ask(kept, 3, 400, seen=pieces.release))
        for _ in range(60):
            await pieces.acquire()
        fleet.forget("g2").process.send_signal(signal.SIGKILL)
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            await dying
        assert await running == expected
        assert fleet.metric("baton_replays_total", reason="worker_lost") == 0
    await asyncio.to_thread(
        until, lambda: fleet.metric("baton_worker_pages", state="used") == 0, within_s=5, what="pages are back"
    )
