"""`GET /v1/requests/{id}`: who may ask, and what comes back."""

from __future__ import annotations

from gateway_kit import FakePipeline, make_app
from litestar.testing import AsyncTestClient
from redis.exceptions import ConnectionError as RedisAway

from fleet.hops import Hop
from fleet.keys import ApiKey, hash_secret
from fleet.request_status import RequestStatus
from fleet.types import RequestState, Role
from gateway.api.auth import MemoryKeyStore

STATUS = RequestStatus(
    id="chatcmpl-1",
    state=RequestState.DECODING,
    epoch=1,
    created=1.0,
    updated=2.5,
    prompt_tokens=7,
    hops=[Hop(worker="p", role=Role.PREFILL, epoch=1, reason="worker_lost", at_s=1.5)],
)


class Statuses:
    """Knows one request, or is away."""

    away = False

    async def read(self, request_id: str) -> RequestStatus | None:
        if self.away:
            raise RedisAway("away")
        return STATUS if request_id == STATUS.id else None


async def test_without_keys_anybody_may_ask(pipeline: FakePipeline) -> None:
    statuses = Statuses()
    async with AsyncTestClient(make_app(pipeline, statuses=statuses)) as client:
        answer = await client.get("/v1/requests/chatcmpl-1")
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "no-store"
        body = answer.json()
        assert (body["state"], body["epoch"], body["prompt_tokens"], body["model"]) == ("decoding", 1, 7, None)
        (hop,) = body["hops"]
        expected = {"worker": "p", "role": "prefill", "epoch": 1, "reason": "worker_lost", "at_s": 1.5}
        assert hop == {**expected, "transport": None}
        for unknown in ("nope", "x" * 500):
            missing = await client.get(f"/v1/requests/{unknown}")
            assert (missing.status_code, missing.json()["error"]["code"]) == (404, "request_not_found")
        statuses.away = True
        away = await client.get("/v1/requests/chatcmpl-1")
        assert (away.status_code, away.headers["retry-after"]) == (503, "1")
    async with AsyncTestClient(make_app(pipeline)) as client:
        assert (await client.get("/v1/requests/chatcmpl-1")).status_code == 404


async def test_with_keys_only_the_admin_scope_may(pipeline: FakePipeline) -> None:
    keys = {
        hash_secret(secret): ApiKey(key_id=secret, name=secret, created_s=0, admin=secret == "boss")
        for secret in ("boss", "guest")
    }
    app = make_app(pipeline, keys=MemoryKeyStore(keys), statuses=Statuses())
    async with AsyncTestClient(app) as client:
        codes = {}
        for secret in ("boss", "guest", "stranger"):
            answer = await client.get("/v1/requests/chatcmpl-1", headers={"authorization": f"Bearer {secret}"})
            codes[secret] = answer.status_code
        assert codes == {"boss": 200, "guest": 403, "stranger": 401}
        refused = await client.get("/v1/requests/unknown", headers={"authorization": "Bearer guest"})
        assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
