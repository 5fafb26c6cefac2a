"""Too little room, too many requests, missing keys: everything that is admitted still ends right."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from support.fleet import DEMO, Fleet, until
from support.redis_server import RedisServer

from fleet.keys import KeyRegistry
from fleet.redis_client import connect

pytestmark = pytest.mark.e2e

PAGE_BYTES = 5 * 2 * 2 * 16 * 64 * 4  # of the demo model in float32
NO_REDIS = "redis://127.0.0.1:1/0"
WORKER = {"model": DEMO, "served_model_name": "demo", "dtype": "float32", "max_model_len": 256}


@pytest.fixture(scope="module")
def fleet(module_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A decode worker with forty pages, which admits without looking ahead and so runs out of them."""
    with Fleet(module_redis, tmp_path_factory.mktemp("fleet")) as fleet:
        fleet.start("prefill_svc", "p", **WORKER)
        fleet.start("decode_svc", "d", kv_cache_bytes=40 * PAGE_BYTES, lookahead_tokens=0, **WORKER)
        fleet.gateway(max_queued_requests=24)
        fleet.wait_ready()
        yield fleet


def complete(client: openai.OpenAI, number: int) -> str:
    answer = client.completions.create(
        model="demo",
        prompt=f"Request number {number} says: " * 3,
        max_tokens=150,
        temperature=1.0,
        seed=number,
        extra_body={"ignore_eos": True},
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 150
    return answer.choices[0].text


def test_out_of_pages_the_youngest_goes_back_and_still_ends_right(fleet: Fleet) -> None:
    with fleet.client() as client, ThreadPoolExecutor(12) as threads, ThreadPoolExecutor(3) as as_many_as_fit:
        alone = list(as_many_as_fit.map(lambda number: complete(client, number), range(12)))
        together = list(threads.map(lambda number: complete(client, number), range(12)))
    assert together == alone
    until(
        lambda: fleet.metric("baton_worker_returned_total", reason="out_of_pages") > 0,
        within_s=20,
        what="some sequence was given back",
    )
    until(lambda: fleet.metric("baton_worker_pages", state="used") == 0, within_s=20, what="all pages are back")


def test_a_full_queue_is_told_at_once_and_nobody_else_suffers(fleet: Fleet) -> None:
    async def flood() -> tuple[list[int], list[float], list[str]]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=fleet.url, timeout=60, limits=limits) as client:

            async def one() -> tuple[int, float, str]:
                began_s = time.monotonic()
                body = {"model": "demo", "prompt": "Once " * 40, "max_tokens": 60, "ignore_eos": True}
                answer = await client.post("/v1/completions", json=body)
                return answer.status_code, time.monotonic() - began_s, answer.headers.get("retry-after", "")

            results = await asyncio.gather(*(one() for _ in range(80)))
        return [r[0] for r in results], [r[1] for r in results if r[0] == 429], [r[2] for r in results if r[0] == 429]

    statuses, refused_s, hints = asyncio.run(flood())
    admitted, refused = statuses.count(200), statuses.count(429)
    print(f"admitted {admitted}, refused {refused}, slowest refusal {max(refused_s) * 1e3:.0f} ms")
    assert set(statuses) == {200, 429}
    assert admitted >= 24
    assert all(int(hint) >= 1 for hint in hints)


async def test_keys_are_required_as_soon_as_one_exists(fleet: Fleet) -> None:
    redis = connect(fleet.redis.url)
    keys = KeyRegistry(redis, namespace=fleet.namespace)
    key, secret = await keys.create("alice", requests_per_minute=2)
    other, elsewhere = await keys.create("bob", models=("another-model",))
    try:
        await asyncio.sleep(1.5)
        options = {"base_url": f"{fleet.url}/v1", "max_retries": 0, "timeout": 30}
        async with openai.AsyncOpenAI(api_key="bt-wrong", **options) as stranger:
            with pytest.raises(openai.AuthenticationError) as refused:
                await stranger.models.list()
            assert refused.value.code == "invalid_api_key"
        async with openai.AsyncOpenAI(api_key=elsewhere, **options) as bob:
            with pytest.raises(openai.NotFoundError):
                await bob.completions.create(model="demo", prompt="x", max_tokens=1)
        async with openai.AsyncOpenAI(api_key=secret, **options) as alice:
            for _ in range(2):
                await alice.completions.create(model="demo", prompt="x", max_tokens=1)
            with pytest.raises(openai.RateLimitError) as limited:
                await alice.completions.create(model="demo", prompt="x", max_tokens=1)
            assert int(limited.value.response.headers["retry-after"]) >= 1
        assert secret not in fleet.services["g"].text()
    finally:
        await keys.revoke(key.key_id)
        await keys.revoke(other.key_id)
        await redis.aclose()
    await asyncio.sleep(1.5)
    async with openai.AsyncOpenAI(api_key="none", **options) as anybody:
        assert (await anybody.models.list()).data[0].id == "demo"


