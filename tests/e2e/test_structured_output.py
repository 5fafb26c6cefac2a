"""Structured output through a real fleet: the SDK's helpers, vLLM's fields, and workers that leave and die."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, Field
from support.fleet import DEMO, Fleet, until
from support.json_schemas import BY_HAND, check, generated, objects
from support.redis_server import RedisServer

from fleet.types import FinishReason

pytestmark = pytest.mark.e2e

ASK: list[Any] = [{"role": "user", "content": "Describe a worker."}]
NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999}, "minItems": 90, "maxItems": 90}


class Page(BaseModel):
    """Part of `Worker`."""

    number: int = Field(ge=0, le=9999)
    kind: Literal["free", "cached", "held"]


class Worker(BaseModel):
    """What the model is asked for."""

    name: str = Field(max_length=20)
    draining: bool
    pages: list[Page] = Field(min_length=1, max_length=3)
    host: str | None = Field(max_length=12)


@pytest.fixture(scope="module")
def fleet(module_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One prefill worker and two decode workers, float32."""
    with Fleet(module_redis, tmp_path_factory.mktemp("fleet"), settings={"lease_s": "1.5"}) as fleet:
        add(fleet, "prefill", 1)
        add(fleet, "decode", 1)
        add(fleet, "decode", 2)
        fleet.gateway()
        fleet.wait_ready(decode=2)
        yield fleet


def add(fleet: Fleet, role: str, number: int) -> None:
    fleet.start(f"{role}_svc", f"{role}-{number}", model=DEMO, served_model_name="demo", dtype="float32")


def named(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def test_the_sdk_parses_into_a_model_plain_and_streamed(fleet: Fleet) -> None:
    client = fleet.client()
    options: Any = {"model": "demo", "messages": ASK, "temperature": 1.5, "seed": 3, "max_tokens": 400}
    answer = client.chat.completions.parse(response_format=Worker, n=3, **options)
    parsed = [choice.message.parsed for choice in answer.choices]
    assert all(isinstance(worker, Worker) for worker in parsed)
    assert len({repr(worker) for worker in parsed}) == 3
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    with client.chat.completions.stream(response_format=Worker, **options) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == parsed[0]
    response = client.responses.parse(
        model="demo", input=ASK, text_format=Worker, temperature=1.5, max_output_tokens=400, store=False
    )
    assert isinstance(response.output_parsed, Worker)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(response_format=Worker, **options | {"max_tokens": 5})


def test_every_field_constrains_chats_and_completions(fleet: Fleet) -> None:
    client = fleet.client()

    def text(**fields: Any) -> str:
        return complete(client, **fields).choices[0].text

    answers = complete(client, response_format={"type": "json_object"}, max_tokens=200, n=16, logit_bias=enders(fleet))
    finished = [json.loads(one.text) for one in answers.choices if one.finish_reason == "stop"]
    assert all(one.text.startswith("{") for one in answers.choices)
    assert finished
    assert all(isinstance(one, dict) for one in finished)
    assert re.fullmatch(r"[A-Z]{3}-\d{4}", text(guided_regex=r"[A-Z]{3}-\d{4}"))
    assert text(structured_outputs={"choice": ["shm", "zmq"]}) in ("shm", "zmq")
    assert re.fullmatch(r"a+b", text(guided_grammar='root ::= "a" root | "ab"', max_tokens=200, temperature=0.5))
    person = objects(age={"type": "integer", "minimum": 0, "maximum": 130})
    check(person, text(guided_json=person, echo=False))
    chat = client.chat.completions.create(
        model="demo",
        messages=ASK,
        temperature=1.5,
        seed=1,
        logprobs=True,
        top_logprobs=2,
        extra_body={"guided_choice": ["no"]},
    )
    choice = chat.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("no", "stop")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert b"".join(bytes(token.bytes or ()) for token in choice.logprobs.content) == b"no"
    assert chat.usage is not None
    assert chat.usage.completion_tokens == len(choice.logprobs.content)
    echoed = complete(client, guided_choice=["x", "y"], echo=True, n=4)
    assert {one.text for one in echoed.choices} <= {"Answer: x", "Answer: y"}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="demo", messages=ASK, response_format=named({"not": {}}))
    assert refused.value.param == "response_format.json_schema.schema"
    assert "'not'" in refused.value.message


