"""Tool calls with the real SDK and the demo model: whole round trips, plain and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from support.fleet import Fleet
from support.openai_wire import CHAT, check_stream

pytestmark = pytest.mark.e2e

MODEL = "demo"


def function(name: str, **properties: str) -> Any:
    """A declaration of a function all of whose arguments are required."""
    parameters = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in properties.items()},
        "required": list(properties),
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [function("get_weather", city="string"), function("add", a="integer", b="integer")]
WEATHER: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
FUNCTIONS = {
    "get_weather": lambda city: f"sunny, {20 + len(city)} degrees",
    "add": lambda a, b: str(a + b),
}


class GetTime(pydantic.BaseModel):
    """Get the current time in a city."""

    city: str


@pytest.fixture(scope="module")
def client(demo_fleet: Fleet) -> Iterator[openai.OpenAI]:
    with demo_fleet.client() as client:
        yield client


@pytest.mark.parametrize(
    ("question", "name", "answer"),
    [
        ("What is the weather in Paris?", "get_weather", "In Paris it is sunny with 25 degrees."),
        ("What is 17 + 25?", "add", "17 + 25 = 42."),
    ],
)
def test_a_question_becomes_a_call_and_its_result_an_answer(
    client: openai.OpenAI, question: str, name: str, answer: str
) -> None:
    messages: list[Any] = [{"role": "user", "content": question}]
    for _ in range(3):
        choice = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, temperature=0).choices[0]
        messages.append(choice.message)
        if not choice.message.tool_calls:
            break
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        for call in choice.message.tool_calls:
            assert call.type == "function"
            assert call.function.name == name
            result = FUNCTIONS[name](**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    assert [getattr(message, "content", None) for message in messages[-1:]] == [answer]
    assert len(messages) == 4


def test_a_streamed_round_trip_with_the_helper(client: openai.OpenAI) -> None:
    tools = [openai.pydantic_function_tool(GetTime)]
    messages: list[Any] = [{"role": "user", "content": "What time is it in Rome?"}]
    with client.chat.completions.stream(model=MODEL, messages=messages, tools=tools, temperature=0) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.delta" in kinds
    assert "tool_calls.function.arguments.done" in kinds
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert call.function.parsed_arguments == GetTime(city="Rome")
    plain = client.chat.completions.parse(model=MODEL, messages=messages, tools=tools, temperature=0)
    assert plain.choices[0].message.tool_calls is not None
    assert plain.choices[0].message.tool_calls[0].function.parsed_arguments == GetTime(city="Rome")
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "12:34"}]
    with client.chat.completions.stream(model=MODEL, messages=messages, tools=tools, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
    assert text == "In Rome it is 12:34."


def test_a_question_that_needs_no_function_is_answered(client: openai.OpenAI) -> None:
    ask: list[Any] = [{"role": "user", "content": "What is TTFT?"}]
    choice = client.chat.completions.create(model=MODEL, messages=ask, tools=TOOLS, temperature=0).choices[0]
    assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)
    assert "first token" in (choice.message.content or "")


def test_two_calls_at_once_and_at_most_one(client: openai.OpenAI) -> None:
    ask: list[Any] = [{"role": "user", "content": "What is the weather in Paris and Rome?"}]
    both = client.chat.completions.create(model=MODEL, messages=ask, tools=TOOLS, temperature=0).choices[0].message
    assert [json.loads(call.function.arguments) for call in both.tool_calls or []] == [
        {"city": "Paris"},
        {"city": "Rome"},
    ]
    answer = client.chat.completions.create(
        model=MODEL, messages=ask, tools=TOOLS, temperature=0, parallel_tool_calls=False
    )
    assert len(answer.choices[0].message.tool_calls or []) == 1


def test_a_required_call_keeps_to_the_schema_at_any_temperature(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"unit": {"enum": ["kelvin", "rankine"]}, "n": {"type": "integer", "minimum": 3, "maximum": 5}},
        "required": ["unit", "n"],
        "additionalProperties": False,
    }
    odd: Any = {"type": "function", "function": {"name": "set_zebra", "parameters": schema}}
    for seed in range(4):
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "What is TTFT?"}],
            tools=[odd, *TOOLS],
            tool_choice={"type": "function", "function": {"name": "set_zebra"}},
            temperature=1.5,
            seed=seed,
            max_tokens=200,
        ).choices[0]
        assert answer.finish_reason == "stop"
        (call,) = answer.message.tool_calls or []
        arguments = json.loads(call.function.arguments)
        assert set(arguments) == {"unit", "n"}
        assert arguments["unit"] in ("kelvin", "rankine")
        assert 3 <= arguments["n"] <= 5
        some = client.chat.completions.create(
            model=MODEL, messages=WEATHER, tools=TOOLS, tool_choice="required", temperature=1.5, seed=seed,
            parallel_tool_calls=False, max_tokens=200,
        ).choices[0]  # fmt: skip
        assert some.finish_reason == "tool_calls"
        (call,) = some.message.tool_calls or []
        assert call.function.name in FUNCTIONS
        assert set(json.loads(call.function.arguments)) >= {"city"} or set(json.loads(call.function.arguments)) >= {"a"}


def test_the_stream_is_the_plain_answer_with_samples_and_logprobs(client: openai.OpenAI) -> None:
    body = {
        "model": MODEL, "messages": WEATHER, "tools": TOOLS, "n": 2, "seed": 5, "temperature": 0.8, "logprobs": True,
        "max_tokens": 100,
    }  # fmt: skip
    plain: Any = client.post(CHAT.removeprefix("/v1"), body=body, cast_to=object)
    with client.chat.completions.with_streaming_response.create(  # type: ignore[call-overload]
        **body, stream=True, stream_options={"include_usage": True}
    ) as answer:
        seen = check_stream(CHAT, answer.read(), model=MODEL, include_usage=True)
    assert seen.finishes == [choice["finish_reason"] for choice in plain["choices"]]
    for index, choice in enumerate(plain["choices"]):
        calls: list[list[str]] = []
        for event in seen.events:
            for part in event["choices"][0]["delta"].get("tool_calls", []):
                if event["choices"][0]["index"] == index:
                    if "id" in part:
                        calls.append([part["function"]["name"], ""])
                    calls[part["index"]][1] += part["function"]["arguments"]
        wanted = [[c["function"]["name"], c["function"]["arguments"]] for c in choice["message"].get("tool_calls", [])]
        assert calls == wanted
        tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
        assert [entry["token"] for entry in seen.logprobs[index]["content"]] == tokens
    assert seen.usage is not None
    assert seen.usage["completion_tokens"] == plain["usage"]["completion_tokens"]


def test_functions_cost_prompt_tokens_unless_no_call_may_be_made(client: openai.OpenAI) -> None:
    def count(**fields: Any) -> int:
        answer = client.chat.completions.create(model=MODEL, messages=WEATHER, max_tokens=1, **fields)
        assert answer.usage is not None
        return answer.usage.prompt_tokens

    assert count() == count(tools=TOOLS, tool_choice="none") < count(tools=TOOLS[:1]) < count(tools=TOOLS)
    for fields, param in (
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "steal"}, "tool_choice"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            count(**fields)
        assert refused.value.param == param
