"""What a request gets of its prompt: log-probabilities once each, and a vector without any decode worker."""

from __future__ import annotations

import pytest
from support.request_fleet import GATEWAY, Fleet, tokens

from fleet.messages import Embedded, PromptLogprobs, RequestFinished
from fleet.types import FinishReason, Passport, Pooling, Role, SamplingParams, TokenLogprob
from gateway.errors import NoWorkers


async def test_a_scored_prompt_is_told_once_whoever_computes_it() -> None:
    fleet = Fleet()
    p, _ = fleet.join("p", Role.PREFILL), fleet.join("d", Role.DECODE)
    live = fleet.admit(prompt_logprobs=0)
    fleet.dispatched()
    scores = [TokenLogprob(-1.0), TokenLogprob(-2.0)]
    fleet.say(p, PromptLogprobs(request_id="r", epoch=0, position=1, logprobs=scores[:1]))
    fleet.table.replay(live, "test")
    (request,) = fleet.dispatched()
    assert request.passport.params.prompt_logprobs == 0
    fleet.say(p, PromptLogprobs(request_id="r", epoch=0, position=2, logprobs=[TokenLogprob(-9.0)]))
    fleet.say(p, PromptLogprobs(request_id="r", epoch=1, position=1, logprobs=scores), tokens(0, 7, epoch=1))
    stream = aiter(live)
    told = await anext(stream)
    assert (told.prompt_logprobs, told.token_ids) == (scores, [7])
    fleet.table.replay(live, "test")
    (request,) = fleet.dispatched()
    assert request.passport.params.prompt_logprobs is None
    fleet.say(p, tokens(1, 8, epoch=2))
    assert (await anext(stream)).prompt_logprobs == []


async def test_a_vector_needs_no_decode_worker_and_is_made_again_when_its_worker_dies() -> None:
    fleet = Fleet(worker_wait_s=0)
    passport = Passport(
        request_id="r",
        epoch=0,
        model="m",
        token_ids=[1, 2, 3],
        prompt_len=3,
        params=SamplingParams(max_tokens=0),
        gateway=GATEWAY,
        pooling=Pooling.MEAN,
    )
    with pytest.raises(NoWorkers):
        fleet.table.admit(passport)
    first, second = fleet.join("p", Role.PREFILL), fleet.join("q", Role.PREFILL)
    live = fleet.table.admit(passport)
    (request,) = fleet.dispatched()
    assert request.targets == []
    holder, other = (first, second) if live.prefill_peer == first else (second, first)
    fleet.bus.lost_callbacks[0](holder.address)
    (again,) = fleet.dispatched()
    assert (again.passport.epoch, again.passport.pooling, live.prefill_peer) == (1, Pooling.MEAN, other)
    finished = RequestFinished(request_id="r", epoch=1, reason=FinishReason.LENGTH, num_output_tokens=0)
    fleet.say(holder, Embedded(request_id="r", epoch=0, vector=b"old!"), finished)
    assert not live.ended  # the end has come, its vector has not
    fleet.say(other, Embedded(request_id="r", epoch=1, vector=b"new!"), finished)
    (told,) = [item async for item in live]
    assert (told.vector, told.finish, told.token_ids) == (b"new!", FinishReason.LENGTH, [])
    assert fleet.table.num_live == fleet.table.num_queued == 0