def test_a_prefix_is_cached_whatever_the_grammar(fleet: Fleet) -> None:
    client = fleet.client()
    prompt = "The same long prompt, with and without a grammar. " * 8
    plain = complete(client, prompt=prompt, max_tokens=4)
    bound = complete(client, prompt=prompt, guided_choice=["yes"])
    assert plain.usage is not None
    assert bound.usage is not None
    assert bound.usage.prompt_tokens_details is not None
    assert bound.usage.prompt_tokens_details.cached_tokens > plain.usage.prompt_tokens // 2


async def test_fifty_schemas_at_once_through_http(fleet: Fleet) -> None:
    """Random sampling at temperature 1.5; every finished answer satisfies its schema, whoever shared the batch."""
    schemas = [*BY_HAND[::3], *generated(27, seed=9)]
    async with client_of(fleet) as client:
        answers = await asyncio.gather(
            *(
                client.completions.create(
                    model="demo", prompt="Answer: ", temperature=1.5, seed=seed, max_tokens=300,
                    extra_body={"response_format": named(schema)},
                )
                for seed, schema in enumerate(schemas)
            )
        )  # fmt: skip
    finished = 0
    for schema, answer in zip(schemas, answers, strict=True):
        if answer.choices[0].finish_reason == FinishReason.STOP:
            check(schema, answer.choices[0].text)
            finished += 1
    assert finished > 0.8 * len(schemas)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
async def test_a_constrained_stream_outlives_its_worker(fleet: Fleet, signum: signal.Signals) -> None:
    """Moved by a drain or replayed after a death, at temperature 1 with a seed: the text of the undisturbed stream."""
    async with client_of(fleet) as client:
        undisturbed = [await numbers(client, seed) for seed in range(4)]
        for text in undisturbed:
            check(NUMBERS, text)
        replays = fleet.metric("baton_replays_total")
        chunks: asyncio.Queue[str] = asyncio.Queue()
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(numbers(client, seed, seen=chunks.put_nowait)) for seed in range(4)]
            # Amid the first to come this far; it has hundreds of tokens left, so that its worker is found in time.
            seen: Counter[str] = Counter()
            request_id = ""
            while seen[request_id] < 20:
                request_id = await chunks.get()
                seen[request_id] += 1
            victim = fleet.forget(await asyncio.to_thread(decode_worker_of, fleet, request_id))
            await asyncio.to_thread(victim.stop, signum)
        assert [task.result() for task in running] == undisturbed
        if signum == signal.SIGKILL:
            assert fleet.metric("baton_replays_total") > replays
    add(fleet, "decode", 10 + signum)
    await asyncio.to_thread(fleet.wait_ready, decode=2)


def decode_worker_of(fleet: Fleet, request_id: str) -> str:
    """Who decodes the request; known some milliseconds after it is true."""

    def find() -> str | None:
        hops = httpx.get(f"{fleet.url}/v1/requests/{request_id}").json().get("hops", [])
        return next((hop["worker"] for hop in hops if hop["role"] == "decode"), None)

    found: str = until(find, within_s=20, what="the request is decoded")
    return found


async def numbers(client: openai.AsyncOpenAI, seed: int, *, seen: Callable[[str], object] = lambda _: None) -> str:
    stream = await client.chat.completions.create(
        model="demo", messages=ASK, temperature=1.0, seed=seed, stream=True, response_format=named(NUMBERS)
    )
    text = ""
    async for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        seen(chunk.id)
    return text


def enders(fleet: Fleet) -> dict[str, float]:
    """A bias that helps a small model to close its strings and objects."""
    ids = httpx.post(f"{fleet.url}/tokenize", json={"prompt": '":1}'}).json()["tokens"]
    return dict.fromkeys(map(str, ids), 5.0)


def complete(client: openai.OpenAI, **fields: Any) -> openai.types.Completion:
    own = {
        name: fields.pop(name)
        for name in ("prompt", "max_tokens", "temperature", "echo", "n", "seed", "logit_bias")
        if name in fields
    }
    defaults: Any = {"model": "demo", "prompt": "Answer: ", "max_tokens": 60, "temperature": 1.5, "seed": 1}
    return client.completions.create(**defaults | own, extra_body=fields)


def client_of(fleet: Fleet) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="x", max_retries=0, timeout=60)
