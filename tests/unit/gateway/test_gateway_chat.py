"""`/v1/chat/completions`: shapes, streams, and what reaches the workers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway_kit import MODEL, FakePipeline, encode, make_app, tiny_card, tiny_model
from litestar import Litestar
from litestar.testing import AsyncTestClient

from fleet.types import FinishReason
from gateway.pipeline import Tokens
from gateway.text.card import SamplingDefaults

Client = AsyncTestClient[Litestar]
HELLO = [{"role": "user", "content": "hi"}]
PATH = "/v1/chat/completions"


async def ask(client: Client, **fields: Any) -> dict[str, Any]:
    response = await client.post(PATH, json={"model": MODEL, "messages": HELLO, **fields})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def events(client: Client, path: str = PATH, **fields: Any) -> list[dict[str, Any]]:
    """Events of a stream, which must end with one [DONE]."""
    body = {"model": MODEL, "stream": True, **({"messages": HELLO} if path == PATH else {}), **fields}
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in response.headers
    *data, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") for event in data)
    return [json.loads(event.removeprefix("data: ")) for event in data]


def content(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def reasons(chunks: list[dict[str, Any]], index: int = 0) -> list[str]:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return [choice["finish_reason"] for choice in choices if choice["finish_reason"] is not None]


async def test_a_plain_answer_has_every_required_key(client: Client, pipeline: FakePipeline) -> None:
    pipeline.cached_tokens = 4
    answer = await ask(client)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert isinstance(answer["created"], int)
    assert answer["model"] == MODEL
    assert answer["system_fingerprint"] == f"baton-test-{tiny_card().digest}"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello world", "refusal": None},
            "finish_reason": "stop",
            "logprobs": None,
        }
    ]
    num_prompt = len(pipeline.submitted[0]["ids"])
    num_output = len(encode(tiny_model(), "hello world")) + 1
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert "prompt_token_ids" not in answer
    assert [generation.num_closes for generation in pipeline.generations] == [1]


async def test_a_stream_says_the_same_as_the_plain_answer(client: Client, pipeline: FakePipeline) -> None:
    pipeline.text = "naïve café 你好 🙂 done\u2028x"
    for per_item in (1, 3):
        pipeline.per_item = per_item
        plain = await ask(client)
        chunks = await events(client, stream_options={"include_usage": True})
        assert content(chunks) == plain["choices"][0]["message"]["content"] == pipeline.text
        assert reasons(chunks) == ["stop"]
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == plain["usage"]
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
        assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
        assert chunks[0]["object"] == "chat.completion.chunk"
        roles = ["role" in choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        assert roles == [True] + [False] * (len(roles) - 1)
        assert chunks[-2]["choices"][0]["delta"] == {}


async def test_no_line_reader_can_break_an_event(client: Client, pipeline: FakePipeline) -> None:
    pipeline.text = "a\u2028b\x85c\u2029d\ne\rf\x0bg"
    response = await client.post(PATH, json={"model": MODEL, "messages": HELLO, "stream": True})
    for line in response.text.splitlines():
        assert line in {"", "data: [DONE]"} or json.loads(line.removeprefix("data: "))


async def test_without_include_usage_no_chunk_speaks_of_usage(client: Client) -> None:
    for chunks in (await events(client), await events(client, stream_options={})):
        assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


async def test_tokens_that_arrive_together_make_one_chunk(client: Client, pipeline: FakePipeline) -> None:
    pipeline.per_item = 100
    assert [choice["delta"] for chunk in await events(client) for choice in chunk["choices"]] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "hello world"},
        {},
    ]


async def test_several_samples_share_the_prompt(client: Client, pipeline: FakePipeline) -> None:
    pipeline.texts = ["one", "two two", "three"]
    answer = await ask(client, n=3, seed=7)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in answer["choices"]] == pipeline.texts
    assert answer["usage"]["prompt_tokens"] == len(pipeline.submitted[0]["ids"])
    assert answer["usage"]["completion_tokens"] == sum(len(encode(tiny_model(), text)) + 1 for text in pipeline.texts)
    seeds = [entry["params"].seed for entry in pipeline.submitted]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    await ask(client, n=3, seed=7)
    assert [entry["params"].seed for entry in pipeline.submitted[3:]] == seeds
    ids = [generation.request_id for generation in pipeline.generations]
    assert len(set(ids)) == 6
    chunks = await events(client, n=3)
    assert [chunk["choices"][0]["index"] for chunk in chunks[:3]] == [0, 1, 2]
    assert all("role" in chunk["choices"][0]["delta"] for chunk in chunks[:3])
    assert [content(chunks, index) for index in range(3)] == pipeline.texts
    assert [reasons(chunks, index) for index in range(3)] == [["stop"]] * 3


async def test_without_a_seed_every_sample_has_its_own(client: Client, pipeline: FakePipeline) -> None:
    await ask(client, n=4)
    await ask(client)
    assert len({entry["params"].seed for entry in pipeline.submitted}) == 5
    assert all(0 <= entry["params"].seed < 2**63 for entry in pipeline.submitted)


@pytest.mark.parametrize("per_item", [1, 2, 50])
async def test_stop_strings_cut_across_tokens_and_end_the_generation(
    client: Client, pipeline: FakePipeline, per_item: int
) -> None:
    pipeline.text = "one two three four five"
    pipeline.per_item = per_item
    ids = encode(tiny_model(), pipeline.text)
    needed = next(
        n for n in range(len(ids)) if "o th" in tiny_card().tokenizer.decode(ids[:n], skip_special_tokens=True)
    )
    answer = await ask(client, stop=["four", "o th"])
    assert answer["choices"][0]["message"]["content"] == "one tw"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == needed
    assert pipeline.generations[0].stopped_at == (None if per_item == 50 else needed)
    chunks = await events(client, stop="o th", stream_options={"include_usage": True})
    assert content(chunks) == "one tw"
    assert reasons(chunks) == ["stop"]
    assert chunks[-1]["usage"]["completion_tokens"] == needed
    unmatched = await ask(client, stop=["five six"])
    assert unmatched["choices"][0]["message"]["content"] == pipeline.text
    kept = await ask(client, stop="two", include_stop_str_in_output=True)
    assert kept["choices"][0]["message"]["content"] == "one two"


async def test_max_tokens_bounds_the_answer(client: Client, pipeline: FakePipeline) -> None:
    longer = await ask(client, max_tokens=3)
    for name in ("max_tokens", "max_completion_tokens"):
        answer = await ask(client, **{name: 1})
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 1
        assert longer["choices"][0]["message"]["content"].startswith(answer["choices"][0]["message"]["content"])
    await ask(client)
    room = 512 - len(pipeline.submitted[-1]["ids"])
    assert pipeline.submitted[-1]["params"].max_tokens == room
    await ask(client, max_tokens=room)


async def test_log_probabilities(client: Client, pipeline: FakePipeline) -> None:
    pipeline.text = "hé 🙂 x"
    plain = await ask(client, logprobs=True, top_logprobs=3, return_token_ids=True)
    choice = plain["choices"][0]
    entries = choice["logprobs"]["content"]
    assert choice["logprobs"]["refusal"] is None
    assert len(entries) == plain["usage"]["completion_tokens"] == len(choice["token_ids"])
    assert bytes(b for entry in entries for b in entry["bytes"]).decode() == choice["message"]["content"]
    assert all(entry["logprob"] == -0.25 and len(entry["top_logprobs"]) == 3 for entry in entries)
    assert all(entry["top_logprobs"][0]["token"] == entry["token"] for entry in entries)
    assert entries[0]["top_logprobs"][2]["logprob"] == -9999.0
    assert any(entry["token"].startswith("bytes:\\x") for entry in entries)
    assert choice["token_ids"] == [*encode(tiny_model(), pipeline.text), *tiny_card().eos_ids]
    assert plain["prompt_token_ids"] == pipeline.submitted[0]["ids"]
    chunks = await events(client, logprobs=True, top_logprobs=3, return_token_ids=True)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [e for c in choices if c["logprobs"] for e in c["logprobs"]["content"]] == entries
    assert [i for c in choices for i in c.get("token_ids", [])] == choice["token_ids"]
    assert chunks[0]["prompt_token_ids"] == plain["prompt_token_ids"]
    none_asked = await ask(client, logprobs=True)
    assert all(entry["top_logprobs"] == [] for entry in none_asked["choices"][0]["logprobs"]["content"])
    assert pipeline.submitted[-1]["params"].logprobs == 0


async def test_log_probabilities_join_to_a_text_cut_by_a_stop_string(client: Client, pipeline: FakePipeline) -> None:
    pipeline.text = "the quick brown 🙂 fox"
    for stop in ("ck b", "🙂", "k"):
        answer = await ask(client, logprobs=True, stop=stop)
        entries = answer["choices"][0]["logprobs"]["content"]
        said = answer["choices"][0]["message"]["content"]
        assert bytes(b for entry in entries for b in entry["bytes"]).decode() == said == pipeline.text.split(stop)[0]
        assert len(entries) == answer["usage"]["completion_tokens"]
        chunks = await events(client, logprobs=True, stop=stop)
        streamed = [e for c in chunks for e in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
        assert streamed == entries


async def test_every_sampling_field_reaches_the_workers(client: Client, pipeline: FakePipeline) -> None:
    await ask(
        client, temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.5,
        frequency_penalty=-0.5, logit_bias={"5": -100, "6": 3.5}, seed=-1, stop_token_ids=[9], min_tokens=2,
        max_tokens=5, cache_salt="tenant", priority=-3, user="u", metadata={"a": "b"}, store=True, service_tier="auto",
        prompt_cache_key="k", safety_identifier="s", parallel_tool_calls=True, response_format={"type": "text"},
        tools=[], tool_choice="none",
    )  # fmt: skip
    sent = pipeline.submitted[0]
    params = sent["params"]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 40, 0.1)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.2, 0.5, -0.5)
    assert params.logit_bias == {5: -100.0, 6: 3.5}
    assert params.stop_token_ids == (2, 9)
    assert (params.min_tokens, params.max_tokens, params.logprobs) == (2, 5, None)
    assert (sent["salt"], sent["priority"]) == ("tenant", -3)
    await ask(client, ignore_eos=True, max_tokens=2)
    assert pipeline.submitted[1]["params"].stop_token_ids == ()


async def test_greedy_and_empty_nucleus(client: Client, pipeline: FakePipeline) -> None:
    await ask(client, temperature=0, top_p=0.5, top_k=7)
    params = pipeline.submitted[0]["params"]
    assert (params.temperature, params.top_p, params.top_k) == (0, 1, 0)
    await ask(client, top_p=0)
    assert (pipeline.submitted[1]["params"].top_p, pipeline.submitted[1]["params"].top_k) == (1, 1)


async def test_the_models_own_defaults_apply_where_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_card(), "defaults", SamplingDefaults(temperature=0.6, top_k=20, max_new_tokens=9))
    pipeline = FakePipeline()
    async with AsyncTestClient(make_app(pipeline)) as client:
        await ask(client)
        await ask(client, temperature=1, top_k=-1, max_tokens=20)
    first, second = (entry["params"] for entry in pipeline.submitted)
    assert (first.temperature, first.top_k, first.max_tokens) == (0.6, 20, 9)
    assert (second.temperature, second.top_k, second.max_tokens) == (1, 0, 20)


async def test_null_is_absence(client: Client, pipeline: FakePipeline) -> None:
    names = ["stop", "n", "stream", "stream_options", "tool_choice", "tools", "logprobs", "top_logprobs", "seed"]
    names += ["temperature", "max_tokens", "logit_bias", "response_format", "audio", "user", "metadata"]
    answer = await ask(client, **dict.fromkeys(names))
    assert answer["choices"][0]["message"]["content"] == "hello world"
    params = pipeline.submitted[0]["params"]
    assert (params.temperature, params.logit_bias) == (1.0, {})


async def test_messages_of_every_role_and_form(client: Client, pipeline: FakePipeline) -> None:
    def call(arguments: str) -> dict[str, Any]:
        return {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}

    messages = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "bob"},
        {"role": "assistant", "content": None, "tool_calls": [call('{"x": 1}')], "refusal": None, "annotations": []},
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
        {"role": "assistant", "tool_calls": [call("not json")]},
        {"role": "user", "content": ""},
    ]
    response = await client.post(PATH, json={"model": MODEL, "messages": messages})
    assert response.status_code == 200, response.text
    prompt = tiny_card().tokenizer.decode(pipeline.submitted[0]["ids"], skip_special_tokens=False)
    assert prompt.startswith("<|im_start|>system\nd<|im_end|>\n<|im_start|>user\na<|im_end|>\n")
    assert '"arguments": {"x": 1}' in prompt
    assert '"arguments": "not json"' in prompt


async def test_template_switches(client: Client, pipeline: FakePipeline) -> None:
    await ask(client, add_generation_prompt=False)
    prompt = tiny_card().tokenizer.decode(pipeline.submitted[0]["ids"], skip_special_tokens=False)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n"
    switched = {"model": MODEL, "messages": HELLO, "chat_template_kwargs": {"enable_thinking": False}}
    refused = await client.post(PATH, json=switched)  # this template does not read it
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "chat_template_kwargs.enable_thinking"


async def test_skip_special_tokens(client: Client, pipeline: FakePipeline) -> None:
    pipeline.ids = [*encode(tiny_model(), "a"), 0, *encode(tiny_model(), "b")]
    assert (await ask(client))["choices"][0]["message"]["content"] == "ab"
    shown = await ask(client, skip_special_tokens=False)
    assert shown["choices"][0]["message"]["content"] == "a<|endoftext|>b"


async def test_an_output_of_nothing_but_an_end_token(client: Client, pipeline: FakePipeline) -> None:
    pipeline.text = ""
    answer = await ask(client)
    assert answer["choices"][0]["message"]["content"] == ""
    assert answer["usage"]["completion_tokens"] == 1
    assert reasons(await events(client)) == ["stop"]


async def test_tokens_in_the_closing_item_are_not_lost(client: Client, pipeline: FakePipeline) -> None:
    pipeline.end = Tokens(token_ids=encode(tiny_model(), "!!"), finish=FinishReason.LENGTH)
    assert (await ask(client))["choices"][0]["message"]["content"] == "hello world!!"
