"""A pedantic HTTP client of OpenAI's API: every answer and every event is held to the published shape."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx

Json = dict[str, Any]

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MODEL = "demo"
HI: list[Json] = [{"role": "user", "content": "hi"}]
ERROR_KEYS = {"message", "type", "param", "code"}
INTERNALS = ("Traceback", "site-packages", ".py", "msgspec", "litestar", "0x7f")
FINISHES = {"stop", "length", "tool_calls", "content_filter", "function_call"}
OBJECTS = {(CHAT, False): "chat.completion", (CHAT, True): "chat.completion.chunk"}


def decode(text: str | bytes) -> Any:
    """JSON as strict clients read it: UTF-8, no NaN, no infinity."""

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, parse_constant=constant)


def check_error(answer: httpx.Response, status: int, *, code: str | None = None, param: str | None = None) -> Json:
    """An error in OpenAI's shape, with an id and without our insides; returns the error object."""
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.headers["x-request-id"]
    body = decode(answer.content)
    assert set(body) == {"error"}
    error: Json = body["error"]
    assert set(error) == ERROR_KEYS
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert all(error[key] is None or isinstance(error[key], str) for key in ("param", "code"))
    assert not any(word in error["message"] for word in INTERNALS), error["message"]
    if status == 400:
        assert error["type"] == "invalid_request_error"
    if status in {429, 503}:
        assert int(answer.headers["retry-after"]) >= 1
    if code is not None:
        assert error["code"] == code, error
    if param is not None:
        assert error["param"] == param, error
    return error


