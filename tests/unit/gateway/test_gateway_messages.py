"""Anthropic's Messages API over a pretended fleet, with the official SDK: turns, blocks, tools, thinking, errors."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest
from gateway_kit import CHATML, MODEL, FakePipeline, byte_level_tokenizer, encode, make_app, model_files, serving
from gateway_kit import tiny_model as served
from litestar import Litestar
from litestar.testing import AsyncTestClient

from fleet.keys import ApiKey, hash_secret
from fleet.types import FinishReason
from gateway.api.auth import MemoryKeyStore
from gateway.errors import NoWorkers, Overloaded
from gateway.pipeline import Tokens
from gateway.text.card import ModelCard

URL = "/v1/messages"
ASK: dict[str, Any] = {"model": MODEL, "max_tokens": 300, "messages": [{"role": "user", "content": "hi"}]}
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    + CHATML.replace("{{ message.content }}", "{{ message.reasoning_content or '' }}{{ message.content or '' }}")
    + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{# <tool_call> #}"
)
TEXT = {"type": "text", "text": "no"}
CALLED = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Rome"}}
WEATHER: Any = {
    "name": "get_weather",
    "description": "Weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "cache_control": {"type": "ephemeral"},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
Client = AsyncTestClient[Litestar]


@pytest.fixture
def pipeline() -> FakePipeline:
    """A fleet whose model reasons and calls functions."""
    card = ModelCard.from_files(model_files(byte_level_tokenizer(), TEMPLATE))
    return FakePipeline(served(card=card, max_model_len=2048))


@pytest.fixture
async def sdk(pipeline: FakePipeline) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with (
        serving(make_app(pipeline)) as url,
        anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client,
    ):
        yield client


def prompt(pipeline: FakePipeline) -> str:
    """What the model was given to read, as text."""
    last = pipeline.submitted[-1]
    return str(last["model"].card.tokenizer.decode(last["ids"], skip_special_tokens=False))


def events_of(text: str) -> list[dict[str, Any]]:
    """Events of a stream, each under its own name."""
    events = []
    for part in text.split("\n\n")[:-1]:
        name, data = part.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


async def refused(client: Client, status: int, **fields: Any) -> dict[str, Any]:
    """The error of a request, in its shape."""
    answer = await client.post(URL, json={**ASK, **fields})
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"type", "error", "request_id"}
    assert (body["type"], set(body["error"])) == ("error", {"type", "message"})
    assert body["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


async def test_turns_become_the_conversation(sdk: anthropic.AsyncAnthropic, pipeline: FakePipeline) -> None:
    pipeline.cached_tokens = 2
    turns: Any = [
        {"role": "user", "content": [{"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "two"},
                CALLED,
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sun", "is_error": False},
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": [TEXT], "is_error": True},
                {"type": "text", "text": "three"},
            ],
        },
    ]  # fmt: skip
    fields: Any = {"model": MODEL, "system": "Be kind.", "messages": turns}
    answer = await sdk.messages.create(
        **fields, max_tokens=30, metadata={"user_id": "u"}, service_tier="standard_only",
        extra_body={"temperature": 0.5, "top_k": 3, "top_p": 0.9},
    )  # fmt: skip
    read = prompt(pipeline)
    said = [turn.partition("<|im_end|>")[0].partition("\n")[::2] for turn in read.split("<|im_start|>")[1:]]
    assert [who for who, _ in said] == ["system", "user", "assistant", "tool", "tool", "user", "assistant"]
    assert [what for _, what in said][0::3] == ["Be kind.", "sun", ""]
    assert said[2][1].startswith('hmtwo[{"id": "toolu_1"')
    assert (said[4][1], said[5][1]) == ("Error: no", "three")
    params = pipeline.submitted[-1]["params"]
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.5, 3, 0.9, 30)
    assert (answer.id[:4], answer.type, answer.role, answer.model) == ("msg_", "message", "assistant", MODEL)
    assert [block.to_dict() for block in answer.content] == [{"type": "text", "text": "hello world", "citations": None}]
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert answer.usage.cache_read_input_tokens == 2
    assert answer.usage.output_tokens == len(encode(pipeline.served[0], "hello world")) + 1
    counted = await sdk.messages.count_tokens(**fields)
    assert counted.input_tokens == answer.usage.input_tokens + 2 == len(pipeline.submitted[-1]["ids"])


async def test_a_last_turn_of_the_assistant_is_gone_on_with(
    sdk: anthropic.AsyncAnthropic, pipeline: FakePipeline
) -> None:
    turns: Any = [
        *ASK["messages"],
        {"role": "assistant", "content": "The"},
        {"role": "assistant", "content": " answer"},
    ]
    await sdk.messages.create(model=MODEL, max_tokens=5, messages=turns)
    assert prompt(pipeline).endswith("<|im_start|>assistant\nThe answer")


async def test_why_an_answer_ends(sdk: anthropic.AsyncAnthropic, pipeline: FakePipeline) -> None:
    async def ending(**fields: Any) -> tuple[Any, Any]:
        answer = await sdk.messages.create(**{**ASK, **fields})
        return answer.stop_reason, answer.stop_sequence

    assert await ending(stop_sequences=["zzz"]) == ("end_turn", None)
    assert await ending(stop_sequences=["zzz", " wor"]) == ("stop_sequence", " wor")
    assert await ending(max_tokens=1) == ("max_tokens", None)
    pipeline.text = "hello " * 2000
    assert await ending(max_tokens=5000) == ("model_context_window_exceeded", None)
    last = pipeline.submitted[-1]
    assert last["params"].max_tokens + len(last["ids"]) == pipeline.served[0].max_model_len
    pipeline.text = CALL
    assert await ending(tools=[WEATHER]) == ("tool_use", None)
    assert await ending(tools=[WEATHER], tool_choice={"type": "tool", "name": "get_weather"}) == ("tool_use", None)


async def test_thinking_text_and_calls_are_blocks_of_their_own(
    sdk: anthropic.AsyncAnthropic, pipeline: FakePipeline
) -> None:
    pipeline.text = f"<think>so so</think>Let me look.{CALL}"
    whole = await sdk.messages.create(**ASK, tools=[WEATHER])
    async with sdk.messages.stream(**ASK, tools=[WEATHER]) as stream:
        streamed = await stream.get_final_message()
    assert whole.usage == streamed.usage
    assert whole.usage.output_tokens_details is not None
    assert whole.usage.output_tokens_details.thinking_tokens > 0
    for answer in (whole, streamed):
        thinking, text, call = answer.content
        assert thinking.type == "thinking"
        assert (thinking.thinking, thinking.signature) == ("so so", "")
        assert text.type == "text"
        assert text.text == "Let me look."
        assert call.type == "tool_use"
        assert (call.id[:6], call.name, call.input) == ("toolu_", "get_weather", {"city": "Paris"})
        assert answer.stop_reason == "tool_use"
    turns: Any = [*ASK["messages"], {"role": "assistant", "content": whole.content}]
    result: Any = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sun"}]}
    await sdk.messages.create(model=MODEL, max_tokens=5, messages=[*turns, result], tools=[WEATHER])
    assert "assistant\nso soLet me look." in prompt(pipeline)


async def test_the_order_of_events(client: Client, pipeline: FakePipeline) -> None:
    pipeline.text = f"<think>so</think>Hm.{CALL}"
    raw = await client.post(URL, json={**ASK, "tools": [WEATHER], "stream": True})
    assert raw.headers["content-type"].startswith("text/event-stream")
    events = events_of(raw.text)
    blocks = [event for event in events if "index" in event]
    assert [event["type"] for event in events if event not in blocks] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["stop_reason"] is None
    assert (events[-2]["delta"], events[-1]) == (
        {"stop_reason": "tool_use", "stop_sequence": None}, {"type": "message_stop"},
    )  # fmt: skip
    kinds = [("thinking", "thinking", "thinking"), ("text", "text", "text"), ("tool_use", "input_json", "partial_json")]
    for index, (block, delta, key) in enumerate(kinds):
        start, *deltas, stop = [event for event in blocks if event["index"] == index]
        assert (start["type"], start["content_block"]["type"]) == ("content_block_start", block)
        assert stop["type"] == "content_block_stop"
        assert {event["delta"]["type"] for event in deltas} == {f"{delta}_delta"}
        assert all(set(event["delta"]) == {"type", key} for event in deltas)
    assert blocks == sorted(blocks, key=lambda event: event["index"])


async def test_a_call_that_is_cut_off(client: Client, pipeline: FakePipeline) -> None:
    pipeline.text = CALL
    most = len(encode(pipeline.served[0], CALL.partition("aris")[0]))
    ask = {**ASK, "tools": [WEATHER], "max_tokens": most}
    whole = (await client.post(URL, json=ask)).json()
    assert (whole["stop_reason"], whole["content"][0]["input"]) == ("max_tokens", {})
    events = events_of((await client.post(URL, json={**ask, "stream": True})).text)
    written = "".join(event["delta"]["partial_json"] for event in events if event["type"] == "content_block_delta")
    assert written == '{"city": "P'
    assert events[-3]["type"] == "content_block_stop"
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"


async def test_tool_choice_thinking_and_forms_reach_the_sampler(client: Client, pipeline: FakePipeline) -> None:
    async def grammar(**fields: Any) -> Any:
        answer = await client.post(URL, json={**ASK, **fields})
        assert answer.status_code == 200, answer.text
        return pipeline.submitted[-1]["params"].grammar

    tools = [WEATHER, {"name": "get_time", "input_schema": {"type": "object"}}]
    assert await grammar(tools=tools, tool_choice={"type": "auto", "disable_parallel_tool_use": True}) is None
    any_tool = await grammar(tools=tools, tool_choice={"type": "any"})
    one_tool = await grammar(tools=tools, tool_choice={"type": "tool", "name": "get_time"})
    assert any_tool != one_tool
    assert None not in (any_tool, one_tool)
    assert await grammar(tools=tools, tool_choice={"type": "none"}) is None
    assert "get_time" not in prompt(pipeline)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert await grammar(output_config={"format": {"type": "json_schema", "schema": schema}}) is not None
    await grammar(thinking={"type": "disabled"})
    assert prompt(pipeline).endswith("<think></think>")
    for thinking in ({"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}):
        await grammar(thinking=thinking)
        assert prompt(pipeline).endswith("assistant\n")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"container": "c"}, "container"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "system"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "document"),
        ({"messages": [*ASK["messages"], {"role": "assistant", "content": [TEXT, CALLED]}]}, "tool_result must follow"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 10}}, "budget_tokens"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "not"),
    ],
)
async def test_what_is_wrong_is_a_400_that_names_it(client: Client, fields: dict[str, Any], named: str) -> None:
    error = await refused(client, 400, **fields)
    assert error["type"] == "invalid_request_error"
    assert named in error["message"]


async def test_models_that_do_not_reason_refuse_thinking() -> None:
    async with AsyncTestClient(make_app(FakePipeline())) as client:
        error = await refused(client, 400, thinking={"type": "enabled", "budget_tokens": 1024})
        assert "does not reason" in error["message"]
        answer = await client.post(URL, json={**ASK, "thinking": {"type": "disabled"}})
        assert answer.status_code == 200


async def test_errors_have_the_types_of_their_status(client: Client, pipeline: FakePipeline) -> None:
    assert (await refused(client, 404, model="other"))["type"] == "not_found_error"
    pipeline.refuse = Overloaded("full", retry_after_s=3)
    assert (await refused(client, 429))["type"] == "rate_limit_error"
    pipeline.refuse = NoWorkers("nobody", retry_after_s=3)
    assert (await refused(client, 503, stream=True))["type"] == "overloaded_error"
    pipeline.refuse = None
    pipeline.end = Tokens(token_ids=[], finish=FinishReason.ERROR, error="broke")
    pipeline.per_item = 100
    assert (await refused(client, 500))["type"] == "api_error"
    other = (await client.post("/v1/chat/completions", json={})).json()
    assert set(other["error"]) == {"message", "type", "param", "code"}


async def test_an_error_amid_a_stream_is_its_last_event(sdk: anthropic.AsyncAnthropic, pipeline: FakePipeline) -> None:
    pipeline.end = Tokens(token_ids=[], finish=FinishReason.ERROR, error="broke")
    with pytest.raises(anthropic.APIStatusError, match="broke") as failed:
        async with sdk.messages.stream(**ASK) as stream:
            await stream.until_done()
    body = failed.value.body
    assert isinstance(body, dict)
    assert body["error"] == {"type": "api_error", "message": "broke"}


async def test_keys_come_in_either_header(pipeline: FakePipeline) -> None:
    keys = MemoryKeyStore({hash_secret("s3"): ApiKey(key_id="k", name="k", created_s=0)})
    async with AsyncTestClient(make_app(pipeline, keys=keys, max_body_bytes=1000)) as client:
        assert (await refused(client, 401))["type"] == "authentication_error"
        headers = {"x-api-key": "s3", "anthropic-version": "2023-06-01"}
        assert (await client.post(URL, json=ASK, headers=headers)).status_code == 200
        assert (await client.post(URL, json=ASK, headers={"authorization": "Bearer s3"})).status_code == 200
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
        assert (await client.post(URL, json=ASK, headers={"x-api-key": "other"})).status_code == 401
        large = await client.post(URL, json={**ASK, "system": "x" * 2000}, headers=headers)
        assert (large.status_code, large.json()["error"]["type"]) == (413, "request_too_large")


async def test_the_sdk_raises_and_knows_the_request(sdk: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        await sdk.messages.create(**{**ASK, "model": "other"})
    assert missing.value.request_id is not None
    assert missing.value.request_id.startswith("req_")
    assert (await sdk.messages.create(**ASK))._request_id is not None
