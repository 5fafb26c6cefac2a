"""`/v1/usage`: everybody sees their own, an admin everybody's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from gateway_kit import MODEL, FakePipeline, make_app, tiny_model
from litestar import Litestar
from litestar.testing import AsyncTestClient

from fleet.keys import ApiKey, hash_secret
from fleet.redis_client import UNAVAILABLE
from fleet.usage import MemoryUsage, UsageRow
from gateway.api.auth import MemoryKeyStore

Client = AsyncTestClient[Litestar]
BODY = {"model": "nick", "messages": [{"role": "user", "content": "hi"}]}
KEYS = {
    hash_secret(name): ApiKey(key_id=name, name=name, created_s=0, admin=name == "root")
    for name in ("ann", "bob", "root")
}


@pytest.fixture
async def keyed(pipeline: FakePipeline) -> AsyncIterator[Client]:
    pipeline.served = [tiny_model(aliases=("nick",))]
    async with AsyncTestClient(make_app(pipeline, keys=MemoryKeyStore(KEYS))) as client:
        yield client


async def usage(client: Client, name: str, **query: str) -> Any:
    response = await client.get("/v1/usage", params=query, headers={"authorization": f"Bearer {name}"})
    assert response.status_code == 200, response.text
    return response.json()


async def test_what_is_answered_is_counted_and_shown_to_whom_it_concerns(keyed: Client, pipeline: FakePipeline) -> None:
    pipeline.cached_tokens = 3
    spent = []
    for name, stream in (("ann", False), ("ann", True), ("bob", False)):
        body = {**BODY, "stream": stream}
        answer = await keyed.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {name}"})
        assert answer.status_code == 200
        spent.append(None if stream else answer.json()["usage"])
    refused = {**BODY, "temperature": 9}
    await keyed.post("/v1/chat/completions", json=refused, headers={"authorization": "Bearer ann"})
    report = await usage(keyed, "ann")
    (entry,) = report["data"]
    assert (report["object"], report["bucket"]) == ("usage", "hour")
    assert report["start"] <= entry["start"] < report["end"]
    assert (entry["key_id"], entry["model"], entry["requests"]) == ("ann", MODEL, 2)
    assert entry["prompt_tokens"] == 2 * spent[0]["prompt_tokens"]
    assert entry["cached_tokens"] == 6
    assert entry["total_tokens"] == 2 * spent[0]["total_tokens"]
    assert [entry["key_id"] for entry in (await usage(keyed, "root"))["data"]] == ["ann", "bob"]
    assert [entry["key_id"] for entry in (await usage(keyed, "root", key_id="bob"))["data"]] == ["bob"]
    assert (await usage(keyed, "ann", key_id="ann", bucket="day"))["data"][0]["requests"] == 2
    assert (await usage(keyed, "ann", to="1000000"))["data"] == []
    other = await keyed.get("/v1/usage", params={"key_id": "bob"}, headers={"authorization": "Bearer ann"})
    assert (other.status_code, other.json()["error"]["type"]) == (403, "permission_error")
    assert (await keyed.get("/v1/usage")).status_code == 401


async def test_an_open_server_shows_everything_and_names_bad_parameters(client: Client) -> None:
    await client.post("/v1/completions", json={"model": MODEL, "prompt": "hi"})
    (entry,) = (await client.get("/v1/usage")).json()["data"]
    assert (entry["key_id"], entry["requests"]) == (None, 1)
    for query, param in (
        ({"bucket": "week"}, "bucket"),
        ({"from": "yesterday"}, "from"),
        ({"to": "-5"}, "to"),
        ({"from": "10", "to": "5"}, "from"),
        ({"from": "0"}, "from"),
    ):
        answer = await client.get("/v1/usage", params=query)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_usage_that_cannot_be_read_is_a_503(pipeline: FakePipeline) -> None:
    class Away(MemoryUsage):
        async def read(self, *_: int) -> list[UsageRow]:
            raise UNAVAILABLE[0]

    async with AsyncTestClient(make_app(pipeline, usage=Away())) as client:
        answer = await client.get("/v1/usage")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
