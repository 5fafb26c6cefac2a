"""Workers leave when told to, in every way, and come again; two gateways act as one; Redis stands still and forgets."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import redis
from support.fleet import DEMO, Fleet, until
from support.redis_server import RedisServer
from support.tailed_stream import TailedStream, answer_of

from fleet.keys import KeyRegistry
from fleet.redis_client import connect

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

LEASE_S = 2.0
PAUSE_S = 10.0
IMPATIENT_S = 1.5
WITHIN_S = 40.0
WAYS = {"decode-1": ["reclaim"], "decode-2": ["reclaim"], "decode-3": ["drain"], "decode-4": []}
"""Why streams leave these workers at first, if they do; those who take over may be told to leave themselves."""


class Cloud(ThreadingHTTPServer):
    """A metadata service in the way of Google's; `preempted` is what it says."""

    preempted = False

    def __init__(self) -> None:
        cloud = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = self.path == "/computeMetadata/v1/instance/preempted"
                body = (b"TRUE" if cloud.preempted else b"FALSE") if found else b"no such thing"
                self.send_response(200 if found and self.headers["Metadata-Flavor"] == "Google" else 403)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002 - its name in the base class

        super().__init__(("127.0.0.1", 0), Answer)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class House:
    """The fleet behind two gateways, and what its workers are told by."""

    def __init__(self, fleet: Fleet, directory: Path, cloud: Cloud) -> None:
        self.fleet, self.cloud = fleet, cloud
        self.notice, self.socket = directory / "notice", directory / "admin.sock"
        self.add("prefill-1")
        self.add("decode-1", reclaim_file=self.notice)
        self.add("decode-2", reclaim_notice="gcp", reclaim_url=cloud.url)
        self.add("decode-3", admin_address=f"unix:{self.socket}")
        self.add("decode-4")
        self.urls = {"g2": fleet.gateway("g2", worker_wait_s=IMPATIENT_S), "g1": fleet.gateway("g1", worker_wait_s=60)}
        fleet.wait_ready(decode=4)

    def add(self, name: str, **settings: object) -> None:
        worker = {"model": DEMO, "served_model_name": "demo", "dtype": "float32", "drain_timeout_s": 30, **settings}
        self.fleet.start(f"{name.partition('-')[0]}_svc", name, **worker)

    async def ready(self, gateway: str, **workers: int) -> None:
        self.fleet.url = self.urls[gateway]
        await asyncio.to_thread(self.fleet.wait_ready, **workers)

    def client(self, gateway: str = "g1", key: str = "none") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.urls[gateway]}/v1", api_key=key, max_retries=0, timeout=90)

    def metric(self, name: str, *, gateway: str = "g1", **labels: str) -> float:
        self.fleet.url = self.urls[gateway]
        return self.fleet.metric(name, **labels)

    def hops(self, request_id: str) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self.urls['g1']}/v1/requests/{request_id}")
        return list(answer.raise_for_status().json()["hops"])

    def is_on(self, request_id: str, worker: str) -> bool:
        """Whether it is there, and why it came there has been told too."""
        hops = self.hops(request_id)
        return hops[-1]["worker"] == worker and not any(hop["reason"] == "handed_off" for hop in hops)


