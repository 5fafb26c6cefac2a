"""Tools and reasoning through `/v1/chat/completions`: what reaches the model, and what comes back."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from gateway_kit import MODEL, FakePipeline, byte_level_tokenizer, make_app, model_files, tiny_model
from litestar import Litestar
from litestar.testing import AsyncTestClient
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken

from fleet import grammar as meaning
from fleet.types import Grammar, GrammarKind
from gateway.text.card import ModelCard
from gateway.text.message_syntax import SyntaxChoice

Client = AsyncTestClient[Litestar]
PATH = "/v1/chat/completions"
HERMES = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is defined %}"
    "{{ message.content }}{% endif %}{% for call in message.tool_calls or [] %}<tool_call>"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OPENED = HERMES.replace("{% if enable_thinking", "<think>\n{% if enable_thinking")
MISTRAL = (
    "{{ tools | tojson if tools }}{% for message in messages %}{{ message.role }} {{ message.content or '' }}"
    "{{ message.tool_call_id }}{% for call in message.tool_calls or [] %}[TOOL_CALLS][{{ call.id }}]{% endfor %}"
    "{% endfor %}"
)
LLAMA3 = MISTRAL.replace("[TOOL_CALLS]", "<|python_tag|>")
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time"}}
TOOLS = [WEATHER, CLOCK]
PARIS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
TWO = CALL + '\n<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
ASK = [{"role": "user", "content": "weather?"}]


def card(template: str, *markers: str) -> ModelCard:
    """A card with a template, and markers as control tokens."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens([AddedToken(marker, special=True) for marker in markers])
    return ModelCard.from_files(model_files(tokenizer, template))


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline(tiny_model(card=card(HERMES), max_model_len=4096))


@pytest.fixture
async def client(pipeline: FakePipeline) -> AsyncIterator[Client]:
    async with AsyncTestClient(make_app(pipeline)) as client:
        yield client


async def plain(client: Client, **fields: Any) -> dict[str, Any]:
    """The only choice of a whole answer."""
    answer = await client.post(PATH, json={"model": MODEL, "messages": ASK, "tools": TOOLS, **fields})
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


async def streamed(client: Client, **fields: Any) -> tuple[list[dict[str, Any]], str]:
    """Deltas and finish reason of a streamed answer."""
    body = {"model": MODEL, "messages": ASK, "tools": TOOLS, "stream": True, **fields}
    answer = await client.post(PATH, json=body)
    assert answer.status_code == 200, answer.text
    events = [json.loads(part[6:]) for part in answer.text.split("\n\n")[:-2]]
    choices = [event["choices"][0] for event in events]
    return [choice["delta"] for choice in choices], choices[-1]["finish_reason"]


