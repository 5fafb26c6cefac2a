"""When a sequence ends."""

from __future__ import annotations

import pytest
from support.passports import make_passport

from engine.sequence import Sequence
from engine.stopping import finish_reason, finished_on_arrival
from fleet.types import FinishReason, SamplingParams

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def sequence_of(num_output: int, params: SamplingParams, last: int = 5) -> Sequence:
    ids = [1, 2, 3, *([5] * (num_output - 1)), *([last] if num_output else [])]
    return Sequence.from_passport(make_passport(ids, prompt_len=3, params=params), arrival=0)


@pytest.mark.parametrize(
    ("num_output", "token", "params", "max_model_len", "expected"),
    [
        (0, 5, SamplingParams(max_tokens=2), 100, None),
        (1, 5, SamplingParams(max_tokens=2), 100, LENGTH),
        (0, 5, SamplingParams(max_tokens=1), 100, LENGTH),
        (0, 7, SamplingParams(max_tokens=9, stop_token_ids=(7,)), 100, STOP),
        (1, 7, SamplingParams(max_tokens=2, stop_token_ids=(7,)), 100, STOP),
        (0, 7, SamplingParams(max_tokens=9, stop_token_ids=(7,), min_tokens=1), 100, None),
        (1, 7, SamplingParams(max_tokens=9, stop_token_ids=(7,), min_tokens=1), 100, STOP),
        (0, 7, SamplingParams(max_tokens=1, stop_token_ids=(7,), min_tokens=1), 100, LENGTH),
        (1, 5, SamplingParams(max_tokens=99), 5, LENGTH),
        (1, 5, SamplingParams(max_tokens=99), 6, None),
    ],
)
def test_finish_reason(
    num_output: int, token: int, params: SamplingParams, max_model_len: int, expected: FinishReason | None
) -> None:
    sequence = sequence_of(num_output, params)
    before = list(sequence.token_ids)
    assert finish_reason(sequence, token, max_model_len) is expected
    assert sequence.token_ids == before
    arrived = sequence_of(num_output + 1, params, last=token)
    assert finished_on_arrival(arrived, max_model_len) is expected


def test_a_fresh_prompt_has_not_finished_even_if_it_ends_with_a_stop_id() -> None:
    prompt = make_passport([1, 7], params=SamplingParams(max_tokens=1, stop_token_ids=(7,)))
    assert finished_on_arrival(Sequence.from_passport(prompt, arrival=0), 100) is None
