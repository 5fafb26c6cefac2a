"""What a fleet tells of prompts: vectors and log-probabilities against `transformers`, and the best of several."""

from __future__ import annotations

import base64
import math
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch
from support.fleet import DEMO, DEMO_PREFILL, Fleet, until
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.e2e

LONG = "A prompt is compute-bound work, a token loop is memory-bound work. " * 12  # several chunks of 64 tokens
TEXTS = ["What is TTFT?", LONG, "Tell me a short story.", "3 + 4"]


@pytest.fixture(scope="module")
def sdk(demo_fleet: Fleet) -> openai.OpenAI:
    return demo_fleet.client()


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_the_models_hidden_states(sdk: openai.OpenAI, model: Any, tokenizer: Any, pooling: str) -> None:
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    expected = []
    with torch.inference_mode():
        for one in ids:
            states = model.model(torch.tensor([one])).last_hidden_state[0]
            pooled = states.mean(dim=0) if pooling == "mean" else states[-1]
            expected.append((pooled / pooled.norm()).tolist())
    for given in (TEXTS, ids):
        for _ in range(2):  # the second time over a warm prefix cache
            answer = sdk.embeddings.create(model="demo", input=given, extra_body={"pooling": pooling})
            assert [entry.index for entry in answer.data] == list(range(len(TEXTS)))
            assert answer.usage.prompt_tokens == sum(map(len, ids))
            for entry, vector in zip(answer.data, expected, strict=True):
                difference = max(abs(a - b) for a, b in zip(entry.embedding, vector, strict=True))
                print(f"{pooling}: largest difference {difference:.2e}")
                assert difference < 1e-4
    plain = sdk.embeddings.create(model="demo", input="hi", encoding_format="float").data[0].embedding
    raw = sdk.post(
        "/embeddings", body={"model": "demo", "input": "hi", "encoding_format": "base64"}, cast_to=httpx.Response
    )
    packed = base64.b64decode(raw.json()["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(plain)}f", packed)) == plain
    short = sdk.embeddings.create(model="demo", input="hi", dimensions=8).data[0].embedding
    assert math.hypot(*short) == pytest.approx(1, abs=1e-6)
    assert short == pytest.approx([value / math.hypot(*plain[:8]) for value in plain[:8]], abs=1e-6)


def test_prompts_are_scored_as_the_model_scores_them(sdk: openai.OpenAI, model: Any, tokenizer: Any) -> None:
    ids = tokenizer(LONG)["input_ids"]
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(logprobs[place, token]) for place, token in enumerate(ids[1:])]
    ask: dict[str, Any] = {"model": "demo", "prompt": LONG, "echo": True, "logprobs": 2, "temperature": 0}
    (scored,) = sdk.completions.create(**ask, max_tokens=0).choices
    (answered,) = sdk.completions.create(**ask, max_tokens=5).choices
    assert scored.text == LONG
    for choice in (scored, answered):
        lists = choice.logprobs
        assert lists is not None
        assert lists.token_logprobs is not None
        assert lists.top_logprobs is not None
        assert lists.text_offset is not None
        assert lists.tokens is not None
        assert (lists.token_logprobs[0], lists.top_logprobs[0]) == (None, None)
        ours = lists.token_logprobs[1 : len(ids)]
        difference = max(abs(a - b) for a, b in zip(ours, expected, strict=True))
        print(f"largest difference {difference:.2e} over {len(ours)} tokens")
        assert difference < 1e-3
        assert all(
            choice.text[at:].startswith(token) for at, token in zip(lists.text_offset, lists.tokens, strict=True)
        )
    streamed = list(sdk.completions.create(**ask, max_tokens=5, stream=True))
    told = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices[0].logprobs is not None]
    assert [value for one in told for value in one.token_logprobs or []] == answered.logprobs.token_logprobs  # type: ignore[union-attr]
    assert "".join(chunk.choices[0].text for chunk in streamed) == answered.text


def test_the_best_of_several_samples_comes_first(sdk: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "demo", "prompt": "Tell me", "max_tokens": 12, "temperature": 1.0, "seed": 5}
    everyone = sdk.completions.create(**ask, n=6, logprobs=0)
    best = sdk.completions.create(**ask, n=2, best_of=6)

    def mean(choice: Any) -> float:
        return float(sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs))

    ranked = sorted(everyone.choices, key=mean, reverse=True)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert best.usage is not None
    assert everyone.usage is not None
    assert best.usage.completion_tokens == everyone.usage.completion_tokens


def test_vectors_survive_the_death_of_a_prefill_worker(sdk: openai.OpenAI, demo_fleet: Fleet) -> None:
    texts = [f"{number}. {LONG}" for number in range(40)]
    ask: dict[str, Any] = {"model": "demo", "input": texts, "extra_body": {"pooling": "mean"}}
    expected = [entry.embedding for entry in sdk.embeddings.create(**ask).data]
    replays = demo_fleet.metric("baton_replays_total", reason="worker_lost")
    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(sdk.embeddings.create, **ask)
        until(lambda: demo_fleet.metric("baton_requests_live") > 10, within_s=10, what="the batch is under way")
        demo_fleet.forget("prefill-1").kill()
        answer = again.result(timeout=60)
    for entry, vector in zip(answer.data, expected, strict=True):
        assert entry.embedding == pytest.approx(vector, abs=1e-5)
    assert demo_fleet.metric("baton_replays_total", reason="worker_lost") > replays
    demo_fleet.start("prefill_svc", "prefill-1", **DEMO_PREFILL)  # the fleet is others' too
    demo_fleet.wait_ready(prefill=2, decode=2)


def test_nothing_stays_behind(demo_fleet: Fleet) -> None:
    def idle() -> bool:
        names = ("baton_worker_running", "baton_worker_waiting", "baton_requests_live", "baton_requests_queued")
        return not any(demo_fleet.metric(name) for name in names) and not demo_fleet.metric(
            "baton_worker_pages", state="used"
        )

    until(idle, within_s=10, what="all pages are free")