def put_together(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """What the SDK makes of deltas, holding them to its rules."""
    message: dict[str, Any] = {"content": None, "reasoning": "", "calls": []}
    for delta in deltas:
        if delta.get("content") is not None:
            message["content"] = (message["content"] or "") + delta["content"]
        message["reasoning"] += delta.get("reasoning_content", "")
        assert delta.get("reasoning") == delta.get("reasoning_content")
        for part in delta.get("tool_calls", []):
            assert len(delta["tool_calls"]) == 1
            if part["index"] == len(message["calls"]):
                assert set(part) == {"index", "id", "type", "function"}
                assert set(part["function"]) == {"name", "arguments"}
                message["calls"].append([part["function"]["name"], ""])
            else:
                assert set(part) == {"index", "function"}
                assert set(part["function"]) == {"arguments"}
            assert part["index"] == len(message["calls"]) - 1
            message["calls"][-1][1] += part["function"]["arguments"]
    return message


def taken(choice: dict[str, Any]) -> dict[str, Any]:
    """A whole message in the same form."""
    message = choice["message"]
    calls = message.get("tool_calls", [])
    assert all(call["type"] == "function" and call["id"].startswith("call_") for call in calls)
    assert len({call["id"] for call in calls}) == len(calls)
    return {
        "content": message["content"],
        "reasoning": message.get("reasoning_content", ""),
        "calls": [[call["function"]["name"], call["function"]["arguments"]] for call in calls],
    }


async def test_a_call_comes_back_plain_and_streamed_alike(client: Client, pipeline: FakePipeline) -> None:
    pipeline.text = TWO
    wanted = {"content": None, "reasoning": "", "calls": [["get_weather", PARIS], ["get_time", "{}"]]}
    for pipeline.per_item in (1, 3, 1000):
        choice = await plain(client)
        assert (taken(choice), choice["finish_reason"]) == (wanted, "tool_calls")
        deltas, reason = await streamed(client)
        assert (put_together(deltas), reason) == (wanted, "tool_calls")
        assert deltas[0] == {"role": "assistant", "content": None, "refusal": None}
    prompt = pipeline.served[0].card.tokenizer.decode(pipeline.submitted[0]["ids"], skip_special_tokens=True)
    assert json.dumps(WEATHER) in prompt


async def test_content_before_calls_and_plain_answers(client: Client, pipeline: FakePipeline) -> None:
    pipeline.text = "Let me see.\n" + CALL
    assert taken(await plain(client))["content"] == "Let me see."
    pipeline.text = "No tool needed. <tool"
    choice = await plain(client)
    assert choice["message"] == {"role": "assistant", "content": pipeline.text, "refusal": None}
    assert choice["finish_reason"] == "stop"
    deltas, reason = await streamed(client)
    assert (put_together(deltas)["content"], reason) == (pipeline.text, "stop")


async def test_logprobs_and_ids_of_calls_are_complete(client: Client, pipeline: FakePipeline) -> None:
    pipeline.text = "Hm. " + TWO
    fields = {"logprobs": True, "top_logprobs": 1, "return_token_ids": True}
    choice = await plain(client, **fields)
    entries = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == pipeline.text
    body = {"model": MODEL, "messages": ASK, "tools": TOOLS, "stream": True, **fields}
    events = (await client.post(PATH, json=body)).text.split("\n\n")[:-2]
    choices = [json.loads(event[6:])["choices"][0] for event in events]
    assert [e for c in choices if c["logprobs"] for e in c["logprobs"]["content"]] == entries
    assert [i for c in choices for i in c.get("token_ids", [])] == choice["token_ids"]
    assert put_together([c["delta"] for c in choices])["calls"] == taken(choice)["calls"]


async def test_the_choice_of_tools(client: Client, pipeline: FakePipeline) -> None:
    pipeline.text = TWO
    silent = await plain(client, tool_choice="none")
    assert silent["message"]["content"] == TWO
    bare = pipeline.submitted[-1]["ids"]
    required = await plain(client, tool_choice="required")
    assert (len(required["message"]["tool_calls"]), required["finish_reason"]) == (2, "tool_calls")
    assert len(pipeline.submitted[-1]["ids"]) > len(bare)
    named = await plain(client, tool_choice={"type": "function", "function": {"name": "get_weather"}})
    assert (taken(named)["calls"], named["finish_reason"]) == ([["get_weather", PARIS]], "stop")
    single = await plain(client, parallel_tool_calls=False)
    assert taken(single)["calls"] == [["get_weather", PARIS]]
    only = [{"type": "function", "function": {"name": "get_weather"}}]
    some = await plain(client, tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": only}})
    assert taken(some)["calls"] == [["get_weather", PARIS]]
    assert "get_time" in taken(some)["content"]


def matches(grammar: Grammar, text: str) -> bool:
    """Whether a grammar takes a whole text, byte by byte."""
    matcher = LLMatcher(LLTokenizer("byte"), meaning.library_source(grammar))
    assert not matcher.is_error(), matcher.get_error()
    data = list(text.encode())
    return bool(matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting())


async def test_required_calls_are_held_to_a_grammar(client: Client, pipeline: FakePipeline) -> None:
    await plain(client)
    assert pipeline.submitted[-1]["params"].grammar is None
    await plain(client, tool_choice="required")
    grammar = pipeline.submitted[-1]["params"].grammar
    assert grammar.kind is GrammarKind.LARK
    assert matches(grammar, CALL)
    assert matches(grammar, TWO)
    for wrong in ("hello", CALL.replace("city", "town"), CALL.replace("get_weather", "steal"), CALL[:-1], CALL + "x"):
        assert not matches(grammar, wrong)
    await plain(client, tool_choice={"type": "function", "function": {"name": "get_weather"}})
    named = pipeline.submitted[-1]["params"].grammar
    assert matches(named, CALL)
    assert not matches(named, TWO)
    assert not matches(named, TWO.removeprefix(CALL + "\n"))


async def test_strict_functions_are_held_to_their_schemas_once_a_call_begins(
    client: Client, pipeline: FakePipeline
) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    await plain(client, tools=[strict, CLOCK])
    grammar = pipeline.submitted[-1]["params"].grammar
    for right in ("hello\nworld <b>", CALL, "See: " + CALL, TWO):
        assert matches(grammar, right)
    for wrong in (CALL.replace("city", "town"), "See: <tool_call>\n{}\n</tool_call>"):
        assert not matches(grammar, wrong)


async def test_a_form_of_the_answer_leaves_room_for_calls_and_reasoning(client: Client, pipeline: FakePipeline) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object", "required": ["k"]}}}
    await plain(client, response_format=form)
    both = pipeline.submitted[-1]["params"].grammar
    for right in ('{"k": 1}', CALL, "<think>hm</think>\n" + CALL, '<think>hm</think>{"k": 1}'):
        assert matches(both, right)
    assert not matches(both, "hello")
    await plain(client, tools=None, response_format=form)
    alone = pipeline.submitted[-1]["params"].grammar
    assert matches(alone, '<think>hm</think>{"k": 1}')
    assert not matches(alone, CALL)
    pipeline.text = "<think>"
    choice = await plain(client, guided_choice=["<think>", "b"])
    assert choice["message"]["content"] == "<think>"


@pytest.mark.parametrize("template", [MISTRAL, MISTRAL + "{# [ARGS] #}", LLAMA3])
async def test_every_format_has_its_grammar(template: str) -> None:
    pipeline = FakePipeline(tiny_model(card=card(template), max_model_len=4096))
    args = "{# [ARGS] #}" in template
    one, two = {
        MISTRAL: ('[{"name": "get_weather", "arguments": %s}', ', {"name": "get_time", "arguments": {}}'),
        LLAMA3: ('{"name": "get_weather", "parameters": %s}', '; {"name": "get_time", "parameters": {}}'),
    }.get(template, ("get_weather[ARGS]%s", "[TOOL_CALLS]get_time[ARGS]{}"))
    start, end = ("" if template is LLAMA3 else "[TOOL_CALLS]", "]" if template == MISTRAL else "")
    pipeline.text = start + one % PARIS + two + end
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    async with AsyncTestClient(make_app(pipeline)) as client:
        choice = await plain(client, tool_choice="required")
        assert taken(choice)["calls"] == [["get_weather", PARIS], ["get_time", "{}"]]
        forced = pipeline.submitted[-1]["params"].grammar
        await plain(client, tools=[strict, CLOCK])
        free = pipeline.submitted[-1]["params"].grammar
    broken = pipeline.text.replace("city", "town")
    for grammar in (forced, free):
        assert matches(grammar, pipeline.text)
        assert not matches(grammar, broken)
    assert matches(free, "Hello, world.")
    assert not matches(forced, "Hello, world.")
    assert args or "[ARGS]" not in forced.source


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
    ({"tools": [CLOCK, CLOCK]}, "tools[1].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
     "tools[0].function.parameters"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"properties": 3}}}],
      "tool_choice": "required"}, "tools[0].function.parameters"),
    ({"tools": "x"}, "tools"),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice.type"),
    ({"tool_choice": {"type": "function", "function": {"name": "steal"}}}, "tool_choice.function.name"),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
     "tool_choice.allowed_tools.tools"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    ({"tools": None, "tool_choice": "required"}, "tool_choice"),
    ({"tools": None, "functions": [{"name": "f"}]}, "functions"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), BAD)
