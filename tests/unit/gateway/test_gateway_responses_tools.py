"""Tools and reasoning through the Responses API, with the official SDK."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from gateway_kit import MODEL, FakePipeline, make_app, serving, tiny_model
from test_gateway_tools import CALL, HERMES, PARIS, card

TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}


async def test_a_tool_round_trip_with_reasoning() -> None:
    pipeline = FakePipeline(tiny_model(card=card(HERMES)))
    pipeline.texts = [f"<think>Look it up.</think>Let me see. {CALL}", "Sunny."]
    async with (
        serving(make_app(pipeline)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as sdk,
        sdk.responses.stream(model=MODEL, input="weather?", tools=[TOOL]) as stream,
    ):
        events = [event async for event in stream]
        final = await stream.get_final_response()
        assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
        assert {item.status for item in final.output} == {"completed"}  # type: ignore[union-attr]
        call = final.output[2]
        assert call.type == "function_call"
        assert (call.name, call.arguments) == ("get_weather", PARIS)
        arguments = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        thoughts = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
        assert ("".join(arguments), "".join(thoughts)) == (PARIS, "Look it up.")
        assert [event.sequence_number for event in events] == list(range(len(events)))
        kinds = [event.type for event in events]
        assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 3
        history: Any = [{"role": "user", "content": "weather?"}]
        history += [item.to_dict() for item in events[-1].response.output]  # type: ignore[union-attr]
        history.append({"type": "function_call_output", "call_id": call.call_id, "output": "sun"})
        counted = await sdk.responses.input_tokens.count(model=MODEL, input=history, tools=[TOOL])
        answer = await sdk.responses.create(model=MODEL, input=history, tools=[TOOL], max_output_tokens=20)
        assert answer.output_text == "Sunny."
        assert answer.usage is not None
        assert counted.input_tokens == answer.usage.input_tokens
        assert answer.tools[0].to_dict() == TOOL


async def test_a_function_name_that_chat_refuses_is_refused_here_too() -> None:
    async with (
        serving(make_app(FakePipeline(tiny_model(card=card(HERMES))))) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as sdk,
    ):
        for name in ("get weather", "x" * 65, ""):
            with pytest.raises(openai.BadRequestError) as refused:
                await sdk.responses.create(model=MODEL, input="weather?", tools=[{**TOOL, "name": name}])
            assert refused.value.param == "tools[0].name"
