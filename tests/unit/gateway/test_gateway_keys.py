"""API keys and quotas."""

from __future__ import annotations

from typing import Any

import pytest
from gateway_kit import MODEL, FakePipeline, encode, make_app, tiny_model
from limits.aio.storage import MemoryStorage
from litestar import Litestar
from litestar.testing import AsyncTestClient

from fleet.keys import ApiKey, hash_secret
from fleet.redis_client import Redis, as_bytes
from gateway.api.auth import KeyStoreUnavailable, MemoryKeyStore
from gateway.api.rate_limit import RateLimiter
from gateway.errors import RateLimited

Client = AsyncTestClient[Litestar]
SECRET = "bt-0-secret"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"


def app_with(pipeline: FakePipeline, limiter: RateLimiter | None = None, **fields: Any) -> Litestar:
    key = ApiKey(key_id="0", name="test", created_s=0, **fields)
    return make_app(pipeline, keys=MemoryKeyStore({hash_secret(SECRET): key}), limiter=limiter)


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


async def test_the_key_is_checked_before_the_body_is_read(pipeline: FakePipeline) -> None:
    async with AsyncTestClient(app_with(pipeline)) as client:
        for headers in (
            {}, bearer("wrong"), bearer(""), {"authorization": SECRET}, {"authorization": f"Basic {SECRET}"},
            bearer("x" * 5000), bearer("ÿþ"),
        ):  # fmt: skip
            raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
            response = await client.post(CHAT, content=b"{not json", headers=[*raw, (b"content-type", b"text/plain")])
            assert response.status_code == 401
            error = response.json()["error"]
            assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
            assert "wrong" not in response.text
            assert response.headers["x-request-id"]
        assert (await client.post(CHAT, json={**BODY, "stream": True})).status_code == 401
        for scheme in ("Bearer", "bearer"):
            ok = await client.post(CHAT, json=BODY, headers={"authorization": f"{scheme} {SECRET}"})
            assert ok.status_code == 200
        for path in ("/v1/models", "/v1/models/org%2Ftiny"):
            assert (await client.get(path)).status_code == 401
        assert (await client.post("/tokenize", json={"prompt": "x"})).status_code == 401


async def test_health_metrics_and_schema_need_no_key(pipeline: FakePipeline) -> None:
    async with AsyncTestClient(app_with(pipeline)) as client:
        for path in ("/health", "/health/live", "/health/ready", "/metrics", "/schema", "/schema/openapi.json"):
            assert (await client.get(path)).status_code == 200
        assert (await client.get("/nope")).status_code == 404


async def test_a_key_is_asked_for_from_the_moment_the_store_says_so(client: Client, pipeline: FakePipeline) -> None:
    for headers in ({}, bearer("anything")):
        assert (await client.post(CHAT, json=BODY, headers=headers)).status_code == 200
    store = MemoryKeyStore({}, required=False)
    async with AsyncTestClient(make_app(pipeline, keys=store)) as other:
        assert (await other.post(CHAT, json=BODY)).status_code == 200
        store.required = True
        assert (await other.post(CHAT, json=BODY)).status_code == 401


async def test_a_key_may_be_bound_to_models(pipeline: FakePipeline) -> None:
    pipeline.served.append(tiny_model(name="other", aliases=("nick",)))
    async with AsyncTestClient(app_with(pipeline, models=("nick",))) as client:
        headers = bearer(SECRET)
        assert (await client.post(CHAT, json=BODY, headers=headers)).status_code == 404
        assert (await client.post(CHAT, json={**BODY, "model": "nick"}, headers=headers)).status_code == 200
        listed = (await client.get("/v1/models", headers=headers)).json()["data"]
        assert [entry["id"] for entry in listed] == ["other", "nick"]
        assert (await client.get("/v1/models/org%2Ftiny", headers=headers)).status_code == 404


async def test_keys_that_cannot_be_looked_up_are_a_503(pipeline: FakePipeline) -> None:
    class Away:
        required = True

        async def lookup(self, _: str) -> ApiKey | None:
            raise KeyStoreUnavailable

    async with AsyncTestClient(make_app(pipeline, keys=Away())) as client:
        response = await client.post(CHAT, json=BODY, headers=bearer(SECRET))
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"


async def test_requests_per_minute(pipeline: FakePipeline) -> None:
    async with AsyncTestClient(app_with(pipeline, requests_per_minute=2)) as client:
        for left in ("1", "0"):
            response = await client.post(CHAT, json={**BODY, "stream": left == "0"}, headers=bearer(SECRET))
            assert response.status_code == 200
            assert response.headers["x-ratelimit-limit-requests"] == "2"
            assert response.headers["x-ratelimit-remaining-requests"] == left
        for stream in (False, True):
            refused = await client.post(CHAT, json={**BODY, "stream": stream}, headers=bearer(SECRET))
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert len(pipeline.submitted) == 2


async def test_tokens_per_minute_count_prompt_and_output(pipeline: FakePipeline) -> None:
    async with AsyncTestClient(app_with(pipeline, tokens_per_minute=60)) as client:
        first = await client.post(CHAT, json=BODY, headers=bearer(SECRET))
        prompt = first.json()["usage"]["prompt_tokens"]
        assert first.headers["x-ratelimit-remaining-tokens"] == str(60 - prompt)
        second = await client.post(CHAT, json=BODY, headers=bearer(SECRET))
        spent = 2 * prompt + len(encode(tiny_model(), "hello world")) + 1
        assert second.headers["x-ratelimit-remaining-tokens"] == str(60 - spent)
        third = await client.post(CHAT, json=BODY, headers=bearer(SECRET))
        assert third.status_code == 429
        assert third.headers["retry-after"]
        large = {**BODY, "messages": [{"role": "user", "content": "x y " * 30}]}
        refused = await client.post(CHAT, json=large, headers=bearer(SECRET))
        assert refused.status_code == 429
        assert refused.headers["x-should-retry"] == "false"


async def test_gateways_share_quotas_through_redis(redis: Redis) -> None:
    key = ApiKey(key_id="k", name="n", created_s=0, requests_per_minute=3, tokens_per_minute=100)
    first, second = (RateLimiter.on_redis(redis, namespace="t") for _ in range(2))
    for limiter in (first, second, first):
        await limiter.admit(key, 10)
    with pytest.raises(RateLimited):
        await second.admit(key, 10)
    await first.charge_output(key, 60)
    free = ApiKey(key_id="k", name="n", created_s=0, tokens_per_minute=100)
    assert (await second.admit(free, 5))["x-ratelimit-remaining-tokens"] == "5"
    assert all(as_bytes(name).startswith(b"t:limits") for name in await redis.keys())


async def test_a_lost_storage_means_counting_alone() -> None:
    class Broken(MemoryStorage):
        async def incr(self, *_: Any, **__: Any) -> int:
            raise ConnectionError("away")

        async def acquire_sliding_window_entry(self, *_: Any, **__: Any) -> bool:
            raise ConnectionError("away")

    limiter = RateLimiter(Broken(), (OSError,))
    key = ApiKey(key_id="k", name="n", created_s=0, requests_per_minute=1, tokens_per_minute=50)
    assert (await limiter.admit(key, 10))["x-ratelimit-remaining-requests"] == "0"
    await limiter.charge_output(key, 5)
    with pytest.raises(RateLimited, match="requests per minute"):
        await limiter.admit(key, 1)
