"""Against a real server: the official SDK, clients that leave, and connections that live on."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from gateway_kit import MODEL, FakePipeline, encode, eventually, make_app, serving, tiny_model

from fleet.keys import ApiKey, hash_secret
from fleet.types import FinishReason
from gateway.api.auth import MemoryKeyStore
from gateway.errors import NoWorkers, Overloaded
from gateway.pipeline import Tokens

HELLO: Any = [{"role": "user", "content": "hi"}]
SECRET = "bt-0-secret"


@pytest.fixture
async def address(pipeline: FakePipeline) -> AsyncIterator[str]:
    async with serving(make_app(pipeline, keys=None)) as url:
        yield url


@pytest.fixture
async def sdk(address: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_chat_with_the_sdk(sdk: openai.AsyncOpenAI, pipeline: FakePipeline) -> None:
    pipeline.text = "héllo 🙂 world"
    answer = await sdk.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=2, n=2)
    assert [choice.message.content for choice in answer.choices] == [pipeline.text] * 2
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2 * (len(encode(tiny_model(), pipeline.text)) + 1)
    assert answer._request_id is not None
    stream = await sdk.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == pipeline.text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == answer.usage.prompt_tokens


async def test_the_sdks_stream_helper_accumulates_all_choices(sdk: openai.AsyncOpenAI, pipeline: FakePipeline) -> None:
    pipeline.texts = ["one", "two three"]
    async with sdk.chat.completions.stream(model=MODEL, messages=HELLO, n=2, logprobs=True) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == pipeline.texts
    assert [choice.message.role for choice in final.choices] == ["assistant", "assistant"]
    assert [choice.finish_reason for choice in final.choices] == ["stop", "stop"]


async def test_completions_and_models_with_the_sdk(sdk: openai.AsyncOpenAI, pipeline: FakePipeline) -> None:
    answer = await sdk.completions.create(model=MODEL, prompt=["a", "b"], logprobs=1, stop=["wor"])
    assert [choice.text for choice in answer.choices] == ["hello ", "hello "]
    stream = await sdk.completions.create(model=MODEL, prompt="a", stream=True, echo=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "ahello world"
    assert [model.id async for model in sdk.models.list()] == [MODEL]
    assert (await sdk.models.retrieve(MODEL)).id == MODEL
    assert pipeline.generations[0].stopped_at is not None


async def test_errors_become_the_sdks_classes(sdk: openai.AsyncOpenAI, pipeline: FakePipeline) -> None:
    async def create(**fields: Any) -> None:
        await sdk.chat.completions.create(**{"model": MODEL, "messages": HELLO, **fields})

    with pytest.raises(openai.BadRequestError) as bad:
        await create(temperature=9)
    assert bad.value.param == "temperature"
    assert bad.value.request_id is not None
    with pytest.raises(openai.NotFoundError) as unknown:
        await create(model="nope", stream=True)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        await create(max_tokens=10_000)
    assert long.value.code == "context_length_exceeded"
    pipeline.refuse = Overloaded("full", retry_after_s=1)
    with pytest.raises(openai.RateLimitError):
        await create()
    pipeline.refuse = NoWorkers("none", retry_after_s=1)
    with pytest.raises(openai.InternalServerError):
        await create()
    pipeline.refuse = None
    pipeline.end = Tokens(token_ids=[], finish=FinishReason.ERROR, error="worker lost")
    stream = await sdk.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="worker lost"):
        async for _ in stream:
            pass


async def test_a_wrong_key_with_the_sdk(pipeline: FakePipeline) -> None:
    keys = MemoryKeyStore({hash_secret(SECRET): ApiKey(key_id="0", name="n", created_s=0)})
    async with serving(make_app(pipeline, keys=keys)) as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=SECRET, max_retries=0) as client:
            assert [model.id async for model in client.models.list()] == [MODEL]


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def open_request(address: str, **fields: Any) -> AsyncIterator[Connection]:
    """Send a chat request over a bare socket, which is closed at the end of the block."""
    body = json.dumps({"model": MODEL, "messages": HELLO, **fields}).encode()
    host, port = address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(body), body)
    )
    try:
        await writer.drain()
        yield reader, writer
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold_after", [0, 2])
async def test_a_client_that_leaves_cancels_all_its_generations(
    address: str, pipeline: FakePipeline, stream: bool, hold_after: int
) -> None:
    pipeline.hold_after = hold_after
    async with open_request(address, stream=stream, n=3) as (reader, _):
        if stream and hold_after:
            await reader.readuntil(b'"content":"he"')
        await eventually(lambda: len(pipeline.generations) == 3)
        assert all(generation.num_closes == 0 for generation in pipeline.generations)
    await eventually(lambda: all(generation.num_closes == 1 for generation in pipeline.generations))
    pipeline.hold_after = 10**9
    async with httpx.AsyncClient(base_url=address) as client:
        assert (await client.get("/health")).status_code == 200
        scrape = (await client.get("/metrics")).text
    assert 'baton_http_requests_in_progress{method="POST",path="/v1/chat/completions"} 0.0' in scrape


async def test_chunks_arrive_as_they_are_made(address: str, pipeline: FakePipeline) -> None:
    pipeline.hold_after = 1
    async with open_request(address, stream=True) as (reader, _):
        await asyncio.wait_for(reader.readuntil(b'"content":"he"'), 20)
        pipeline.go_on.set()
        rest = await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 20)
    assert b"data: [DONE]" in rest


async def test_a_slow_reader_holds_up_its_own_generation_alone(address: str, pipeline: FakePipeline) -> None:
    ids = encode(tiny_model(), "hello world")
    taken = 0

    class Endless:
        request_id, prompt_len = "slow", 1

        async def __aiter__(self) -> AsyncIterator[Tokens]:
            nonlocal taken
            while True:
                taken += 1
                await asyncio.sleep(0)
                yield Tokens(token_ids=ids * 200)

        def stop(self, num_output_tokens: int) -> None:
            raise AssertionError(num_output_tokens)

        async def aclose(self) -> None:
            nonlocal taken
            taken = -1

    normal = pipeline.submit

    async def submit(**fields: Any) -> Any:
        return Endless() if fields["params"].seed == 13 else await normal(**fields)

    pipeline.submit = submit  # type: ignore[method-assign]
    async with open_request(address, stream=True, seed=13):
        await eventually(lambda: taken > 3)
        async with asyncio.timeout(20):
            before = 0
            while taken != before:  # the socket's buffers fill up
                before = taken
                await asyncio.sleep(0.2)
        async with httpx.AsyncClient(base_url=address) as client:
            answer = await client.post("/v1/chat/completions", json={"model": MODEL, "messages": HELLO})
        assert answer.status_code == 200
        assert taken == before, "the generation is not read while nobody takes its output"
    await eventually(lambda: taken == -1)


async def test_one_connection_serves_answers_errors_and_streams(address: str) -> None:
    limits = httpx.Limits(max_connections=1, max_keepalive_connections=1)
    ports = set()
    async with httpx.AsyncClient(base_url=address, limits=limits) as client:
        for fields in ({}, {"n": 0}, {"stream": True}, {"stream": True, "n": 2}, {}):
            body = {"model": MODEL, "messages": HELLO, **fields}
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                await response.aread()
                ports.add(response.extensions["network_stream"].get_extra_info("client_addr"))
    assert len(ports) == 1


async def test_many_at_once_are_not_mixed_up(sdk: openai.AsyncOpenAI, pipeline: FakePipeline) -> None:
    normal = pipeline.submit

    async def submit(**fields: Any) -> Any:
        pipeline.text = f"number {fields['params'].seed}"
        return await normal(**fields)

    pipeline.submit = submit  # type: ignore[method-assign]

    async def one(seed: int) -> None:
        stream = await sdk.chat.completions.create(model=MODEL, messages=HELLO, stream=True, seed=seed)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == f"number {seed}"

    async with asyncio.TaskGroup() as group:
        for seed in range(40):
            group.create_task(one(seed))
    assert all(generation.num_closes == 1 for generation in pipeline.generations)