@pytest.fixture(scope="module")
def house(module_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    directory = tmp_path_factory.mktemp("fleet")
    with Cloud() as cloud, Fleet(module_redis, directory, settings={"lease_s": str(LEASE_S)}) as fleet:
        yield House(fleet, directory, cloud)


async def eventually(condition: Callable[[], object], what: str) -> None:
    await asyncio.to_thread(until, condition, within_s=WITHIN_S, what=what)


def post_drain(socket: Path) -> None:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://worker") as client:
        assert client.get("/status").json()["draining"] is False
        assert client.post("/drain").json()["draining"] is True


def baton(fleet: Fleet, *arguments: str) -> str:
    """Run the command against this fleet's Redis; returns what it printed."""
    command = [sys.executable, "-m", "baton", *arguments, "--redis-url", fleet.redis.url, "--namespace", "test"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


async def test_workers_leave_in_every_way_until_none_is_left_and_streams_wait_for_the_next(house: House) -> None:
    fleet = house.fleet
    async with house.client() as client, AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(TailedStream(client, number)) for number in range(4)]
        for stream in streams:
            await stream.grow()
        assert {house.hops(stream.request_id)[-1]["worker"] for stream in streams} == set(WAYS)
        house.notice.write_text("going")
        house.cloud.preempted = True
        post_drain(house.socket)
        for stream in streams:
            await eventually(partial(house.is_on, stream.request_id, "decode-4"), "streams move to who is left")
            _, origin, *moves = house.hops(stream.request_id)
            assert [hop["reason"] for hop in moves[:1]] == WAYS[origin["worker"]]
            assert {(hop["epoch"], hop["role"], hop["transport"]) for hop in (origin, *moves)} == {(0, "decode", "shm")}
        for name in ("decode-1", "decode-2", "decode-3"):
            service = fleet.forget(name)
            assert await asyncio.to_thread(service.process.wait, WITHIN_S) == 0, service.text()[-4000:]
        await asyncio.gather(*(stream.grow() for stream in streams))
        assert house.metric("baton_migrations_total", reason="reclaim") >= 2
        assert house.metric("baton_migrations_total", reason="drain") >= 1
        # Who is handed on at once has said nothing between two moves.
        assert 3 <= house.metric("baton_migration_pause_seconds_count") <= house.metric("baton_migrations_total")
        assert house.metric("baton_replays_total") == 0

        last_one = fleet.forget("decode-4")
        printed = await asyncio.to_thread(baton, fleet, "drain", "decode-4", "--timeout", "0.2")
        assert "decode-4 has left" in printed
        assert await asyncio.to_thread(last_one.process.wait, WITHIN_S) == 0
        newcomer = asyncio.create_task(answer_of(client, 9, 20))
        house.add("decode-5")
        await asyncio.gather(*(stream.grow() for stream in streams))
        for stream in streams:
            await eventually(partial(house.is_on, stream.request_id, "decode-5"), "streams go on at the next")
            hops = house.hops(stream.request_id)
            assert [(hop["worker"], hop["epoch"], hop["reason"]) for hop in hops[-2:]] == [
                ("prefill-1", 1, "draining"),
                ("decode-5", 1, "prefilled"),
            ]
            assert [hop["at_s"] for hop in hops] == sorted(hop["at_s"] for hop in hops)
        assert house.metric("baton_replays_total", reason="draining") == len(streams)
        assert house.metric("baton_replay_pause_seconds_count") == len(streams)
        await asyncio.gather(*(stream.check() for stream in streams))
        assert await newcomer == await answer_of(client, 9, 20)


async def test_without_a_worker_one_gateway_gives_up_and_the_other_waits_on(house: House) -> None:
    async with house.client("g1") as patient, house.client("g2") as impatient:
        await house.ready("g2")
        async with TailedStream(impatient, 1) as lost, TailedStream(patient, 2) as kept:
            await asyncio.gather(lost.grow(), kept.grow())
            house.fleet.forget("decode-5").kill()
            waiting = asyncio.create_task(answer_of(patient, 3, 20))
            with pytest.raises(openai.APIError, match="no worker came for 'demo'"):
                await lost.end()
            with pytest.raises(openai.InternalServerError) as refused:
                await answer_of(impatient, 1, 20)
            assert refused.value.status_code == 503
            assert int(refused.value.response.headers["retry-after"]) > 0
            assert not waiting.done()
            house.add("decode-6")
            await kept.grow()
            await eventually(partial(house.is_on, kept.request_id, "decode-6"), "the stream goes on")
            hops = house.hops(kept.request_id)[-2:]
            assert [(hop["worker"], hop["epoch"], hop["reason"]) for hop in hops] == [
                ("prefill-1", 1, "worker_lost"),
                ("decode-6", 1, "prefilled"),
            ]
            assert await waiting == await answer_of(patient, 3, 20)
            await kept.check()
        assert house.metric("baton_replays_total", reason="worker_lost") >= 1


async def test_keys_limits_and_streams_outlive_a_redis_that_stands_still_or_forgets(house: House) -> None:
    fleet = house.fleet
    async with connect(fleet.redis.url) as client:
        keys = KeyRegistry(client, namespace=fleet.namespace)
        _, secret = await keys.create("alice")
        _, counted = await keys.create("bob", requests_per_minute=4)
    for gateway in house.urls:
        await eventually(partial(needs_key, house, gateway), f"{gateway} knows the keys")
    outcomes = [await admits(house, ("g1", "g2")[number % 2], counted) for number in range(10)]
    assert 4 <= outcomes.count(True) <= 5, "a minute that ends meanwhile may free one; two gateways alone would give 8"

    async with house.client("g1", secret) as first, house.client("g2", secret) as second, AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(TailedStream(client, 1)) for client in (first, second)]
        expected = await answer_of(first, 5, 20)
        await asyncio.gather(*(stream.grow() for stream in streams))
        fleet.redis.pause()
        resumed = asyncio.get_running_loop().call_later(PAUSE_S, fleet.redis.resume)
        house.add("decode-7")
        while asyncio.get_running_loop().time() < resumed.when() - 1:
            for client in (first, second):
                assert await answer_of(client, 5, 20) == expected
            await asyncio.gather(*(stream.grow() for stream in streams))
            for gateway in house.urls:
                assert await asyncio.to_thread(needs_key, house, gateway)
        await house.ready("g1", decode=2)
        await house.ready("g2", decode=2)

        fleet.redis.stop()
        for client in (first, second):
            assert await answer_of(client, 5, 20) == expected
        fleet.redis.start()
        house.add("prefill-2")
        workers = {b"prefill-1", b"prefill-2", b"decode-6", b"decode-7"}
        with redis.Redis.from_url(fleet.redis.url) as kept:
            await eventually(lambda: kept.hlen("test:keys") == 2, "keys are written back")
            await eventually(lambda: kept.smembers("test:workers") == workers, "workers are registered again")
        await house.ready("g1", prefill=2, decode=2)
        for client in (first, second):
            assert await answer_of(client, 5, 20) == expected
        await asyncio.gather(*(stream.grow() for stream in streams))
        await asyncio.gather(*(stream.check() for stream in streams))
        for key_id in (secret.split("-")[1], counted.split("-")[1]):
            await asyncio.to_thread(baton, fleet, "keys", "revoke", key_id)
    for gateway in house.urls:
        await eventually(lambda gateway=gateway: not needs_key(house, gateway), f"{gateway} knows of no key")


def needs_key(house: House, gateway: str) -> bool:
    return httpx.get(f"{house.urls[gateway]}/v1/models").status_code == 401


async def admits(house: House, gateway: str, key: str) -> bool:
    async with house.client(gateway, key) as client:
        try:
            await answer_of(client, 0, 1)
        except openai.RateLimitError as refused:
            return not 0 < int(refused.response.headers["retry-after"]) <= 60
    return True


async def test_a_killed_gateway_loses_its_own_connections_only(house: House) -> None:
    replays = house.metric("baton_replays_total")
    async with (
        house.client("g1") as kept,
        house.client("g2") as lost,
        TailedStream(lost, 1) as dying,
        TailedStream(kept, 3) as running,
    ):
        await asyncio.gather(dying.grow(), running.grow())
        house.fleet.forget("g2").kill()
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            await dying.end()
        await eventually(lambda: house.metric("baton_worker_running", role="decode") == 1, "its sequence is gone")
        await running.grow()
        assert {hop["epoch"] for hop in house.hops(running.request_id)} == {0}
        await running.check()
    assert house.metric("baton_replays_total") == replays
    await eventually(lambda: house.metric("baton_worker_pages", state="used") == 0, "pages are back")
