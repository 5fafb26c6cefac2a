"""Every failure is a status and OpenAI's error object, and never a 500 that a client can provoke."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway_kit import MODEL, FakePipeline, byte_level_tokenizer, make_app, model_files, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from litestar import Litestar
from litestar.testing import AsyncTestClient

from fleet.types import FinishReason
from gateway.errors import NoWorkers, Overloaded, PipelineError
from gateway.pipeline import Tokens
from gateway.text.card import ModelCard

Client = AsyncTestClient[Litestar]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]
OK: dict[str, dict[str, Any]] = {
    CHAT: {"model": MODEL, "messages": HELLO},
    TEXT: {"model": MODEL, "prompt": "hi"},
}


def check_shape(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    assert response.headers["x-request-id"]
    assert "Traceback" not in error["message"]
    assert "/" not in error["message"] or status == 404 or ".py" not in error["message"]
    return error


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CHAT_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": 1.5}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": 5}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"٣": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_everything": True}}, "stream_options.include_everything"),
    ({"stream": "yes"}, "stream"),
    ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
    ({"messages": [*HELLO, 7]}, "messages[1]"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
    ),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"not": {}}}}},
        "response_format.json_schema.schema",
    ),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"prediction": {}}, "prediction"),
    ({"frobnicate": 1}, "frobnicate"),
    ({"guided_json": {"type": "foo"}}, "guided_json"),
    ({"guided_decoding_backend": "x"}, "guided_decoding_backend"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"metadata": {"a": 1}}, "metadata"),
    ({"metadata": {"a": "b" * 513}}, "metadata"),
    ({"metadata": {"a" * 65: "b"}}, "metadata"),
    ({"metadata": {str(number): "x" for number in range(17)}}, "metadata"),
    ({"service_tier": "scale"}, "service_tier"),
    ({"service_tier": "first class"}, "service_tier"),
    ({"safety_identifier": "x" * 65}, "safety_identifier"),
    ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
    ({"prompt_cache_options": {"mode": "explicit"}}, "prompt_cache_options.mode"),
    ({"prompt_cache_options": {"ttl": "30m"}}, "prompt_cache_options.ttl"),
    ({"moderation": {"model": "x"}}, "moderation"),
    ({"chat_template": "{{ messages }}"}, "chat_template"),
    ({"documents": [{"text": "x"}]}, "documents"),
    ({"echo": True}, "echo"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"continue_final_message": True, "messages": [{"role": "assistant", "tool_calls": [CALL]}]}, "messages"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"bad_words": ["x"]}, "bad_words"),
    ({"logits_processors": ["x"]}, "logits_processors"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"length_penalty": 0.5}, "length_penalty"),
    ({"request_id": "a b"}, "request_id"),
    ({"request_id": "a\n"}, "request_id"),
    ({"request_id": ""}, "request_id"),
    ({"cache_salt": ""}, "cache_salt"),
]
TEXT_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"echo": True, "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**6]}, "prompt"),
    ({"prompt": [[1], []]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [["a"]]}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": ["a"] * 9, "n": 128}, "prompt"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": HELLO}, "messages"),
]


@pytest.mark.parametrize(("path", "faults"), [(CHAT, CHAT_FAULTS), (TEXT, TEXT_FAULTS)], ids=["chat", "text"])
async def test_a_fault_is_a_400_that_names_its_field(
    client: Client, pipeline: FakePipeline, path: str, faults: list[tuple[dict[str, Any], str]]
) -> None:
    for fault, param in faults:
        for extra in ({}, {} if "stream_options" in fault else {"stream": True}):
            error = check_shape(await client.post(path, json={**OK[path], **extra, **fault}), 400)
            assert (error["type"], error["param"]) == ("invalid_request_error", param), fault
    assert pipeline.submitted == []
    assert (await client.post(path, json=OK[path])).status_code == 200


async def test_unknown_fields_and_missing_ones_have_codes(client: Client) -> None:
    assert check_shape(await client.post(CHAT, json={**OK[CHAT], "x": 1}), 400)["code"] == "unknown_parameter"
    error = check_shape(await client.post(CHAT, json={"messages": HELLO}), 400)
    assert (error["code"], error["param"]) == ("missing_required_parameter", "model")


DEEP = b'{"model":"m","prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"5",
    b'"x"',
    b"\xff\xfe",
    b'{"model": "\\ud800"}',
    b'{"model": "\xed\xa0\x80"}',
    b'{"temperature": NaN}',
    b'{"temperature": 1e999}',
    b'{"n": ' + b"9" * 5000 + b"}",
    DEEP,
    b'{"model": "m"} x',
    b"\x00",
    b'{"model": "org/tiny", "messages": [{"role": "user", "content": "\\udc00"}]}',
]


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
async def test_bytes_that_are_no_request_are_a_400(client: Client, path: str) -> None:
    for body in BODIES:
        check_shape(await client.post(path, content=body, headers={"content-type": "application/json"}), 400)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.dictionaries(
        st.sampled_from(["model", "messages", "prompt", "n", "stop", "stream", "logit_bias", "seed", "role", "tools"]),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
            max_leaves=6,
        ),
    )
)
async def test_no_json_makes_a_500(client: Client, body: dict[str, Any]) -> None:
    data = json.dumps({"model": MODEL, **body}).encode()
    for path in (CHAT, TEXT):
        response = await client.post(path, content=data, headers={"content-type": "application/json"})
        assert response.status_code in {200, 400, 404}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
async def test_any_text_is_answered(client: Client, content: str) -> None:
    chat = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
    assert (await client.post(CHAT, json=chat)).status_code == 200
    assert (await client.post(TEXT, json={"model": MODEL, "prompt": content or "x"})).status_code == 200


async def test_routes_methods_and_types(client: Client) -> None:
    assert check_shape(await client.get("/nope"), 404)["code"] == "unknown_url"
    assert check_shape(await client.post("/v1/chat"), 404)["type"] == "invalid_request_error"
    response = await client.get(CHAT)
    check_shape(response, 405)
    assert "POST" in response.headers["allow"]
    response = await client.post(CHAT, content=b"x=1", headers={"content-type": "application/x-www-form-urlencoded"})
    check_shape(response, 415)
    check_shape(await client.get("/v1/models/unknown%2Fmodel"), 404)


async def test_unknown_models(client: Client) -> None:
    for path in (CHAT, TEXT):
        for stream in (False, True):
            error = check_shape(await client.post(path, json={**OK[path], "model": "gpt-9", "stream": stream}), 404)
            assert (error["code"], error["type"], error["param"]) == (
                "model_not_found",
                "invalid_request_error",
                "model",
            )
            assert "gpt-9" in error["message"]


async def test_large_bodies_are_refused(pipeline: FakePipeline) -> None:
    async with AsyncTestClient(make_app(pipeline, max_body_bytes=2000)) as client:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "x" * 3000}]}
        assert check_shape(await client.post(CHAT, json=body), 413)["code"] == "request_too_large"
        assert (await client.post(CHAT, json=OK[CHAT])).status_code == 200


async def test_too_long_prompts_say_both_numbers(client: Client) -> None:
    long: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [{"role": "user", "content": "x y " * 400}]},
        TEXT: {"prompt": [5] * 600},
    }
    for path, param in ((CHAT, "messages"), (TEXT, "prompt")):
        for stream in (False, True):
            error = check_shape(await client.post(path, json={**OK[path], **long[path], "stream": stream}), 400)
            assert (error["code"], error["param"]) == ("context_length_exceeded", param)
            assert "512" in error["message"]
    assert "600" in error["message"]
    assert (await client.post(TEXT, json={**OK[TEXT], "prompt": [5] * 500, "max_tokens": 12})).status_code == 200
    error = check_shape(await client.post(TEXT, json={**OK[TEXT], "prompt": [5] * 500, "max_tokens": 13}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "513" in error["message"]
    assert "500" in error["message"]


async def test_a_full_queue_refuses_before_the_prompt_is_read(client: Client, pipeline: FakePipeline) -> None:
    pipeline.full = Overloaded("queues are full", retry_after_s=2.2)
    for path in (CHAT, TEXT):
        response = await client.post(path, json={**OK[path], "n": 3})
        error = check_shape(response, 429)
        assert (error["code"], response.headers["retry-after"]) == ("server_overloaded", "3")
    # a prompt that is too long, which only its tokens tell, is no matter yet
    check_shape(await client.post(TEXT, json={**OK[TEXT], "prompt": [5] * 600}), 429)
    assert pipeline.checked == [3, 3, 1]
    assert pipeline.submitted == []
    # what is wrong with a request is told first where that costs nothing
    check_shape(await client.post(TEXT, json={**OK[TEXT], "model": "nope"}), 404)


@pytest.mark.parametrize(
    ("refusal", "status", "wait"),
    [(Overloaded("queues are full", retry_after_s=2.2), 429, "3"), (NoWorkers("no worker", retry_after_s=0), 503, "1")],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_refusals_of_the_fleet(
    client: Client, pipeline: FakePipeline, refusal: PipelineError, status: int, wait: str, stream: bool
) -> None:
    pipeline.refuse = refusal
    response = await client.post(CHAT, json={**OK[CHAT], "stream": stream})
    check_shape(response, status)
    assert response.headers["retry-after"] == wait
    pipeline.refuse_after = 2
    check_shape(await client.post(CHAT, json={**OK[CHAT], "stream": stream, "n": 3}), status)
    assert [generation.num_closes for generation in pipeline.generations] == [1, 1]


@pytest.mark.parametrize(("retry_after_s", "status"), [(None, 500), (4.0, 503)])
async def test_failures_before_the_first_token_are_statuses(
    client: Client, pipeline: FakePipeline, retry_after_s: float | None, status: int
) -> None:
    pipeline.text = ""
    pipeline.end = Tokens(token_ids=[], finish=FinishReason.ERROR, error="worker lost", retry_after_s=retry_after_s)
    for stream in (False, True):
        response = await client.post(CHAT, json={**OK[CHAT], "stream": stream, "n": 2})
        error = check_shape(response, status)
        assert error["message"] == "worker lost"
        assert response.headers.get("retry-after") == ("4" if status == 503 else None)
    assert all(generation.num_closes == 1 for generation in pipeline.generations)


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_failures_within_a_stream_are_its_last_event(client: Client, pipeline: FakePipeline, path: str) -> None:
    pipeline.end = Tokens(token_ids=[], finish=FinishReason.ERROR, error="worker lost", retry_after_s=1.0)
    response = await client.post(path, json={**OK[path], "stream": True})
    assert response.status_code == 200
    *_, last, rest = response.text.split("\n\n")
    assert rest == ""
    assert json.loads(last.removeprefix("data: ")) == {
        "error": {"message": "worker lost", "type": "server_error", "param": None, "code": "service_unavailable"}
    }
    assert "[DONE]" not in response.text
    assert pipeline.generations[0].num_closes == 1


async def test_a_bug_of_ours_is_a_plain_500(pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> None:
        raise ZeroDivisionError("secret /srv/path.py")

    monkeypatch.setattr(pipeline, "model", broken)
    async with AsyncTestClient(make_app(pipeline), raise_server_exceptions=False) as client:
        error = check_shape(await client.post(CHAT, json=OK[CHAT]), 500)
        assert error["code"] == "internal_error"
        assert "secret" not in error["message"]


async def test_a_model_without_a_template_refuses_chat_alone() -> None:
    card = ModelCard.from_files(model_files(byte_level_tokenizer(), None))
    async with AsyncTestClient(make_app(FakePipeline(tiny_model(card=card)))) as client:
        assert check_shape(await client.post(CHAT, json=OK[CHAT]), 400)["param"] == "messages"
        assert (await client.post(TEXT, json=OK[TEXT])).status_code == 200


async def test_request_ids(client: Client) -> None:
    for path in ("/v1/models", "/nope", "/health/live"):
        assert (await client.get(path, headers={"x-request-id": "abc-1.2"})).headers.get_list("x-request-id") == [
            "abc-1.2"
        ]
        made = {
            (await client.get(path, headers=[(b"x-request-id", bad)])).headers["x-request-id"]
            for bad in (b"a b", "é".encode(), b"x" * 129)
        }
        assert len(made) == 3
        assert all(value.startswith("req_") for value in made)
    response = await client.post(CHAT, json={**OK[CHAT], "stream": True}, headers={"x-request-id": "s"})
    assert response.headers["x-request-id"] == "s"
