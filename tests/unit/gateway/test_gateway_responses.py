"""The Responses API answered at once: items, chains, storage, and the sequence of events, with the official SDK."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from gateway_kit import MODEL, FakePipeline, encode, make_app, serving, tiny_model
from litestar.testing import AsyncTestClient

from fleet.keys import ApiKey, hash_secret
from fleet.redis_client import Redis
from fleet.types import FinishReason
from gateway.api.auth import MemoryKeyStore
from gateway.api.responses_api import endpoints
from gateway.api.responses_api.store import ResponseStore
from gateway.pipeline import Tokens

URL = "/v1/responses"
REQUIRED = [
    "id", "object", "created_at", "error", "incomplete_details", "instructions", "model", "tools", "output",
    "parallel_tool_calls", "metadata", "tool_choice", "temperature", "top_p",
]  # fmt: skip


def store_on(redis: Redis) -> ResponseStore:
    return ResponseStore(redis, namespace="unit", ttl_s=600)


@pytest.fixture
async def sdk(pipeline: FakePipeline, redis: Redis) -> AsyncIterator[openai.AsyncOpenAI]:
    app = make_app(pipeline, responses=store_on(redis))
    async with serving(app) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def prompt(pipeline: FakePipeline, place: int = -1) -> str:
    """What the model was given to read, as text."""
    return tiny_model().card.tokenizer.decode(pipeline.submitted[place]["ids"], skip_special_tokens=False)


async def test_a_string_is_answered_with_every_required_key(sdk: openai.AsyncOpenAI, pipeline: FakePipeline) -> None:
    pipeline.cached_tokens = 2
    raw = await sdk.responses.with_raw_response.create(
        model=MODEL, input="hi", instructions="Be kind.", temperature=0.5, metadata={"a": "b"}, user="u"
    )
    body = json.loads(raw.text)
    assert set(REQUIRED) <= set(body)
    answer = raw.parse()
    assert answer.output_text == "hello world"
    assert (answer.status, answer.instructions, answer.metadata) == ("completed", "Be kind.", {"a": "b"})
    assert (answer.temperature, answer.user, answer.id[:5]) == (0.5, "u", "resp_")
    message = body["output"][0]
    assert set(message) == {"id", "type", "role", "status", "content"}
    assert message["content"] == [{"type": "output_text", "text": "hello world", "annotations": [], "logprobs": []}]
    assert answer.usage is not None
    assert body["usage"]["input_tokens_details"] == {"cached_tokens": 2, "cache_write_tokens": 0}
    assert body["usage"]["output_tokens_details"] == {"reasoning_tokens": 0}
    assert answer.usage.output_tokens == len(encode(tiny_model(), "hello world")) + 1
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert prompt(pipeline) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    counted = await sdk.responses.input_tokens.count(model=MODEL, input="hi", instructions="Be kind.")
    assert counted.input_tokens == answer.usage.input_tokens


async def test_items_of_every_kind_become_the_conversation(sdk: openai.AsyncOpenAI, pipeline: FakePipeline) -> None:
    items: Any = [
        {"role": "developer", "content": "Short."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "one"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": "two"},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "3"},
        {
            "type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
            "content": [{"type": "output_text", "text": "three", "annotations": []}],
        },
        {"role": "user", "content": "four"},
    ]  # fmt: skip
    answer = await sdk.responses.create(model=MODEL, input=items)
    read = prompt(pipeline)
    turns = [turn.partition("\n")[0] for turn in read.split("<|im_start|>")[1:]]
    assert turns == ["system", "user", "assistant", "tool", "assistant", "user", "assistant"]
    assert '"name": "add"' in read
    pages = [
        page async for page in (await sdk.responses.input_items.list(answer.id, order="asc", limit=3)).iter_pages()
    ]
    listed = [item for page in pages for item in page.data]
    assert [len(page.data) for page in pages] == [3, 3, 2]
    assert [item.type for item in listed] == [item.get("type", "message") for item in items]
    assert len({item.id for item in listed}) == len(items)
    newest = await sdk.responses.input_items.list(answer.id)
    assert [item.id for item in newest.data] == [item.id for item in reversed(listed)]


async def test_a_chain_of_responses_is_one_conversation(sdk: openai.AsyncOpenAI, pipeline: FakePipeline) -> None:
    pipeline.texts = ["first", "second", "third", "fork"]
    one = await sdk.responses.create(model=MODEL, input="a", instructions="Only once.")
    two = await sdk.responses.create(model=MODEL, input="b", previous_response_id=one.id)
    await sdk.responses.create(model=MODEL, input="c", previous_response_id=two.id)
    said = [f"<|im_start|>{who}\n{what}<|im_end|>\n" for who, what in (
        ("user", "a"), ("assistant", "first"), ("user", "b"), ("assistant", "second"), ("user", "c"),
    )]  # fmt: skip
    assert prompt(pipeline) == "".join(said) + "<|im_start|>assistant\n"
    fork = await sdk.responses.create(model=MODEL, input="c", previous_response_id=one.id)
    assert prompt(pipeline) == "".join([*said[:2], said[4]]) + "<|im_start|>assistant\n"
    assert fork.previous_response_id == one.id
    counted = await sdk.responses.input_tokens.count(model=MODEL, input="c", previous_response_id=one.id)
    assert fork.usage is not None
    assert counted.input_tokens == fork.usage.input_tokens
    await sdk.responses.delete(one.id)
    for previous in (one.id, two.id, "resp_unknown"):
        with pytest.raises(openai.BadRequestError) as refused:
            await sdk.responses.create(model=MODEL, input="d", previous_response_id=previous)
        assert refused.value.code == "previous_response_not_found"


async def test_what_is_stored_can_be_retrieved_and_deleted(sdk: openai.AsyncOpenAI) -> None:
    raw = await sdk.responses.with_raw_response.create(model=MODEL, input="hi")
    answer = raw.parse()
    again = await sdk.responses.with_raw_response.retrieve(answer.id)
    assert again.text == raw.text
    await sdk.responses.delete(answer.id)
    unstored = await sdk.responses.create(model=MODEL, input="hi", store=False)
    for gone in (answer.id, unstored.id):
        with pytest.raises(openai.NotFoundError):
            await sdk.responses.retrieve(gone)
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.delete(answer.id)
    kept = await sdk.responses.create(model=MODEL, input="hi")
    with pytest.raises(openai.BadRequestError):
        await sdk.responses.cancel(kept.id)
    with pytest.raises(openai.BadRequestError):
        await sdk.responses.retrieve(kept.id, stream=True)


async def test_the_sdks_stream_helper_is_content(sdk: openai.AsyncOpenAI, pipeline: FakePipeline) -> None:
    pipeline.text = "héllo 🙂 world"
    async with sdk.responses.stream(model=MODEL, input="hi") as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    kinds = [event.type for event in events]
    num_deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        *["response.output_text.delta"] * num_deltas,
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == pipeline.text
    assert final.output_text == pipeline.text
    stored = await sdk.responses.retrieve(final.id)
    last = events[-1]
    assert last.type == "response.completed"
    assert stored.output_text == last.response.output_text
    assert [item.id for item in stored.output] == [item.id for item in final.output]
    assert stored.usage == final.usage


async def test_an_answer_that_was_cut_is_incomplete(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.responses.create(model=MODEL, input="hi", max_output_tokens=2)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None
    assert answer.usage.output_tokens == 2
    stream = await sdk.responses.create(model=MODEL, input="hi", max_output_tokens=2, stream=True)
    events = [event async for event in stream]
    assert events[-1].type == "response.incomplete"


async def test_log_probabilities_are_those_of_the_text(sdk: openai.AsyncOpenAI, pipeline: FakePipeline) -> None:
    answer = await sdk.responses.create(
        model=MODEL, input="hi", include=["message.output_text.logprobs"], top_logprobs=2
    )
    part: Any = answer.output[0].to_dict()
    entries = part["content"][0]["logprobs"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]) == b"hello world"
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    stream = await sdk.responses.create(
        model=MODEL, input="hi", include=["message.output_text.logprobs"], top_logprobs=2, stream=True
    )
    streamed: list[Any] = []
    async for event in stream:
        if event.type == "response.output_text.delta":
            streamed += [entry.to_dict() for entry in event.logprobs]
    assert streamed == entries
    assert pipeline.submitted[-1]["params"].logprobs == 2


async def test_a_stream_that_breaks_ends_as_failed(sdk: openai.AsyncOpenAI, pipeline: FakePipeline) -> None:
    pipeline.end = Tokens(token_ids=[], finish=FinishReason.ERROR, error="The page pool is on fire.")
    stream = await sdk.responses.create(model=MODEL, input="hi", stream=True)
    events = [event async for event in stream]
    assert events[-1].type == "response.failed"
    assert events[-1].response.error is not None
    assert events[-1].response.error.code == "server_error"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events].count("response.output_item.done") == 1
    with pytest.raises(openai.InternalServerError):
        await sdk.responses.create(model=MODEL, input="hi")


async def test_truncation_drops_the_oldest_turns_and_keeps_instructions(
    sdk: openai.AsyncOpenAI, pipeline: FakePipeline
) -> None:
    items: Any = [{"role": "system", "content": "Rules."}]
    for number in range(40):
        items += [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": "answer"}]
    items.append({"role": "user", "content": "last"})
    with pytest.raises(openai.BadRequestError) as refused:
        await sdk.responses.create(model=MODEL, input=items)
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.param == "input"
    answer = await sdk.responses.create(model=MODEL, input=items, truncation="auto", max_output_tokens=50)
    assert answer.usage is not None
    assert 512 - 50 - 40 < answer.usage.input_tokens <= 512 - 50
    read = prompt(pipeline)
    assert read.startswith("<|im_start|>system\nRules.<|im_end|>\n<|im_start|>user\nquestion ")
    assert "question 39" in read
    assert "question 0<" not in read
    assert read.endswith("last<|im_end|>\n<|im_start|>assistant\n")
    counted = await sdk.responses.input_tokens.count(model=MODEL, input="hi", truncation="auto")
    assert counted.input_tokens > 0


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"input": None}, "input", "missing_required_parameter"),
    ({"input": []}, "input", "invalid_value"),
    ({"input": [3]}, "input[0]", "invalid_value"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "invalid_value"),
    ({"input": [{"type": "web_search_call"}]}, "input[0].type", "unsupported_value"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "unsupported_value"),
    ({"input": [{"role": "user", "content": "x", "colour": 1}]}, "input[0].colour", "unknown_parameter"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content[0].type", "invalid_value",
    ),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input", "invalid_value"),
    ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
    ({"max_tokens": 5}, "max_tokens", "unknown_parameter"),
    ({"n": 2}, "n", "unknown_parameter"),
    ({"top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"include": ["file_search_call.results"]}, "include[0]", "invalid_value"),
    ({"background": True, "store": False}, "store", "invalid_value"),
    ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
    ({"prompt": {"id": "x"}}, "prompt", "unsupported_parameter"),
    ({"max_tool_calls": 1}, "max_tool_calls", "unsupported_parameter"),
    ({"text": {"verbosity": "low"}}, "text.verbosity", "unsupported_parameter"),
    ({"reasoning": {"summary": "auto"}}, "reasoning.summary", "unsupported_parameter"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_value"),
    ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "invalid_value"),
    ({"metadata": {"k" * 65: "v"}}, "metadata", "invalid_value"),
    ({"metadata": {"k": "v" * 513}}, "metadata", "invalid_value"),
    ({"stream_options": {}}, "stream_options", "invalid_value"),
]  # fmt: skip


async def test_what_is_wrong_is_named(pipeline: FakePipeline) -> None:
    async with AsyncTestClient(make_app(pipeline)) as client:
        for change, param, code in BAD:
            answer = await client.post(URL, json={"model": MODEL, "input": "x", **change})
            assert answer.status_code == 400, (change, answer.text)
            error = answer.json()["error"]
            assert (error["param"].removesuffix("[...]"), error["code"]) == (param, code), change
        nulls = dict.fromkeys(("instructions", "tools", "text", "store", "stream", "include", "metadata", "reasoning"))
        assert (await client.post(URL, json={"model": MODEL, "input": "x", **nulls})).status_code == 200


async def test_without_redis_answers_come_and_the_background_is_refused(pipeline: FakePipeline) -> None:
    async with AsyncTestClient(make_app(pipeline)) as client:
        answer = await client.post(URL, json={"model": MODEL, "input": "x"})
        assert answer.json()["status"] == "completed"
        assert (await client.get(f"{URL}/{answer.json()['id']}")).status_code == 404
        refused = await client.post(URL, json={"model": MODEL, "input": "x", "background": True})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1


class HangingStore(ResponseStore):
    """A Redis that takes connections and answers nothing."""

    async def save(self, *_: Any, **__: Any) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError


async def test_a_redis_that_hangs_holds_up_no_end(
    pipeline: FakePipeline, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "STORE_WAIT_S", 0.05)
    store = HangingStore(redis, namespace="unit", ttl_s=600)
    app = make_app(pipeline, responses=store)
    async with serving(app) as url, httpx.AsyncClient(base_url=url) as client:
        answer = await client.post(URL, json={"model": MODEL, "input": "x"})
        assert answer.json()["status"] == "completed"
        streamed = await client.post(URL, json={"model": MODEL, "input": "x", "stream": True})
        assert "response.completed" in streamed.text


async def test_a_response_belongs_to_the_key_that_made_it(pipeline: FakePipeline, redis: Redis) -> None:
    keys = {hash_secret(secret): ApiKey(key_id=secret, name=secret, created_s=0) for secret in ("mine", "theirs")}
    app = make_app(pipeline, keys=MemoryKeyStore(keys), responses=store_on(redis))
    mine, theirs = ({"authorization": f"Bearer {secret}"} for secret in ("mine", "theirs"))
    async with serving(app) as url, httpx.AsyncClient(base_url=url) as client:
        made = (await client.post(URL, json={"model": MODEL, "input": "x"}, headers=mine)).json()["id"]
        assert (await client.get(f"{URL}/{made}", headers=mine)).status_code == 200
        for answer in (
            await client.get(f"{URL}/{made}", headers=theirs),
            await client.get(f"{URL}/{made}/input_items", headers=theirs),
            await client.post(f"{URL}/{made}/cancel", headers=theirs),
            await client.delete(f"{URL}/{made}", headers=theirs),
        ):
            assert answer.status_code == 404
        body = {"model": MODEL, "input": "x", "previous_response_id": made}
        assert (await client.post(URL, json=body, headers=theirs)).json()["error"]["code"] == (
            "previous_response_not_found"
        )
        for query, param in (("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("after=no", "after")):
            answer = await client.get(f"{URL}/{made}/input_items?{query}", headers=mine)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"] == param