def check_usage(usage: Json) -> None:
    """Sums and kinds of `usage`."""
    counts = [usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")]
    assert all(type(count) is int for count in counts)
    assert counts[0] + counts[1] == counts[2]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert type(cached) is int
    assert 0 <= cached < max(1, counts[0])


def check_plain(path: str, body: Json, model: str) -> None:
    """The shape of a whole answer."""
    assert body["object"] == OBJECTS.get((path, False), "text_completion")
    assert body["id"].startswith("chatcmpl-" if path == CHAT else "cmpl-")
    assert type(body["created"]) is int
    assert abs(body["created"] - time.time()) < 120
    assert body["model"] == model
    assert [choice["index"] for choice in body["choices"]] == list(range(len(body["choices"])))
    for choice in body["choices"]:
        assert {"index", "finish_reason", "logprobs"} <= set(choice)
        assert choice["finish_reason"] in FINISHES
        if path == CHAT:
            assert set(choice["message"]) == {"role", "content", "refusal"}
            assert choice["message"]["role"] == "assistant"
            assert choice["message"]["refusal"] is None
        assert isinstance(text_of(choice), str)
    check_usage(body["usage"])


def text_of(choice: Json) -> Any:
    """A choice's text, of either API."""
    return choice["message"]["content"] if "message" in choice else choice["text"]


@dataclass
class Streamed:
    """What a stream came to."""

    events: list[Json]
    texts: list[str]
    finishes: list[str]
    logprobs: list[Any]
    usage: Json | None
    headers: httpx.Headers = field(default_factory=httpx.Headers)

    @property
    def text(self) -> str:
        """Of the only choice."""
        (text,) = self.texts
        return text


def read_events(raw: bytes) -> list[Json]:
    """Split a finished stream into its events, all of them whole; the last is `[DONE]` and it comes once."""
    assert raw.endswith(b"data: [DONE]\n\n"), raw[-200:]
    assert raw.count(b"data: [DONE]") == 1
    events = []
    for block in raw.split(b"\n\n")[:-2]:
        assert block.startswith(b"data: ")
        assert len(block.decode("utf-8").splitlines()) == 1, "line readers split where str.splitlines does"
        events.append(decode(block[len(b"data: ") :]))
    return events


def check_stream(path: str, raw: bytes, *, model: str, include_usage: bool) -> Streamed:
    """Hold a stream to every rule about chunks, and put it together."""
    events = read_events(raw)
    for name in ("id", "created", "model", "object"):
        assert len({event[name] for event in events}) == 1, name
    assert events[0]["object"] == OBJECTS.get((path, True), "text_completion")
    assert events[0]["model"] == model
    usage = None
    if include_usage:
        *events, last = events
        assert last["choices"] == []
        usage = last["usage"]
        check_usage(usage)
        assert all(event["usage"] is None for event in events)
    else:
        assert all("usage" not in event for event in events)
    assert all(len(event["choices"]) == 1 for event in events)
    choices = [event["choices"][0] for event in events]
    seen = list(dict.fromkeys(choice["index"] for choice in choices))
    assert seen == list(range(len(seen))), "new indexes appear in order"
    texts, finishes, logprobs = [], [], []
    for index in seen:
        own = [choice for choice in choices if choice["index"] == index]
        assert [choice["finish_reason"] is not None for choice in own] == [False] * (len(own) - 1) + [True]
        finishes.append(own[-1]["finish_reason"])
        if path == CHAT:
            assert own[0]["delta"]["role"] == "assistant"
            assert not any("role" in choice["delta"] for choice in own[1:])
            texts.append("".join(choice["delta"].get("content") or "" for choice in own))
        else:
            texts.append("".join(choice["text"] for choice in own))
        logprobs.append(_joined([choice["logprobs"] for choice in own if choice["logprobs"] is not None]))
    assert set(finishes) <= FINISHES
    return Streamed(events, texts, finishes, logprobs, usage)


def _joined(parts: list[Json]) -> Json | None:
    if not parts:
        return None
    names = [name for name in parts[0] if isinstance(parts[0][name], list)]
    return {**parts[0], **{name: [entry for part in parts for entry in part[name]] for name in names}}


def check_logprob(value: float) -> None:
    """Finite and not above 0."""
    assert isinstance(value, int | float)
    assert math.isfinite(value)
    assert -9999 <= value <= 0


def same(one: Any, other: Any) -> None:
    """Equal, but for the last digits of numbers, which depend on what else was in a batch."""
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key, value in one.items():
            same(value, other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for value, counterpart in zip(one, other, strict=True):
            same(value, counterpart)
    elif isinstance(one, float):
        assert math.isclose(one, other, abs_tol=1e-3), (one, other)
    else:
        assert one == other


@dataclass
class Wire:
    """One gateway."""

    http: httpx.Client

    def post(self, path: str, **fields: Any) -> httpx.Response:
        """Send fields to an endpoint, with the model's name unless they have one."""
        return self.http.post(path, json={"model": MODEL, **fields})

    def refused(
        self, path: str, status: int = 400, *, code: str | None = None, at: str | None = None, **f: Any
    ) -> Json:
        """An error, the same plain and streamed."""
        plain = check_error(self.post(path, **f), status, code=code, param=at)
        if "stream" not in f and path in {CHAT, TEXT}:
            streamed = check_error(self.post(path, **f, stream=True), status, code=code, param=at)
            assert streamed == plain
        return plain

    def plain(self, path: str, **fields: Any) -> Json:
        """A whole answer, checked."""
        answer = self.post(path, **fields)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-request-id"]
        body: Json = decode(answer.content)
        check_plain(path, body, fields.get("model", MODEL))
        if "n" not in fields:
            used, limit = body["usage"]["completion_tokens"], fields.get("max_tokens")
            assert limit is None or used <= limit * len(body["choices"])
            if all(choice["finish_reason"] == "length" for choice in body["choices"]) and limit is not None:
                assert used == limit * len(body["choices"])
        return body

    def text(self, path: str, **fields: Any) -> str:
        """The text of an answer with one choice."""
        (choice,) = self.plain(path, **fields)["choices"]
        return str(text_of(choice))

    def streamed(self, path: str, *, usage: bool = True, **fields: Any) -> Streamed:
        """A streamed answer, checked."""
        options = {"stream_options": {"include_usage": True}} if usage else {}
        with self.http.stream("POST", path, json={"model": MODEL, **fields, "stream": True, **options}) as answer:
            raw = answer.read()
            assert answer.status_code == 200, raw
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert "content-length" not in answer.headers
            assert "content-encoding" not in answer.headers
            assert answer.headers["x-request-id"]
        result = check_stream(path, raw, model=fields.get("model", MODEL), include_usage=usage)
        result.headers = answer.headers
        return result

    def both(self, path: str, **fields: Any) -> Json:
        """A whole answer, after seeing that the stream of the same request, seeded, comes to the same."""
        fields = {"seed": 7, **fields}
        plain = self.plain(path, **fields)
        streamed = self.streamed(path, **fields)
        assert streamed.texts == [text_of(choice) for choice in plain["choices"]]
        assert streamed.finishes == [choice["finish_reason"] for choice in plain["choices"]]
        same(streamed.logprobs, [choice["logprobs"] for choice in plain["choices"]])
        assert streamed.usage is not None
        for name in ("prompt_tokens", "completion_tokens"):
            assert streamed.usage[name] == plain["usage"][name]
        return plain

    def ids(self, text: str) -> list[int]:
        """Token ids of a text."""
        answer = self.post("/tokenize", prompt=text)
        assert answer.status_code == 200, answer.text
        ids: list[int] = answer.json()["tokens"]
        return ids

    def decoded(self, ids: Iterable[int]) -> str:
        """Text of token ids."""
        answer = self.post("/detokenize", tokens=list(ids))
        assert answer.status_code == 200, answer.text
        return str(answer.json()["prompt"])
