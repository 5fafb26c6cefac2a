"""What Anthropic's clients count on in answers."""

from __future__ import annotations

import httpx

from support.openai_wire import INTERNALS, decode


def check_message_error(answer: httpx.Response, status: int) -> None:
    """An error in Anthropic's shape, with an id and without our insides."""
    assert answer.status_code == status, answer.text[:500]
    body = decode(answer.content)
    assert set(body) == {"type", "error", "request_id"}
    assert {"type", "message"} <= set(body["error"]) <= {"type", "message", "details"}
    assert body["type"] == "error"
    assert body["request_id"] == answer.headers["request-id"]
    assert body["error"]["message"]
    assert not any(word in body["error"]["message"] for word in INTERNALS), body["error"]
    if status == 400:
        assert body["error"]["type"] == "invalid_request_error"
