"""Anthropic's Messages API with its own SDK and the demo model: sync, async, streamed, and whole tool round trips."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import httpx
import pydantic
import pytest
from support.anthropic_wire import check_message_error
from support.fleet import Fleet

pytestmark = pytest.mark.e2e

MODEL = "demo"
GREEDY = {"temperature": 0}
WEATHER: Any = {
    "name": "get_weather",
    "description": "Weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
QUESTION: Any = {"role": "user", "content": "What is the weather in Paris?"}


class Place(pydantic.BaseModel):
    """Where something is."""

    latitude: Literal[1, 2, 3]
    north: bool


STORY: dict[str, Any] = {
    "model": MODEL, "max_tokens": 24, "messages": [{"role": "user", "content": "Tell me a long story."}],
    "extra_body": GREEDY,
}  # fmt: skip


@pytest.fixture(scope="module")
def client(demo_fleet: Fleet) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=demo_fleet.url, api_key="none", max_retries=0) as client:
        yield client


def text_of(message: anthropic.types.Message) -> str:
    """The only block's text."""
    (block,) = message.content
    assert block.type == "text"
    return block.text


def test_whole_streamed_and_async_answers_are_one(demo_fleet: Fleet, client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**STORY)
    with client.messages.stream(**STORY) as stream:
        said = "".join(stream.text_stream)
        final = stream.get_final_message()

    async def several() -> list[anthropic.types.Message]:
        async with anthropic.AsyncAnthropic(base_url=demo_fleet.url, auth_token="none", max_retries=0) as waiting:
            return await asyncio.gather(*(waiting.messages.create(**STORY) for _ in range(2)))

    assert len({said, *map(text_of, [whole, final, *asyncio.run(several())])}) == 1
    for answer in (whole, final):
        assert answer.usage.output_tokens <= STORY["max_tokens"]
        assert answer.stop_reason in {"end_turn", "max_tokens"}
    counted = client.messages.count_tokens(model=MODEL, messages=STORY["messages"])
    cached = final.usage.cache_read_input_tokens
    assert cached is not None
    assert counted.input_tokens == final.usage.input_tokens + cached


@pytest.mark.parametrize("streams", [False, True])
def test_a_question_becomes_a_call_and_its_result_an_answer(client: anthropic.Anthropic, *, streams: bool) -> None:
    def ask(turns: list[Any]) -> anthropic.types.Message:
        fields: Any = {
            "model": MODEL, "max_tokens": 100, "messages": turns, "tools": [WEATHER], "extra_body": GREEDY,
        }  # fmt: skip
        if not streams:
            return client.messages.create(**fields)
        with client.messages.stream(**fields) as stream:
            return stream.get_final_message()

    first = ask([QUESTION])
    (call,) = first.content
    assert call.type == "tool_use"
    assert (first.stop_reason, call.name, call.input) == ("tool_use", "get_weather", {"city": "Paris"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny, 25 degrees"}
    last = ask([QUESTION, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}])
    assert (last.stop_reason, text_of(last)) == ("end_turn", "In Paris it is sunny with 25 degrees.")


def test_helpers_of_the_sdk(client: anthropic.Anthropic) -> None:
    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """Weather of a city."""
        return f"sunny, {20 + len(city)} degrees"

    runner: Any = client.beta.messages.tool_runner(
        model=MODEL, max_tokens=100, messages=[QUESTION], tools=[get_weather], extra_body=GREEDY
    )
    assert runner.until_done().content[0].text == "In Paris it is sunny with 25 degrees."
    parsed = client.messages.parse(**{**STORY, "max_tokens": 60}, output_format=Place)
    assert isinstance(parsed.parsed_output, Place)


def test_choices_stops_and_errors(demo_fleet: Fleet, client: anthropic.Anthropic) -> None:
    forced = client.messages.create(
        **{**STORY, "max_tokens": 100}, tools=[WEATHER], tool_choice={"type": "tool", "name": "get_weather"}
    )
    assert [block.type for block in forced.content] == ["tool_use"]
    assert forced.stop_reason == "tool_use"
    stopped = client.messages.create(**STORY, stop_sequences=["e"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "e")
    assert "e" not in text_of(stopped)
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**{**STORY, "model": "other"})
    answer = httpx.post(f"{demo_fleet.url}/v1/messages", json={"model": MODEL, "messages": [QUESTION]})
    check_message_error(answer, 400)
