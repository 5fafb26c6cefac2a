"""LiteLLM and LangChain against a running pipeline; needs the extra `frameworks` (`make frameworks-test`)."""

from __future__ import annotations

from typing import Any

import pytest
from support.fleet import Fleet

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]  # theirs, not ours

HI = [{"role": "user", "content": "What is TTFT?"}]
OPTIONS: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def litellm() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else the import reaches for the net
        return pytest.importorskip("litellm", reason="not installed; see `make frameworks-test`", exc_type=ImportError)


@pytest.fixture(scope="module")
def langchain() -> Any:
    reason = "not installed; see `make frameworks-test`"
    return pytest.importorskip("langchain_openai", reason=reason, exc_type=ImportError)


@pytest.fixture(scope="module")
def expected(demo_fleet: Fleet) -> str:
    """What the official SDK gets to hear."""
    with demo_fleet.client() as client:
        answer = client.chat.completions.create(model="demo", messages=HI, **OPTIONS)  # type: ignore[arg-type]
    return answer.choices[0].message.content or ""


async def test_litellm_chats_streams_and_completes(demo_fleet: Fleet, litellm: Any, expected: str) -> None:
    place = {"api_base": f"{demo_fleet.url}/v1", "api_key": "none"}
    whole = litellm.completion(model="openai/demo", messages=HI, **OPTIONS, **place)
    assert whole.choices[0].message.content == expected
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    stream = litellm.completion(
        model="openai/demo", messages=HI, stream=True, stream_options={"include_usage": True}, **OPTIONS, **place
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    again = await litellm.acompletion(model="openai/demo", messages=HI, **OPTIONS, **place)
    assert again.choices[0].message.content == expected
    text = litellm.text_completion(model="text-completion-openai/demo", prompt="Once upon", **OPTIONS, **place)
    assert text.choices[0].text


def test_litellm_knows_our_errors(demo_fleet: Fleet, litellm: Any) -> None:
    ask = {"api_base": f"{demo_fleet.url}/v1", "api_key": "none", "messages": HI, "num_retries": 0}
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(model="openai/demo", **ask, max_tokens=10**6)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model="openai/nope", **ask)
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(model="openai/demo", **ask, temperature=3)


async def test_langchain_invokes_streams_and_batches(demo_fleet: Fleet, langchain: Any, expected: str) -> None:
    chat = langchain.ChatOpenAI(model="demo", base_url=f"{demo_fleet.url}/v1", api_key="none", **OPTIONS)
    answer = chat.invoke(HI)
    assert answer.content == expected
    assert answer.usage_metadata["output_tokens"] <= 12
    assert answer.response_metadata["system_fingerprint"].startswith("baton-")
    chunks = list(chat.stream(HI, stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == expected
    joined = sum(chunks[1:], chunks[0])
    assert joined.usage_metadata == answer.usage_metadata
    assert [message.content for message in await chat.abatch([HI] * 4)] == [expected] * 4
    history = [*HI, answer, {"role": "user", "content": "And ITL?"}]
    assert chat.invoke(history).content
    completion = langchain.OpenAI(model="demo", base_url=f"{demo_fleet.url}/v1", api_key="none", **OPTIONS)
    assert completion.invoke("Once upon")
    assert len(completion.generate(["One", "Two"], n=2).generations[0]) >= 1


def test_langchain_structures_and_calls(demo_fleet: Fleet, langchain: Any) -> None:
    chat = langchain.ChatOpenAI(
        model="demo", base_url=f"{demo_fleet.url}/v1", api_key="none", temperature=0, max_tokens=120
    )
    schema = {
        "title": "Place",
        "description": "A place.",
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    assert chat.with_structured_output(schema, method="json_schema", strict=True).invoke(HI)["city"] in {
        "Paris",
        "Rome",
    }
    weather = {
        "type": "function",
        "function": {"name": "get_weather", "description": "Weather.", "parameters": {**schema, "title": "Weather"}},
    }
    called = chat.bind_tools([weather], tool_choice="get_weather").invoke("What is the weather in Paris?")
    (call,) = called.tool_calls
    assert call["name"] == "get_weather"
    assert call["args"]["city"] in {"Paris", "Rome"}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}
    assert chat.bind_tools([weather]).invoke([*HI, called, result]) is not None
