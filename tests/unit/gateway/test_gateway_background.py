"""Background responses: they outlive connections and gateways, and every reader sees the same events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from gateway_kit import MODEL, FakePipeline, eventually, make_app, serving
from support.redis_server import RedisServer

from fleet.redis_client import Redis
from fleet.types import FinishReason
from gateway.api.responses_api.store import ResponseStore
from gateway.errors import Overloaded
from gateway.pipeline import Tokens

URL = "/v1/responses"
ASK: dict[str, Any] = {"model": MODEL, "input": "hi", "background": True}
TEXT = "one two three four five six seven eight nine ten 🙂 and so on"
LEASE_S = 0.5


@contextlib.asynccontextmanager
async def gateway(pipeline: FakePipeline, redis: Redis) -> AsyncIterator[httpx.AsyncClient]:
    """One gateway of several over a Redis."""
    store = ResponseStore(redis, namespace="unit", ttl_s=600)
    async with (
        serving(make_app(pipeline, responses=store, lease_s=LEASE_S)) as url,
        httpx.AsyncClient(base_url=url, timeout=20) as client,
    ):
        yield client


@pytest.fixture
async def first(pipeline: FakePipeline, redis: Redis) -> AsyncIterator[httpx.AsyncClient]:
    pipeline.text = TEXT
    async with gateway(pipeline, redis) as client:
        yield client


@pytest.fixture
async def second(first: httpx.AsyncClient, redis: Redis) -> AsyncIterator[httpx.AsyncClient]:  # noqa: ARG001 - in order
    """Another gateway, whose own pipeline says the same."""
    pipeline = FakePipeline()
    pipeline.text = TEXT
    async with gateway(pipeline, redis) as client:
        yield client


def sdk(client: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)


async def ended(client: httpx.AsyncClient, response_id: str) -> dict[str, Any]:
    """Poll until the status is an end."""
    async with asyncio.timeout(20):
        while True:
            body: dict[str, Any] = (await client.get(f"{URL}/{response_id}")).json()
            if body["status"] not in {"queued", "in_progress"}:
                return body
            await asyncio.sleep(0.02)


async def read(client: httpx.AsyncClient, response_id: str, *, after: int | None = None) -> list[bytes]:
    """Events of a response to its end."""
    query = "" if after is None else f"&starting_after={after}"
    answer = await client.get(f"{URL}/{response_id}?stream=true{query}")
    assert answer.status_code == 200, answer.text
    return [event for event in answer.content.split(b"\n\n") if event]


async def begun(client: httpx.AsyncClient) -> tuple[str, list[bytes]]:
    """Start a stream in the background and leave after a few events. Returns the id and the events seen."""
    seen = b""
    async with client.stream("POST", URL, json={**ASK, "stream": True}) as answer:
        assert answer.status_code == 200
        async for part in answer.aiter_bytes():
            seen += part
            if seen.count(b"\n\n") >= 7:
                break
    events = seen.split(b"\n\n")[:-1]
    return events[0].partition(b'"id":"')[2].partition(b'"')[0].decode(), events


async def test_it_is_queued_at_once_and_polled_to_its_end(
    first: httpx.AsyncClient, second: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    pipeline.hold_after = 3
    async with sdk(first) as here, sdk(second) as there:
        queued = await here.responses.create(**ASK)
        assert (queued.status, queued.output, queued.background) == ("queued", [], True)
        await eventually(lambda: bool(pipeline.generations))
        async with asyncio.timeout(20):
            while (await there.responses.retrieve(queued.id)).status == "queued":  # noqa: ASYNC110 (a poll is the test)
                await asyncio.sleep(0.02)
        with pytest.raises(openai.BadRequestError) as refused:
            await here.responses.create(model=MODEL, input="x", previous_response_id=queued.id)
        assert refused.value.code == "previous_response_not_finished"
        with pytest.raises(openai.BadRequestError):
            await here.responses.retrieve(queued.id, stream=True)  # it was not created with stream
        pipeline.go_on.set()
        body = await ended(second, queued.id)
        assert body["status"] == "completed"
        assert body["output"][0]["content"][0]["text"] == TEXT
        after = await there.responses.create(model=MODEL, input="more", previous_response_id=queued.id)
        assert after.status == "completed"


async def test_a_reader_who_left_comes_back_through_another_gateway(
    first: httpx.AsyncClient, second: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    pipeline.hold_after = 9
    response_id, seen = await begun(first)
    live = [asyncio.create_task(read(client, response_id, after=len(seen) - 1)) for client in (first, second, second)]
    await asyncio.sleep(0)
    pipeline.go_on.set()
    rests = await asyncio.gather(*live)
    assert rests[0] == rests[1] == rests[2]
    whole = await read(second, response_id)
    assert whole == [*seen, *rests[0]]
    assert b"response.queued" in whole[1]
    assert whole[-1].startswith(b"event: response.completed")
    for number in (0, 3, len(whole) // 2, len(whole) - 2, len(whole) - 1, len(whole) + 5):
        assert await read(second, response_id, after=number) == whole[number + 1 :]
    async with sdk(second) as there:
        stream = await there.responses.retrieve(response_id, stream=True)
        numbers = [event.sequence_number async for event in stream]
    assert numbers == list(range(len(whole)))
    async with sdk(first) as here, here.responses.stream(response_id=response_id, starting_after=4) as helper:
        told = [event.sequence_number async for event in helper]
    assert told == list(range(5, len(whole)))


async def test_another_gateway_takes_a_run_over(pipeline: FakePipeline, redis: Redis) -> None:
    pipeline.text = TEXT
    pipeline.hold_after = 6
    heir = FakePipeline()
    heir.text = TEXT
    async with gateway(pipeline, redis) as first:
        response_id, seen = await begun(first)
    async with gateway(heir, redis) as second:
        events = await read(second, response_id)
        body = await ended(second, response_id)
    assert events[: len(seen)] == seen
    assert body["output"][0]["content"][0]["text"] == TEXT
    for number, event in enumerate(events):
        assert event.endswith(f'"sequence_number":{number}}}'.encode())
    assert heir.submitted[0]["ids"] == pipeline.submitted[0]["ids"]
    assert heir.submitted[0]["params"] == pipeline.submitted[0]["params"]
    assert heir.generations[0].request_id != pipeline.generations[0].request_id
    assert 0 < heir.submitted[0]["num_known"] <= 6


async def test_a_gateway_that_was_thought_dead_falls_silent(
    first: httpx.AsyncClient, pipeline: FakePipeline, redis: Redis
) -> None:
    pipeline.hold_after = 6
    response_id, seen = await begun(first)
    await redis.hset(f"unit:response:{response_id}", "owner", "another")
    before = await redis.xrange(f"unit:response_events:{response_id}")
    pipeline.go_on.set()
    await eventually(lambda: pipeline.generations[0].num_closes > 0)
    await asyncio.sleep(0.1)
    assert await redis.xrange(f"unit:response_events:{response_id}") == before
    assert len(seen) > 4


async def test_cancel_ends_it_for_good_through_any_gateway(
    first: httpx.AsyncClient, second: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    pipeline.hold_after = 3
    async with sdk(first) as here, sdk(second) as there:
        for client in (here, there):
            pipeline.generations.clear()
            made = await here.responses.create(**ASK)
            await eventually(lambda: bool(pipeline.generations))
            cancelled = await client.responses.cancel(made.id)
            again = await client.responses.cancel(made.id)
            assert (cancelled.status, again.status) == ("cancelled", "cancelled")
            await eventually(lambda: pipeline.generations[0].num_closes > 0)
            assert (await client.responses.retrieve(made.id)).status == "cancelled"
        done = await there.responses.create(**ASK)
    body = await ended(first, done.id)
    assert (await first.post(f"{URL}/{done.id}/cancel")).json() == body


async def test_readers_of_a_cancelled_or_deleted_run_are_let_go(
    first: httpx.AsyncClient, second: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    pipeline.hold_after = 6
    response_id, seen = await begun(first)
    reader = asyncio.create_task(read(second, response_id))
    await first.post(f"{URL}/{response_id}/cancel")
    events = await reader
    assert events[: len(seen)] == seen
    assert b'"status":"cancelled"' in events[-1]
    assert f'"sequence_number":{len(events) - 1}}}'.encode() in events[-1]
    response_id, _ = await begun(first)
    reader = asyncio.create_task(read(second, response_id))
    await asyncio.sleep(0.05)
    assert (await second.delete(f"{URL}/{response_id}")).json()["deleted"] is True
    await reader
    await eventually(lambda: pipeline.generations[-1].num_closes > 0)
    assert (await first.get(f"{URL}/{response_id}?stream=true")).status_code == 404


async def test_want_of_workers_or_room_is_waited_out_and_errors_end_it(
    first: httpx.AsyncClient, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.api.responses_api.background_run.RETRY_S", 0.02)
    pipeline.refuse = Overloaded("full")
    made = (await first.post(URL, json=ASK)).json()
    await asyncio.sleep(0.1)
    assert (await first.get(f"{URL}/{made['id']}")).json()["status"] == "queued"
    pipeline.end = Tokens(token_ids=[], finish=FinishReason.ERROR, error="no workers", retry_after_s=1)
    pipeline.refuse = None
    await eventually(lambda: len(pipeline.generations) > 2)
    pipeline.end = None
    body = await ended(first, made["id"])
    assert (body["status"], body["output"][0]["content"][0]["text"]) == ("completed", TEXT)
    pipeline.end = Tokens(token_ids=[], finish=FinishReason.ERROR, error="It broke.")
    made = (await first.post(URL, json=ASK)).json()
    body = await ended(first, made["id"])
    assert (body["status"], body["error"]) == ("failed", {"code": "server_error", "message": "It broke."})


async def test_an_outage_of_redis_is_caught_up_with(
    pipeline: FakePipeline, redis: Redis, redis_server: RedisServer
) -> None:
    """A server that stops answering and comes back; what it held is gone, so the run ends with its record."""
    pipeline.text = TEXT
    async with gateway(pipeline, redis) as client:
        redis_server.stop()
        answer = await client.post(URL, json=ASK)
        assert answer.status_code == 503
        plain = await client.post(URL, json={"model": MODEL, "input": "hi"})
        assert plain.json()["status"] == "completed"
        assert (await client.get(f"{URL}/{plain.json()['id']}")).status_code == 503
        redis_server.start()
        made = (await client.post(URL, json=ASK)).json()
        assert (await ended(client, made["id"]))["status"] == "completed"
