"""Every family and variant, HTTP to HTTP: greedy tokens equal `transformers.generate` on the same weights.

Each variant runs through real processes: chunked prefill, a hand-off, and eight other requests in the batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from support.checkpoints import VARIANTS, VOCAB_SIZE, make_checkpoint
from support.fleet import Fleet
from support.redis_server import RedisServer
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.e2e

NUM_OTHERS = 8
OUTPUT_LEN = 24
TOP = 5
PROMPT_LENS = (70, 3, 40, 17, 16, 64, 33, 5, 71)


@pytest.fixture(scope="module")
def fleet(module_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A gateway alone; each test brings the workers of its model, as workers of several models may share a fleet."""
    with Fleet(module_redis, tmp_path_factory.mktemp("fleet")) as fleet:
        fleet.gateway()
        yield fleet


def prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(4, VOCAB_SIZE) for _ in range(length)] for length in PROMPT_LENS]


def complete(url: str, model: str, prompt: list[int]) -> dict[str, Any]:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": OUTPUT_LEN,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": TOP,
        "return_token_ids": True,
    }
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def serve_and_ask(fleet: Fleet, directory: Path, name: str, asked: list[list[int]], dtype: str) -> list[dict[str, Any]]:
    """Bring workers of this model into the fleet, ask everything at once, and let them leave again."""
    settings = {"model": directory, "served_model_name": name, "dtype": dtype}
    fleet.start("prefill_svc", f"p-{name}", max_step_tokens=32, **settings)
    fleet.start("decode_svc", f"d-{name}", **settings)
    fleet.wait_ready(model=name)
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda prompt: complete(fleet.url, name, prompt), asked))
    for role in ("p", "d"):
        assert fleet.forget(f"{role}-{name}").stop() == 0
    return answers


def expected(model: Any, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """Greedy continuation by transformers, and its log-probabilities `[OUTPUT_LEN, V]`."""
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=OUTPUT_LEN,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logprobs = torch.log_softmax(torch.cat(out.logits).float(), dim=-1)
    return out.sequences[0, len(prompt) :].tolist(), logprobs


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_greedy_tokens_equal_transformers(fleet: Fleet, tmp_path: Path, variant: str) -> None:
    directory = make_checkpoint(tmp_path / variant, variant, seed=len(variant))
    asked = prompts(seed=len(variant))
    answers = serve_and_ask(fleet, directory, variant, asked, "float32")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    largest = 0.0
    for prompt, answer in zip(asked, answers, strict=True):
        tokens, logprobs = expected(model, prompt)
        assert answer["token_ids"] == tokens
        given = answer["logprobs"]["token_logprobs"]
        for step, (token, value) in enumerate(zip(tokens, given, strict=True)):
            largest = max(largest, abs(float(logprobs[step, token]) - value))
    print(f"{variant}: {len(asked)} requests, largest log-probability difference {largest:.2e}")
    assert largest < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precisions_run(fleet: Fleet, tmp_path: Path, dtype: str) -> None:
    directory = make_checkpoint(tmp_path / dtype, "qwen3", seed=3)
    asked = prompts(seed=3)
    answers = serve_and_ask(fleet, directory, dtype, asked, dtype)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    firsts = [
        abs(a["logprobs"]["token_logprobs"][0] - float(first_logprob(model, p, a)))
        for p, a in zip(asked, answers, strict=True)
    ]
    print(f"{dtype}: largest difference of the first log-probability to float32 {max(firsts):.2e}")
    assert all(len(answer["token_ids"]) == OUTPUT_LEN for answer in answers)
    assert max(firsts) < 0.6


def first_logprob(model: Any, prompt: list[int], answer: dict[str, Any]) -> torch.Tensor:
    """What float32 thinks of the first token that was chosen."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    return torch.log_softmax(logits.float(), dim=-1)[answer["token_ids"][0]]
