"""FP8 pages and FP8 weights through real processes: what arrives over shared memory and TCP is what was computed."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from support.fleet import DEMO, Fleet
from support.redis_server import RedisServer

pytestmark = pytest.mark.e2e

QUESTIONS = ("What is TTFT?", "Tell me a short story about a relay race.", "Explain continuous batching. " * 12)
DEMO_PAGE_NUMBERS = 5 * 2 * 2 * 16 * 64
"""Layers, keys and values, key heads, tokens of a page, head dimension of the demo model."""


@pytest.fixture(scope="module")
def fleet(module_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """FP8 pages over two transports, FP8 weights beside them, and one model whose workers do not match."""
    with Fleet(module_redis, tmp_path_factory.mktemp("fleet"), settings={"model": str(DEMO)}) as fleet:
        for name, settings in {
            "shm": {"kv_cache_dtype": "fp8_e4m3", "transports": "shm"},
            "tcp": {"kv_cache_dtype": "fp8_e4m3", "transports": "tcp"},
            "both": {"kv_cache_dtype": "fp8_e4m3", "quantization": "fp8"},
        }.items():
            fleet.start("prefill_svc", f"p-{name}", served_model_name=name, dtype="float32", **settings)
            fleet.start("decode_svc", f"d-{name}", served_model_name=name, dtype="float32", **settings)
        fleet.start("prefill_svc", "p-odd", served_model_name="odd", dtype="bfloat16", kv_cache_dtype="auto")
        fleet.start("decode_svc", "d-odd", served_model_name="odd", dtype="bfloat16", kv_cache_dtype="fp8_e4m3")
        fleet.gateway(worker_wait_s=1)
        for name in ("shm", "tcp", "both", "odd"):
            fleet.wait_ready(model=name)
        yield fleet


def answers(fleet: Fleet, model: str) -> list[str]:
    """Greedy answers to all questions."""
    client = fleet.client()
    found = []
    for question in QUESTIONS:
        whole = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], max_tokens=48, temperature=0
        )
        found.append(str(whole.choices[0].message.content))
    return found


def test_both_transports_carry_fp8_pages_of_a_quarter_of_float32s_bytes(fleet: Fleet) -> None:
    by_shm = answers(fleet, "shm")
    print(by_shm)
    assert all(by_shm)
    assert answers(fleet, "tcp") == by_shm
    for name in ("shm", "tcp"):
        page_bytes = fleet.metric("baton_worker_page_bytes", worker=f"p-{name}", dtype="float8_e4m3fn")
        assert page_bytes == DEMO_PAGE_NUMBERS
        given = fleet.metric("baton_worker_hand_off_bytes_total", worker=f"p-{name}", transport=name)
        assert given > 0
        assert given % page_bytes == 0


def test_fp8_weights_and_pages_serve_and_say_so(fleet: Fleet) -> None:
    assert all(answers(fleet, "both"))
    log = fleet.services["p-both"].text()
    assert "FP8 matrices are dequantised" in log
    assert "float8_e4m3fn" in log


def test_workers_of_unequal_pages_are_named_and_never_paired(fleet: Fleet) -> None:
    body = {"model": "odd", "prompt": "hello", "max_tokens": 4}
    answer = httpx.post(f"{fleet.url}/v1/completions", json=body, timeout=30)
    assert answer.status_code == 503
    message = answer.json()["error"]["message"]
    print(message)
    assert "pages of its prefill and decode workers differ: dtype is bfloat16 and float8_e4m3fn" in message


def test_settings_that_make_no_sense_stop_the_start(fleet: Fleet) -> None:
    for setting, value, allowed in (
        ("quantization", "int4", "auto, fp8 or int8"),
        ("kv_cache_dtype", "int8", "fp8_e4m3"),
    ):
        service = fleet.start("decode_svc", f"bad-{setting}", **{setting: value})
        fleet.forget(f"bad-{setting}")
        assert service.process.wait(timeout=60) != 0
        assert f"BATON_{setting.upper()} = '{value}'" in service.text()
        assert allowed in service.text()
