"""`/v1/embeddings`, with the real SDK where its decoding matters."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
from typing import Any

import openai
import pytest
from gateway_kit import (
    HIDDEN_SIZE,
    MODEL,
    FakePipeline,
    encode,
    eventually,
    make_app,
    serving,
    tiny_model,
    vector_of,
)
from litestar import Litestar
from litestar.testing import AsyncTestClient

from fleet.types import FinishReason, Pooling
from gateway.errors import Overloaded
from gateway.pipeline import Tokens

Client = AsyncTestClient[Litestar]
PATH = "/v1/embeddings"


async def ask(client: Client, text: Any, **fields: Any) -> dict[str, Any]:
    response = await client.post(PATH, json={"model": MODEL, "input": text, **fields})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def numbers(vector: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))


@pytest.mark.parametrize("text", ["hi", ["hello", "world", "hi"], [5, 6], [[5, 6], [7]]])
async def test_every_form_of_input_gives_a_vector_per_prompt(client: Client, pipeline: FakePipeline, text: Any) -> None:
    answer = await ask(client, text, user="me")
    assert (answer["object"], answer["model"]) == ("list", MODEL)
    prompts = [entry["ids"] for entry in pipeline.submitted]
    sources = text if isinstance(text, list) and not isinstance(text[0], int) else [text]
    assert prompts == [encode(tiny_model(), one) if isinstance(one, str) else one for one in sources]
    for index, (ids, entry) in enumerate(zip(prompts, answer["data"], strict=True)):
        assert (entry["object"], entry["index"]) == ("embedding", index)
        assert entry["embedding"] == numbers(vector_of(ids))
    total = sum(map(len, prompts))
    assert answer["usage"] == {"prompt_tokens": total, "total_tokens": total}
    assert all(entry["params"].max_tokens == 0 for entry in pipeline.submitted)
    assert all(generation.num_closes == 1 for generation in pipeline.generations)


async def test_base64_is_little_endian_float32(client: Client) -> None:
    (plain,) = (await ask(client, "hi", encoding_format="float"))["data"]
    (packed,) = (await ask(client, "hi", encoding_format="base64"))["data"]
    assert numbers(base64.b64decode(packed["embedding"])) == plain["embedding"]


async def test_fewer_dimensions_are_a_prefix_of_length_one(client: Client) -> None:
    (whole,) = (await ask(client, "hi"))["data"]
    (short,) = (await ask(client, "hi", dimensions=2))["data"]
    length = math.hypot(*whole["embedding"][:2])
    assert short["embedding"] == pytest.approx([value / length for value in whole["embedding"][:2]])
    assert (await ask(client, "hi", dimensions=HIDDEN_SIZE))["data"] == [whole]


async def test_pooling_salt_and_priority_reach_the_fleet(client: Client, pipeline: FakePipeline) -> None:
    await ask(client, "hi")
    await ask(client, "hi", pooling="mean", cache_salt="s", priority=3)
    first, second = pipeline.submitted
    assert (first["pooling"], second["pooling"]) == (Pooling.LAST, Pooling.MEAN)
    assert (second["salt"], second["priority"]) == ("s", 3)


@pytest.mark.parametrize(
    ("fault", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": None}, "input"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": HIDDEN_SIZE + 1}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"pooling": "cls"}, "pooling"),
        ({"truncate": True}, "truncate"),
    ],
)
async def test_a_fault_is_a_400_that_names_its_field(
    client: Client, pipeline: FakePipeline, fault: dict[str, Any], param: str
) -> None:
    response = await client.post(PATH, json={"model": MODEL, "input": "hi", **fault})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert pipeline.submitted == []


async def test_a_full_context_fits_and_more_is_refused_with_both_numbers(client: Client) -> None:
    assert (await ask(client, [5] * 512))["usage"]["prompt_tokens"] == 512
    error = (await client.post(PATH, json={"model": MODEL, "input": [[5], [5] * 513]})).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    assert "512" in error["message"]
    assert "513" in error["message"]


async def test_failures_keep_their_status_and_close_what_was_started(client: Client, pipeline: FakePipeline) -> None:
    pipeline.refuse, pipeline.refuse_after = Overloaded("full", retry_after_s=2), 1
    response = await client.post(PATH, json={"model": MODEL, "input": ["a", "b"]})
    assert (response.status_code, response.headers["retry-after"]) == (429, "2")
    pipeline.refuse = None
    pipeline.end = Tokens(token_ids=[], finish=FinishReason.ERROR, error="no finite vector")
    response = await client.post(PATH, json={"model": MODEL, "input": "a"})
    assert (response.status_code, response.json()["error"]["message"]) == (500, "no finite vector")
    assert all(generation.num_closes for generation in pipeline.generations)


async def test_the_sdk_decodes_vectors_and_a_client_that_leaves_cancels(pipeline: FakePipeline) -> None:
    async with serving(make_app(pipeline)) as url:
        sdk = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        async with sdk:
            answer = await sdk.embeddings.create(model=MODEL, input=["hi"] * 200)
            assert [entry.index for entry in answer.data] == list(range(200))
            assert answer.data[7].embedding == numbers(vector_of(pipeline.submitted[0]["ids"]))
            pipeline.hold_after = 0
            pipeline.generations.clear()
            call = asyncio.create_task(sdk.embeddings.create(model=MODEL, input=["a", "b"]))
            await eventually(lambda: len(pipeline.generations) == 2)
            call.cancel()
            await eventually(lambda: all(generation.num_closes for generation in pipeline.generations))
