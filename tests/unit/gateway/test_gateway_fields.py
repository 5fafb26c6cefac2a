"""Fields beyond sampling: service tiers, tenants' salts, cut and continued prompts, what chunks carry, request ids."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from gateway_kit import MODEL, FakePipeline, encode, eventually, make_app, serving, tiny_model
from litestar import Litestar
from litestar.testing import AsyncTestClient

from fleet.keys import ApiKey, hash_secret
from gateway.api.auth import MemoryKeyStore

Client = AsyncTestClient[Litestar]
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]
OK: dict[str, dict[str, Any]] = {
    CHAT: {"model": MODEL, "messages": HELLO},
    TEXT: {"model": MODEL, "prompt": "hi"},
}


async def ask(client: Client, path: str = CHAT, **fields: Any) -> Any:
    response = await client.post(path, json={**OK[path], **fields})
    assert response.status_code == 200, response.text
    return response.json()


async def events(client: Client, path: str = CHAT, **fields: Any) -> list[dict[str, Any]]:
    response = await client.post(path, json={**OK[path], **fields, "stream": True})
    assert response.status_code == 200, response.text
    return [json.loads(block[6:]) for block in response.text.split("\n\n")[:-2]]


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_service_tiers_set_the_priority_and_are_named(client: Client, pipeline: FakePipeline, path: str) -> None:
    expected = {
        "auto": ("default", 0),
        "default": ("default", 0),
        "flex": ("flex", 100),
        "priority": ("priority", -100),
    }
    for asked, (named, priority) in {**expected, "fast": ("priority", -100)}.items():
        assert (await ask(client, path, service_tier=asked))["service_tier"] == named
        assert pipeline.submitted[-1]["priority"] == priority
        assert {event["service_tier"] for event in await events(client, path, service_tier=asked)} == {named}
    await ask(client, path, service_tier="flex", priority=-3)
    assert pipeline.submitted[-1]["priority"] == 97
    assert "service_tier" not in await ask(client, path)
    assert not any("service_tier" in event for event in await events(client, path))


async def test_metadata_comes_back(client: Client) -> None:
    metadata = {"a" * 64: "b" * 512, "c": ""}
    assert (await ask(client, metadata=metadata))["metadata"] == metadata
    assert "metadata" not in await ask(client)


async def test_api_keys_do_not_meet_each_others_cache_unless_a_setting_lets_them(pipeline: FakePipeline) -> None:
    keys = {hash_secret(name): ApiKey(key_id=name, name=name, created_s=0) for name in ("ann", "bob")}

    async def salts(**settings: Any) -> list[str]:
        pipeline.submitted.clear()
        async with AsyncTestClient(make_app(pipeline, keys=MemoryKeyStore(keys), **settings)) as client:
            for name, salt in (("ann", None), ("ann", None), ("bob", None), ("ann", "x"), ("bob", "x")):
                headers = {"authorization": f"Bearer {name}"}
                body = {**OK[CHAT], "cache_salt": salt}
                assert (await client.post(CHAT, json=body, headers=headers)).status_code == 200
        return [submitted["salt"] for submitted in pipeline.submitted]

    first, again, *others = await salts()
    assert first == again
    assert len({first, *others}) == 4
    assert "ann" not in first
    assert await salts(shared_prefix_cache=True) == ["", "", "", "x", "x"]


async def test_an_open_server_shares_its_cache(client: Client, pipeline: FakePipeline) -> None:
    await ask(client)
    await ask(client, cache_salt="x")
    assert [submitted["salt"] for submitted in pipeline.submitted] == ["", "x"]


async def test_cache_keys_and_samples_of_one_prompt_have_an_affinity(client: Client, pipeline: FakePipeline) -> None:
    await ask(client)
    await ask(client, prompt_cache_key="k", user="u", n=2)
    await ask(client, user="u")
    none, *keyed, user = [submitted["affinity"] for submitted in pipeline.submitted]
    assert (none, len(set(keyed)), user != keyed[0]) == ("", 1, True)
    pipeline.submitted.clear()
    await ask(client, TEXT, prompt=["a", "b"], n=2)
    first, second, third, fourth = [submitted["affinity"] for submitted in pipeline.submitted]
    assert first == second != third == fourth


async def test_a_batch_without_room_starts_nothing(client: Client, pipeline: FakePipeline) -> None:
    pipeline.room = 5
    for path, fields in ((CHAT, {"n": 6}), (TEXT, {"prompt": ["a", "b", "c"], "n": 2})):
        for stream in (False, True):
            refused = await client.post(path, json={**OK[path], **fields, "stream": stream})
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "server_overloaded"
            assert int(refused.headers["retry-after"]) >= 1
    assert pipeline.submitted == []
    await ask(client, n=5)


@pytest.mark.parametrize("kept", [1, 3, 500])
async def test_prompts_are_cut_from_the_left(client: Client, pipeline: FakePipeline, kept: int) -> None:
    prompt = "hello world how are you today"
    whole = encode(tiny_model(), prompt)
    answer = await ask(client, TEXT, prompt=prompt, truncate_prompt_tokens=kept)
    assert pipeline.submitted[-1]["ids"] == whole[-kept:]
    assert answer["usage"]["prompt_tokens"] == min(kept, len(whole))
    await ask(client, TEXT, prompt=[5] * 2000, truncate_prompt_tokens=-1, max_tokens=12)
    assert len(pipeline.submitted[-1]["ids"]) == 500
    await ask(client, messages=[{"role": "user", "content": "hi " * 2000}], truncate_prompt_tokens=-1)
    assert len(pipeline.submitted[-1]["ids"]) == 511


async def test_an_answer_goes_on_from_the_final_message(client: Client, pipeline: FakePipeline) -> None:
    tokenizer = tiny_model().card.tokenizer
    for content in (
        "hello wor",
        "a <|im_end|> b",
        [{"type": "text", "text": "hello"}, {"type": "text", "text": "wor"}],
    ):
        messages = [*HELLO, {"role": "assistant", "content": content}]
        await ask(client, messages=messages, continue_final_message=True)
        ids = pipeline.submitted[-1]["ids"]
        text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
        assert tokenizer.decode(ids, skip_special_tokens=False).endswith(f"<|im_start|>assistant\n{text}")
        counted = await client.post("/tokenize", json={"messages": messages, "continue_final_message": True})
        assert counted.json()["tokens"] == ids


async def test_continuous_usage(client: Client) -> None:
    for path in (CHAT, TEXT):
        chunks = await events(client, path, stream_options={"include_usage": True, "continuous_usage_stats": True})
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts)
        assert counts[-1] == len(encode(tiny_model(), "hello world")) + 1
        assert chunks[-1]["choices"] == []
        bare = await events(client, path, stream_options={"continuous_usage_stats": True})
        assert all(chunk["usage"]["prompt_tokens"] and chunk["choices"] for chunk in bare)


async def test_obfuscated_chunks_differ_less_in_size(client: Client, pipeline: FakePipeline) -> None:
    pipeline.text = "hello " + "world how are you today " * 3
    for path in (CHAT, TEXT):
        chunks = await events(client, path, stream_options={"include_obfuscation": True})
        sizes = {
            len(json.dumps(chunk["choices"][0], separators=(",", ":"))) + len(chunk["obfuscation"]) for chunk in chunks
        }
        assert all(size % 32 == 0 for size in sizes), sizes
        assert not any("obfuscation" in chunk for chunk in await events(client, path))


async def test_tokens_are_named_by_id(client: Client) -> None:
    ids = encode(tiny_model(), "hello world")
    chat = await ask(client, logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True)
    entries = chat["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in entries[:-1]] == [f"token_id:{i}" for i in ids]
    assert all(entry["top_logprobs"][0]["token"] == entry["token"] for entry in entries)
    text = await ask(client, TEXT, logprobs=1, return_tokens_as_token_ids=True)
    lists = text["choices"][0]["logprobs"]
    assert lists["tokens"][: len(ids)] == [f"token_id:{i}" for i in ids]
    assert set(lists["top_logprobs"][0]) == {f"token_id:{ids[0]}"}


async def test_a_request_may_be_named_in_its_body_and_not_twice_at_once(pipeline: FakePipeline) -> None:
    pipeline.hold_after = 1
    body = {**OK[CHAT], "request_id": "mine-1"}
    async with serving(make_app(pipeline)) as url, httpx.AsyncClient(base_url=url) as client:
        first = asyncio.create_task(client.post(CHAT, json=body))
        await eventually(lambda: bool(pipeline.generations))
        for stream in (False, True):
            second = await client.post(CHAT, json={**body, "stream": stream})
            assert second.status_code == 409
            assert second.json()["error"]["code"] == "request_id_in_use"
            assert second.headers["x-should-retry"] == "false"
            assert second.headers["x-request-id"] == "mine-1"
        pipeline.go_on.set()
        assert (await first).headers["x-request-id"] == "mine-1"
        again = await client.post(CHAT, json=body, headers={"x-request-id": "other"})
        assert (again.status_code, again.headers["x-request-id"]) == (200, "mine-1")