async def test_bad_tools_are_refused_by_name(client: Client, fields: dict[str, Any], param: str) -> None:
    answer = await client.post(PATH, json={"model": MODEL, "messages": ASK, "tools": TOOLS, **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


async def test_a_template_without_tools_is_a_clear_refusal() -> None:
    for template, choice in (("{{ messages }}", SyntaxChoice()), (HERMES, SyntaxChoice(tool_format="none"))):
        files = model_files(byte_level_tokenizer(), template)
        pipeline = FakePipeline(tiny_model(card=ModelCard.from_files(files, choice)))
        async with AsyncTestClient(make_app(pipeline)) as client:
            body = {"model": MODEL, "messages": ASK, "tools": TOOLS}
            answer = await client.post(PATH, json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
            assert (await client.post(PATH, json={**body, "tool_choice": "none"})).status_code == 200


async def test_a_template_for_tools_is_used_for_them() -> None:
    files = model_files(byte_level_tokenizer(), None)
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": HERMES}]
    config = {**json.loads(files["tokenizer_config.json"]), "chat_template": named}
    model = ModelCard.from_files({**files, "tokenizer_config.json": json.dumps(config).encode()})
    pipeline = FakePipeline(tiny_model(card=model))
    pipeline.text = CALL
    async with AsyncTestClient(make_app(pipeline)) as client:
        assert taken(await plain(client))["calls"] == [["get_weather", PARIS]]
        assert taken(await plain(client, tools=None))["content"] == CALL
    prompts = [model.tokenizer.decode(one["ids"], skip_special_tokens=True) for one in pipeline.submitted]
    assert "get_weather" in prompts[0]
    assert prompts[1] == "plain"


async def test_markers_that_are_control_tokens_are_seen_by_the_reader_alone() -> None:
    model = card(MISTRAL, "[TOOL_CALLS]")
    pipeline = FakePipeline(tiny_model(card=model))
    pipeline.text = f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}]'
    async with AsyncTestClient(make_app(pipeline)) as client:
        choice = await plain(client)
        assert taken(choice)["calls"] == [["get_weather", PARIS]]
        call_id = choice["message"]["tool_calls"][0]["id"]
        assert (await plain(client, tools=None))["message"]["content"].startswith(' [{"name"')
        history = [*ASK, choice["message"], {"role": "tool", "tool_call_id": call_id, "content": "sunny"}]
        await plain(client, messages=history)
        shown = model.tokenizer.decode(pipeline.submitted[-1]["ids"], skip_special_tokens=True)
        (short,) = re.findall(r"\[([a-z0-9]{9})\]", shown)
        assert shown.count(short) == 2
        await plain(client, tool_choice="required")
        grammar = pipeline.submitted[-1]["params"].grammar
        assert f"<[{model.tokenizer.id_of('[TOOL_CALLS]')}]>" in grammar.source
        pipeline.text = "[TOOL_CALLS]hello"
        assert (await plain(client))["message"]["content"] == "hello"


async def test_reasoning_is_split_off_and_counted(client: Client, pipeline: FakePipeline) -> None:
    model = tiny_model(card=card(OPENED), max_model_len=4096)
    for served, text in ((pipeline.served[0], "<think>\nhm\n</think>\n\n"), (model, "hm\n</think>\n\n")):
        pipeline.served = [served]
        for pipeline.per_item in (1, 1000):
            pipeline.text = text + "Yes."
            answer = (await client.post(PATH, json={"model": MODEL, "messages": ASK})).json()
            message = answer["choices"][0]["message"]
            assert message == {
                "role": "assistant", "content": "Yes.", "refusal": None, "reasoning_content": "hm", "reasoning": "hm",
            }  # fmt: skip
            tokenizer = served.card.tokenizer
            num_before = len(tokenizer.encode(text.rstrip(), add_special_tokens=False))
            assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": num_before}
            deltas, reason = await streamed(client, tools=None)
            assert put_together(deltas) == {"content": "Yes.", "reasoning": "hm", "calls": []}
            assert reason == "stop"
            pipeline.text = text + CALL
            assert taken(await plain(client)) == {
                "content": None, "reasoning": "hm", "calls": [["get_weather", PARIS]],
            }  # fmt: skip
    await plain(client, tool_choice="required")
    grammar = pipeline.submitted[-1]["params"].grammar
    assert matches(grammar, "hm <b>\n</think>\n\n" + CALL)
    assert not matches(grammar, "hm <b>\n</think>\n\nYes.")


async def test_markers_of_reasoning_that_are_control_tokens() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<think>", special=True), AddedToken("</think>", special=True)])
    for template, text in ((HERMES, "<think>hm</think>"), (OPENED, "hm</think>")):
        model = ModelCard.from_files(model_files(tokenizer, template))
        assert model.think_end_id in model.tokenizer.special_ids
        pipeline = FakePipeline(tiny_model(card=model, max_model_len=4096))
        pipeline.text = text + CALL
        async with AsyncTestClient(make_app(pipeline)) as client:
            choice = await plain(client, tool_choice="required")
        assert taken(choice) == {"content": None, "reasoning": "hm", "calls": [["get_weather", PARIS]]}
        source = pipeline.submitted[-1]["params"].grammar.source
        assert f"<[{model.think_end_id}]>" in source


async def test_the_effort_of_reasoning(client: Client, pipeline: FakePipeline) -> None:
    for fields in ({"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}):
        await plain(client, tools=None, **fields)
        prompt = pipeline.served[0].card.tokenizer.decode(pipeline.submitted[-1]["ids"], skip_special_tokens=True)
        assert prompt.endswith("<think>\n\n</think>\n\n")
    await plain(client, tools=None, reasoning_effort="high")
    prompt = pipeline.served[0].card.tokenizer.decode(pipeline.submitted[-1]["ids"], skip_special_tokens=True)
    assert prompt.endswith("assistant\n")
    for effort in ("high", "very"):
        pipeline.served = [tiny_model()] if effort == "high" else [tiny_model(card=card(HERMES))]
        answer = await client.post(PATH, json={"model": MODEL, "messages": ASK, "reasoning_effort": effort})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "reasoning_effort")


async def test_tools_cost_prompt_tokens_in_tokenize_too(client: Client, pipeline: FakePipeline) -> None:
    await plain(client)
    body = {"messages": ASK, "tools": TOOLS}
    assert (await client.post("/tokenize", json=body)).json()["tokens"] == pipeline.submitted[-1]["ids"]
