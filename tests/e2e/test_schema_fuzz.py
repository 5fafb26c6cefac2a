"""The published OpenAPI, tried out: requests made from it (schemathesis), none of which may be a failure of ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from support.anthropic_wire import check_message_error
from support.fleet import DEMO, Fleet
from support.openai_wire import MODEL, check_error
from support.redis_server import RedisServer

pytestmark = pytest.mark.e2e

EXAMPLES = {"POST": 25, "GET": 10, "HEAD": 2}
ENDS_ITSELF = {"max_tokens": 2, "max_completion_tokens": 2, "max_output_tokens": 16}


@pytest.fixture(scope="module")
def fleet(module_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Fleet(module_redis, tmp_path_factory.mktemp("fleet")) as fleet:
        for module, name in (("prefill_svc", "p"), ("decode_svc", "d")):
            fleet.start(module, name, model=DEMO, served_model_name=MODEL, max_model_len=256)
        fleet.gateway(worker_wait_s=5)
        fleet.wait_ready()
        yield fleet


def tamed(body: Any) -> Any:
    """The request for a model that exists and an answer that soon ends, where it has fields for that."""
    if isinstance(body, dict) and "model" in body:
        body["model"] = MODEL
        body |= {
            name: value for name, value in ENDS_ITSELF.items() if type(body.get(name)) is int and body[name] > value
        }
        if type(body.get("n")) is int and body["n"] > 2:
            body["n"] = 2
    return body


def try_out(operation: Any, http: httpx.Client) -> list[int]:
    """Send generated requests; returns the statuses of their answers."""
    statuses: list[int] = []

    @seed(1)
    @settings(
        max_examples=EXAMPLES.get(operation.method.upper(), 5),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def attempt(case: Any) -> None:
        case.body = tamed(case.body)
        sent = case.as_transport_kwargs(base_url=str(http.base_url))
        answer = http.request(case.method, sent["url"], params=sent.get("params"), json=sent.get("json"))
        statuses.append(answer.status_code)
        assert answer.status_code < 500, (operation.label, sent.get("json"), answer.text)
        if answer.status_code >= 400 and case.method != "HEAD":
            check = check_message_error if "/messages" in operation.path else check_error
            check(answer, answer.status_code)

    attempt()
    return statuses


def test_no_request_that_the_schema_allows_is_a_failure_of_ours(fleet: Fleet) -> None:
    schema = schemathesis.openapi.from_url(f"{fleet.url}/schema/openapi.json")
    tried: dict[str, list[int]] = {}
    undocumented: set[tuple[str, int]] = set()
    with httpx.Client(base_url=fleet.url, timeout=30) as http:
        for result in schema.get_all_operations():
            operation = result.ok()
            statuses = tried[operation.label] = try_out(operation, http)
            documented = operation.definition.raw["responses"]
            undocumented |= {(operation.label, status) for status in statuses if str(status) not in documented}
    for label, statuses in tried.items():
        print(label, {status: statuses.count(status) for status in sorted(set(statuses))})
    assert undocumented == set()
    assert 200 in tried["POST /v1/chat/completions"]
    assert 200 in tried["POST /v1/completions"]
