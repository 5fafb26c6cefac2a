"""What browsers and load balancers ask of a server: CORS, and HEAD."""

from __future__ import annotations

import pytest
from gateway_kit import MODEL, FakePipeline, make_app
from litestar import Litestar
from litestar.testing import AsyncTestClient

from fleet.keys import ApiKey, hash_secret
from gateway.api.auth import MemoryKeyStore

Client = AsyncTestClient[Litestar]
CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
ORIGIN = "https://chat.example"
KEYS = {hash_secret("s"): ApiKey(key_id="k", name="k", created_s=0, requests_per_minute=2, tokens_per_minute=1000)}


@pytest.mark.parametrize("allowed", [(ORIGIN,), ("*",)])
async def test_scripts_of_allowed_origins_may_call_and_read(pipeline: FakePipeline, allowed: tuple[str, ...]) -> None:
    app = make_app(pipeline, keys=MemoryKeyStore(KEYS), cors_origins=allowed)
    async with AsyncTestClient(app) as client:
        asked = "authorization,content-type,x-request-id,x-stainless-retry-count"
        preflight = await client.options(
            CHAT,
            headers={
                "origin": ORIGIN,
                "access-control-request-method": "POST",
                "access-control-request-headers": asked,
            },
        )
        assert preflight.status_code in {200, 204}
        assert preflight.headers["access-control-allow-origin"] in {ORIGIN, "*"}
        assert "POST" in preflight.headers["access-control-allow-methods"]
        granted = preflight.headers["access-control-allow-headers"].lower().replace(" ", "").split(",")
        assert "*" in granted or set(asked.split(",")) <= set(granted)
        statuses = []
        for stream, secret in ((False, "s"), (True, "s"), (False, "s"), (False, "wrong")):
            headers = {"origin": ORIGIN, "authorization": f"Bearer {secret}"}
            answer = await client.post(CHAT, json={**BODY, "stream": stream}, headers=headers)
            statuses.append(answer.status_code)
            assert answer.headers["access-control-allow-origin"] in {ORIGIN, "*"}
            shown = answer.headers["access-control-expose-headers"].lower().replace(" ", "").split(",")
            assert {"x-request-id", "retry-after", "x-ratelimit-remaining-requests", "x-ratelimit-reset-tokens"} <= set(
                shown
            )
        assert statuses == [200, 200, 429, 401]


async def test_other_origins_and_servers_without_the_setting_get_no_permission(
    client: Client, pipeline: FakePipeline
) -> None:
    assert "access-control-allow-origin" not in (await client.get("/v1/models", headers={"origin": ORIGIN})).headers
    async with AsyncTestClient(make_app(pipeline, cors_origins=("https://other.example",))) as other:
        answer = await other.get("/v1/models", headers={"origin": ORIGIN})
        assert answer.headers.get("access-control-allow-origin") != ORIGIN


async def test_what_can_be_read_answers_head_alike(client: Client) -> None:
    for path in ("/v1/models", "/v1/models/org%2Ftiny", "/health", "/health/live", "/metrics", "/v1/usage"):
        head, get = await client.head(path), await client.get(path)
        assert (head.status_code, head.headers["content-type"]) == (get.status_code, get.headers["content-type"]), path
    assert (await client.head("/v1/models/nope")).status_code == 404
    assert (await client.head(CHAT)).status_code == 405


async def test_a_keyed_answer_tells_the_limits_even_when_it_fails_later(pipeline: FakePipeline) -> None:
    pipeline.room = 1
    async with AsyncTestClient(make_app(pipeline, keys=MemoryKeyStore(KEYS))) as client:
        headers = {"authorization": "Bearer s"}
        full = await client.post(CHAT, json={**BODY, "n": 2}, headers=headers)
        assert full.status_code == 429
        served = await client.post(CHAT, json={**BODY, "stream": True}, headers=headers)
        assert served.status_code == 200
        for answer, remaining in ((full, "1"), (served, "0")):
            for kind, limit in (("requests", "2"), ("tokens", "1000")):
                assert answer.headers[f"x-ratelimit-limit-{kind}"] == limit
                assert 1 <= int(answer.headers[f"x-ratelimit-reset-{kind}"].removesuffix("s")) <= 60
                assert int(answer.headers[f"x-ratelimit-remaining-{kind}"]) >= 0
            assert answer.headers["x-ratelimit-remaining-requests"] == remaining
