"""Background responses on a real fleet: what is killed under them costs their readers a pause."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.fleet import DEMO, Fleet, until
from support.redis_server import RedisServer

pytestmark = pytest.mark.e2e
ASK: dict[str, Any] = {
    "model": "demo", "input": "Tell me a long story.", "background": True, "stream": True, "max_output_tokens": 300,
    "ignore_eos": True, "seed": 7,
}  # fmt: skip


@pytest.fixture(scope="module")
def fleet(module_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    worker = {"model": str(DEMO), "served_model_name": "demo", "dtype": "float32"}
    with Fleet(module_redis, tmp_path_factory.mktemp("fleet"), settings={"lease_s": "2"}) as fleet:
        fleet.start("prefill_svc", "prefill-1", **worker)
        for number in (1, 2):
            fleet.start("decode_svc", f"decode-{number}", **worker)
        fleet.gateway("g1")
        fleet.wait_ready(prefill=1, decode=2)
        yield fleet


def begin(url: str, *, num_events: int) -> tuple[str, bytes]:
    """Start a response, read some events, and drop the connection."""
    seen = b""
    with httpx.stream("POST", f"{url}/v1/responses", json=ASK, timeout=60) as answer:
        assert answer.status_code == 200
        for part in answer.iter_bytes():
            seen += part
            if seen.count(b"\n\n") >= num_events:
                break
    return seen.partition(b'"id":"')[2].partition(b'"')[0].decode(), seen


def read(url: str, response_id: str) -> bytes:
    return httpx.get(f"{url}/v1/responses/{response_id}?stream=true", timeout=60).content


def text_of(url: str, response_id: str) -> str:
    body = httpx.get(f"{url}/v1/responses/{response_id}").json()
    assert body["status"] == "incomplete"
    assert body["usage"]["output_tokens"] == ASK["max_output_tokens"]
    return str(body["output"][0]["content"][0]["text"])


def test_killed_workers_and_gateways_cost_a_pause(fleet: Fleet) -> None:
    first = fleet.url
    second = fleet.gateway("g2")
    fleet.wait_ready(prefill=1, decode=2)
    whole_id, _ = begin(first, num_events=6)
    whole = read(second, whole_id)
    assert whole == read(first, whole_id)
    expected = text_of(first, whole_id)

    response_id, seen = begin(first, num_events=12)
    fleet.services["g1"].kill()
    fleet.forget("g1")
    events = read(second, response_id)
    assert events.startswith(seen)
    assert text_of(second, response_id) == expected
    assert events.count(b"event: response.incomplete") == 1
    assert "background response taken over" in fleet.services["g2"].text()

    response_id, seen = begin(second, num_events=12)
    fleet.forget("decode-1").kill()
    events = read(second, response_id)
    assert events.startswith(seen)
    assert text_of(second, response_id) == expected
    until(lambda: fleet.metric("baton_requests_live") == 0, within_s=20, what="nothing is left behind")
