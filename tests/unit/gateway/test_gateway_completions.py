"""`/v1/completions`, `/tokenize` and `/detokenize`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway_kit import (
    MODEL,
    FakePipeline,
    encode,
    make_app,
    model_files,
    sentencepiece_tokenizer,
    tiny_card,
    tiny_model,
)
from litestar import Litestar
from litestar.testing import AsyncTestClient

from gateway.text.card import ModelCard

Client = AsyncTestClient[Litestar]
PATH = "/v1/completions"


async def ask(client: Client, prompt: Any, **fields: Any) -> dict[str, Any]:
    response = await client.post(PATH, json={"model": MODEL, "prompt": prompt, **fields})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def chunks_of(client: Client, prompt: Any, **fields: Any) -> list[dict[str, Any]]:
    response = await client.post(PATH, json={"model": MODEL, "prompt": prompt, "stream": True, **fields})
    *data, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in data]


def joined(chunks: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index)


async def test_a_plain_answer(client: Client, pipeline: FakePipeline) -> None:
    answer = await ask(client, "hi")
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": "hello world", "finish_reason": "stop", "logprobs": None}]
    assert pipeline.submitted[0]["params"].max_tokens == 16


async def test_the_default_length_gives_way_to_a_nearly_full_context(client: Client, pipeline: FakePipeline) -> None:
    await ask(client, [5] * 505)
    assert pipeline.submitted[0]["params"].max_tokens == 7


async def test_token_ids_are_taken_literally(client: Client, pipeline: FakePipeline) -> None:
    answer = await ask(client, [2, 5, 300])
    assert pipeline.submitted[0]["ids"] == [2, 5, 300]
    assert answer["usage"]["prompt_tokens"] == 3


async def test_batches_keep_their_order_and_label_every_chunk(client: Client, pipeline: FakePipeline) -> None:
    for prompt in (["a b", "c", "d"], [[5], [6, 7], [8]]):
        pipeline.submitted.clear()
        pipeline.generations.clear()
        pipeline.texts = ["one", "two", "three", "four", "five", "six"]
        answer = await ask(client, prompt, n=2)
        assert [choice["index"] for choice in answer["choices"]] == list(range(6))
        assert [choice["text"] for choice in answer["choices"]] == pipeline.texts
        lengths = [len(entry["ids"]) for entry in pipeline.submitted]
        assert answer["usage"]["prompt_tokens"] == sum(lengths[::2])
        pipeline.generations.clear()
        chunks = await chunks_of(client, prompt, n=2, stream_options={"include_usage": True})
        assert [joined(chunks, index) for index in range(6)] == pipeline.texts
        for index in range(6):
            mine = [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["index"] == index]
            assert [reason for reason in mine if reason] == ["stop"]
            assert mine[-1] == "stop"
        assert chunks[-1]["usage"] == answer["usage"]


@pytest.mark.parametrize("prompt", ["  naïve 🙂 e\u0301", "hi"])
async def test_echo_repeats_the_prompt_byte_for_byte(client: Client, pipeline: FakePipeline, prompt: str) -> None:
    answer = await ask(client, prompt, echo=True, stop=["hi"])
    assert answer["choices"][0]["text"] == prompt + "hello world"
    assert joined(await chunks_of(client, prompt, echo=True)) == prompt + "hello world"
    ids = pipeline.submitted[0]["ids"]
    assert (await ask(client, ids, echo=True))["choices"][0]["text"] == prompt + "hello world"
    num_submitted = len(pipeline.submitted)
    for text in (
        (await ask(client, prompt, echo=True, max_tokens=0))["choices"][0]["text"],
        joined(await chunks_of(client, prompt, echo=True, max_tokens=0)),
    ):
        assert text == prompt
    assert len(pipeline.submitted) == num_submitted


async def test_log_probabilities_are_parallel_lists(client: Client, pipeline: FakePipeline) -> None:
    answer = await ask(client, "hi", logprobs=2, return_token_ids=True)
    choice = answer["choices"][0]
    lists = choice["logprobs"]
    size = answer["usage"]["completion_tokens"]
    assert [len(lists[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [size] * 4
    assert all(len(top) in {2, 3} for top in lists["top_logprobs"])
    assert "".join(lists["tokens"][:-1]) == choice["text"]
    assert lists["text_offset"] == [len("".join(lists["tokens"][:i])) for i in range(size)]
    assert choice["prompt_token_ids"] == pipeline.submitted[0]["ids"]
    chunks = await chunks_of(client, "hi", logprobs=2, return_token_ids=True)
    choices = [c for chunk in chunks for c in chunk["choices"]]
    for name, values in lists.items():
        assert [v for c in choices if c["logprobs"] for v in c["logprobs"][name]] == values
    assert [i for c in choices for i in c.get("token_ids", [])] == choice["token_ids"]
    assert choices[0]["prompt_token_ids"] == choice["prompt_token_ids"]
    zero = await ask(client, "hi", logprobs=0)
    assert zero["choices"][0]["logprobs"]["token_logprobs"] == lists["token_logprobs"]
    assert all(len(top) == 1 for top in zero["choices"][0]["logprobs"]["top_logprobs"])


async def test_a_continuation_in_a_sentencepiece_vocabulary_keeps_its_space() -> None:
    card = ModelCard.from_files(model_files(sentencepiece_tokenizer()))
    pipeline = FakePipeline(tiny_model(card=card))
    pipeline.text = "world"
    async with AsyncTestClient(make_app(pipeline)) as client:
        assert (await ask(client, "hello", echo=True))["choices"][0]["text"] == "hello world"
        assert pipeline.submitted[0]["ids"][0] == 1
        await ask(client, "hello", add_special_tokens=False)
        assert pipeline.submitted[1]["ids"][0] != 1
        assert joined(await chunks_of(client, "hello")) == " world"


@pytest.mark.parametrize("prompt", ["hi", "hello 🙂 world<|im_end|>", [5, 2, 300]])
async def test_an_echoed_prompt_is_scored_but_for_its_first_token(
    client: Client, pipeline: FakePipeline, prompt: str | list[int]
) -> None:
    answer = await ask(client, prompt, echo=True, logprobs=2, skip_special_tokens=False)
    (choice,) = answer["choices"]
    lists = choice["logprobs"]
    sent = pipeline.submitted[-1]
    assert sent["params"].prompt_logprobs == 2
    num_prompt = len(sent["ids"])
    assert len(lists["tokens"]) == num_prompt + answer["usage"]["completion_tokens"]
    assert lists["token_logprobs"][0] is None
    assert lists["top_logprobs"][0] is None
    assert all(logprob == -0.25 for logprob in lists["token_logprobs"][1:])
    assert all(len(top) in {2, 3} for top in lists["top_logprobs"][1:])
    assert len(lists["text_offset"]) == len(lists["tokens"])
    echoed = choice["text"].removesuffix("hello world")
    bounds = [*lists["text_offset"][:num_prompt], len(echoed)]
    assert bounds[0] == 0
    assert sorted(lists["text_offset"]) == lists["text_offset"]
    whole = [(token, a, b) for token, a, b in zip(lists["tokens"], bounds, bounds[1:], strict=False)]
    assert all(token == echoed[a:b] for token, a, b in whole if not token.startswith("bytes:"))
    assert lists["text_offset"][num_prompt] == len(echoed)
    chunks = await chunks_of(client, prompt, echo=True, logprobs=2, skip_special_tokens=False)
    streamed = [c["logprobs"] for chunk in chunks for c in chunk["choices"] if c["logprobs"]]
    for name, values in lists.items():
        assert [value for one in streamed for value in one[name]] == values
    assert joined(chunks) == choice["text"]


async def test_prompt_logprobs_are_reported_as_vllm_does_and_computed_once_per_prompt(
    client: Client, pipeline: FakePipeline
) -> None:
    ids = [5, 6, 7]
    answer = await ask(client, [ids, [8, 9]], n=2, prompt_logprobs=1)
    assert [entry["params"].prompt_logprobs for entry in pipeline.submitted] == [1, None, 1, None]
    assert [len(choice["prompt_logprobs"]) for choice in answer["choices"]] == [3, 3, 2, 2]
    nothing, *rest = answer["choices"][1]["prompt_logprobs"]
    assert nothing is None
    for token_id, entry in zip(ids[1:], rest, strict=True):
        spelled = tiny_card().detokenizers.token_bytes(token_id).decode()
        assert entry == {str(token_id): {"logprob": -0.25, "rank": 1, "decoded_token": spelled}}
    both = await ask(client, ids, echo=True, logprobs=3, prompt_logprobs=0, max_tokens=0)
    assert pipeline.submitted[-1]["params"].prompt_logprobs == 3
    assert [len(entry) for entry in both["choices"][0]["prompt_logprobs"][1:]] == [1, 1]
    messages = [{"role": "user", "content": "hi"}]
    chat = await client.post("/v1/chat/completions", json={"model": MODEL, "messages": messages, "prompt_logprobs": 0})
    told = chat.json()["prompt_logprobs"]
    assert (len(told), told[0]) == (chat.json()["usage"]["prompt_tokens"], None)


async def test_a_prompt_is_scored_without_an_answer(client: Client, pipeline: FakePipeline) -> None:
    fields = {"echo": True, "logprobs": 0, "max_tokens": 0}
    answer = await ask(client, ["hi there", "lo"], **fields)
    assert [entry["params"].max_tokens for entry in pipeline.submitted] == [0, 0]
    assert answer["usage"]["completion_tokens"] == 0
    for place, (prompt, choice) in enumerate(zip(["hi there", "lo"], answer["choices"], strict=True)):
        assert (choice["index"], choice["text"], choice["finish_reason"]) == (place, prompt, "length")
        assert "".join(choice["logprobs"]["tokens"]) == prompt
    chunks = await chunks_of(client, ["hi there", "lo"], **fields)
    assert [joined(chunks, index) for index in range(2)] == ["hi there", "lo"]
    for index, choice in enumerate(answer["choices"]):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert [c["logprobs"] for c in mine if c["logprobs"]] == [choice["logprobs"]]
        assert mine[-1]["finish_reason"] == "length"
    await ask(client, [5] * 512, **fields)  # a whole context's worth, since nothing follows


async def test_best_of_returns_the_likeliest_per_token_and_counts_all(client: Client, pipeline: FakePipeline) -> None:
    assert len((await ask(client, "hi", n=2, best_of=2))["choices"]) == 2
    pipeline.generations.clear()
    pipeline.texts = ["one", "two", "three", "four five six", "seven", "eight"]
    scores = {0: -3.0, 1: -1.0, 2: -2.0, 3: -0.5, 4: -0.1, 5: -9.0}
    pipeline.score = lambda place: scores[place]
    answer = await ask(client, ["a", "b"], n=2, best_of=3)
    assert [choice["text"] for choice in answer["choices"]] == ["two", "three", "seven", "four five six"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert len({entry["params"].seed for entry in pipeline.submitted[-6:]}) == 6
    lengths = [len(encode(tiny_model(), text)) + 1 for text in pipeline.texts]
    assert answer["usage"]["completion_tokens"] == sum(lengths)
    refused = await client.post(PATH, json={"model": MODEL, "prompt": "a", "n": 1, "best_of": 2, "stream": True})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "best_of")


async def test_tokenize_agrees_with_usage(client: Client, pipeline: FakePipeline) -> None:
    tokens = (await client.post("/tokenize", json={"prompt": "hello <think>", "return_token_strs": True})).json()
    ids = encode(tiny_model(), "hello <think>")
    assert (tokens["count"], tokens["tokens"], tokens["max_model_len"]) == (len(ids), ids, 512)
    assert tokens["token_strs"][-1] == "<think>"
    messages = [{"role": "user", "content": "hi"}]
    chat = (await client.post("/tokenize", json={"model": MODEL, "messages": messages})).json()
    answer = (await client.post("/v1/chat/completions", json={"model": MODEL, "messages": messages})).json()
    assert chat["count"] == answer["usage"]["prompt_tokens"]
    assert chat["tokens"] == pipeline.submitted[0]["ids"]
    text = (await client.post("/detokenize", json={"model": MODEL, "tokens": chat["tokens"]})).json()
    assert text == {"prompt": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"}


async def test_a_long_text_is_tokenized_off_the_event_loop_with_the_same_result(client: Client) -> None:
    text = "hello world 你好 " * 2000
    tokens = (await client.post("/tokenize", json={"prompt": text})).json()["tokens"]
    assert tokens == tiny_card().tokenizer.encode(text, add_special_tokens=True)