async def test_keys_meet_their_own_cached_prefixes_alone_and_see_their_own_usage(fleet: Fleet) -> None:
    redis = connect(fleet.redis.url)
    keys = KeyRegistry(redis, namespace=fleet.namespace)
    made = [await keys.create(name, admin=name == "root") for name in ("ann", "bob", "root")]
    try:
        await asyncio.sleep(1.5)
        cached: list[int] = []
        for who in (0, 0, 1, 1, 0):
            async with openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key=made[who][1], max_retries=0) as client:
                answer = await client.completions.create(model="demo", prompt=[7, 8, 9, 10] * 12, max_tokens=1)
                assert answer.usage is not None
                assert answer.usage.prompt_tokens_details is not None
                cached.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
        assert cached == [0, 32, 0, 32, 32]
        ann, bob, root = (key.key_id for key, _ in made)
        async with httpx.AsyncClient(base_url=fleet.url, timeout=10) as http:

            async def report(who: int, **query: str) -> httpx.Response:
                headers = {"authorization": f"Bearer {made[who][1]}"}
                return await http.get("/v1/usage", params=query, headers=headers)

            own = (await report(0)).json()["data"]
            sums = [sum(entry[name] for entry in own) for name in ("requests", "prompt_tokens", "cached_tokens")]
            assert {entry["key_id"] for entry in own} == {ann}
            assert sums == [3, 3 * 48, 64]
            everybodys = {entry["key_id"] for entry in (await report(2)).json()["data"]}
            assert {ann, bob} <= everybodys
            assert root not in everybodys
            assert (await report(0, key_id=bob)).status_code == 403
    finally:
        for key, _ in made:
            await keys.revoke(key.key_id)
        await redis.aclose()
    await asyncio.sleep(1.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "0.0.0.0"}, "no API key exists"),
        ({"bind_host": "0.0.0.0", "redis_url": NO_REDIS}, "BATON_CLUSTER_SECRET"),
        ({"tool_format": "telepathy", "redis_url": NO_REDIS}, "BATON_TOOL_FORMAT"),
        ({"lease_s": "soon"}, "BATON_LEASE_S"),
        ({"max_step_tokenz": "1"}, "BATON_MAX_STEP_TOKENS"),
    ],
)
def test_a_gateway_that_should_not_start_says_why(fleet: Fleet, settings: dict[str, str], message: str) -> None:
    fleet.start("gateway", "bad", port=0, **settings)
    service = fleet.forget("bad")
    assert service.process.wait(timeout=20) == 2
    assert message in service.text()
    assert "Traceback" not in service.text()
    service.log.unlink()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"bind_host": "0.0.0.0"}, "BATON_CLUSTER_SECRET"), ({"reclaim_notice": "ovh"}, "BATON_RECLAIM_NOTICE")],
)
def test_a_worker_tells_bad_settings_before_it_loads_its_model(
    fleet: Fleet, settings: dict[str, str], message: str
) -> None:
    fleet.start("decode_svc", "bad", model="/nowhere/at-all", **settings)
    service = fleet.forget("bad")
    assert service.process.wait(timeout=30) == 2
    assert message in service.text()
    service.log.unlink()


@pytest.mark.parametrize("module", ["gateway", "prefill_svc"])
def test_who_waits_for_redis_can_be_stopped(fleet: Fleet, module: str) -> None:
    settings = {"port": 0} if module == "gateway" else WORKER
    fleet.start(module, "waits", redis_url=NO_REDIS, **settings)
    service = fleet.forget("waits")
    until(lambda: "Redis is away" in service.text(), within_s=30, what="it waits")
    assert service.stop() == 0, service.text()
    service.log.unlink()


def test_a_worker_that_cannot_serve_its_model_says_why(fleet: Fleet) -> None:
    fleet.start("decode_svc", "bad", model="/nowhere/at-all")
    service = fleet.forget("bad")
    assert service.process.wait(timeout=30) != 0
    assert "/nowhere/at-all" in service.text()
    assert "Traceback" not in service.text()
