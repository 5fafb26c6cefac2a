"""Exactly once: whatever order, repetition and epochs chunks come in, the stream is the stream."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.messages import RequestFinished, TokenChunk
from fleet.types import FinishReason, Passport, PeerRef, SamplingParams, TokenLogprob
from gateway.live import LiveRequest, Stage
from gateway.pipeline import Tokens

GATEWAY = PeerRef("g", 1, "tcp://127.0.0.1:1")


def live_request(**params: object) -> LiveRequest:
    passport = Passport(
        request_id="r",
        epoch=0,
        model="m",
        token_ids=[1, 2, 3],
        prompt_len=3,
        params=SamplingParams(**{"max_tokens": 100, **params}),  # type: ignore[arg-type]
        gateway=GATEWAY,
    )
    return LiveRequest(passport, on_let_go=lambda live, reason: live.end(reason))


def chunk(index: int, *ids: int, logprobs: list[TokenLogprob] | None = None) -> TokenChunk:
    return TokenChunk(request_id="r", epoch=0, index=index, token_ids=list(ids), logprobs=logprobs)


def finished(count: int, reason: FinishReason = FinishReason.STOP) -> RequestFinished:
    return RequestFinished(request_id="r", epoch=0, reason=reason, num_output_tokens=count)


async def read_all(live: LiveRequest) -> list[Tokens]:
    return [tokens async for tokens in live]


def test_an_early_chunk_waits_and_a_late_one_is_dropped() -> None:
    live = live_request()
    assert live.accept_tokens(chunk(1, 11)) == 0
    assert live.accept_tokens(chunk(0, 10)) == 2
    assert live.accept_tokens(chunk(0, 10)) == 0
    assert live.accept_tokens(chunk(1, 11, 12)) == 1
    assert live.output == [10, 11, 12]


def test_the_end_waits_for_tokens_on_their_way() -> None:
    live = live_request()
    assert not live.accept_finished(finished(2))
    live.accept_tokens(chunk(1, 11))
    assert not live.is_complete()
    live.accept_tokens(chunk(0, 10))
    assert live.is_complete()


def test_an_error_does_not_wait() -> None:
    assert live_request().accept_finished(finished(5, FinishReason.ERROR))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.integers(0, 2**32))
def test_any_order_with_repetition_gives_the_stream(sizes: list[int], seed: int) -> None:
    rng = random.Random(seed)
    total = sum(sizes)
    stream = [rng.randrange(1000) for _ in range(total)]
    chunks = []
    begin = 0
    for size in sizes:
        chunks.append(chunk(begin, *stream[begin : begin + size]))
        begin += size
    overlapping = [chunk(i, *stream[i : i + rng.randint(1, 5)]) for i in (rng.randrange(total) for _ in range(3))]
    messages = chunks + overlapping + rng.choices(chunks, k=3)
    rng.shuffle(messages)
    live = live_request()
    assert sum(live.accept_tokens(message) for message in messages) == total
    assert live.output == stream


async def test_the_reader_gets_everything_once_and_one_end() -> None:
    live = live_request(logprobs=0)
    live.accept_tokens(chunk(0, 10, logprobs=[TokenLogprob(-1.0)]))
    live.accept_tokens(chunk(1, 11, logprobs=[TokenLogprob(-2.0)]))
    live.end(FinishReason.LENGTH)
    live.end(FinishReason.ERROR, error="too late")
    items = await read_all(live)
    assert [i for item in items for i in item.token_ids] == [10, 11]
    assert [p.logprob for item in items for p in item.logprobs or []] == [-1.0, -2.0]
    assert [item.finish for item in items if item.finish] == [FinishReason.LENGTH]


def test_a_new_epoch_voids_what_waits_and_keeps_what_was_accepted() -> None:
    live = live_request()
    live.accept_tokens(chunk(0, 10))
    live.accept_tokens(chunk(2, 12))
    live.accept_finished(finished(3))
    live.begin_epoch()
    assert live.ending is None
    live.accept_tokens(chunk(1, 11))
    assert live.output == [10, 11]
    passport = live.next_passport()
    assert (passport.epoch, passport.token_ids, passport.next_index) == (1, [1, 2, 3, 10, 11], 2)


@pytest.mark.parametrize(
    ("params", "output", "reason"),
    [
        ({"stop_token_ids": (7,)}, [5, 7], FinishReason.STOP),
        ({"stop_token_ids": (7,)}, [7, 5], None),
        ({"stop_token_ids": (7,), "min_tokens": 2}, [5, 7], None),
        ({"max_tokens": 2}, [5, 6], FinishReason.LENGTH),
        ({"max_tokens": 3}, [5, 6], None),
        ({}, [], None),
    ],
)
def test_an_answer_that_is_whole_needs_no_worker(
    params: dict[str, object], output: list[int], reason: FinishReason | None
) -> None:
    live = live_request(**params)
    if output:
        live.accept_tokens(chunk(0, *output))
    assert live.reason_by_tokens() is reason


async def test_stop_cuts_tokens_beyond_the_match_and_closing_twice_is_fine() -> None:
    live = live_request()
    live.accept_tokens(chunk(0, 10, 11, 12))
    live.stop(2)
    await live.aclose()
    await live.aclose()
    assert live.output == [10, 11]
    assert (live.stage, live.finish) == (Stage.ENDED, FinishReason.STOP)
