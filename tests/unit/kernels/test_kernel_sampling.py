"""Penalties and choices against the sampler of the CPU: the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_kit import assert_close
from support.engine_driver import make_sequence

from engine.candidates import Cuts
from engine.choice import NO_CHOICE
from engine.choice import choose_tokens as choose_tokens_twin
from engine.kernels.penalties import Bias, Penalties, edit_logits, edit_logits_twin
from engine.kernels.sampling import choose_tokens
from engine.logit_edits import edit_row
from engine.noise import as_int64
from engine.plan import Failed
from engine.sampler import sample
from engine.sequence import Sequence
from fleet.types import SamplingParams

PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1e-6},
    {"temperature": 0.7, "top_k": 1},
    {"temperature": 1.3, "top_k": 40},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 2.0, "top_p": 0.01},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 1.5, "top_k": 100_000, "top_p": 0.999},
]


def choose(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """The kernel, called as a backend would."""
    params, device = [one.params for one in sequences], logits.device
    return choose_tokens(
        logits,
        torch.tensor([one.temperature for one in params], device=device),
        Cuts(
            torch.tensor([one.top_k for one in params], device=device),
            torch.tensor([one.top_p for one in params], device=device),
            torch.tensor([one.min_p for one in params], device=device),
        ),
        torch.tensor([as_int64(one.seed) for one in params], device=device),
        torch.tensor([one.num_output_tokens for one in sequences], device=device),
    )


@pytest.mark.parametrize("vocab_size", [5, 2100])
def test_the_same_tokens_as_the_sampler(vocab_size: int, device: torch.device) -> None:
    torch.manual_seed(vocab_size)
    seeds = (0, -1, 2**63, 2**64 - 1, 12345)
    sequences = [
        make_sequence([0] * (1 + at), SamplingParams(seed=seeds[at % 5], **params), prompt_len=1)
        for at, params in enumerate(PARAMS)
    ]
    logits = (torch.randn(len(PARAMS), vocab_size + 3, device=device) * 3)[:, :vocab_size]
    logits[:, 2] = -torch.inf
    logits[4] = logits[4].round()  # ties at the cuts
    tokens = choose(logits, sequences)
    expected = [one.token_id for one in sample(logits.clone(), sequences) if not isinstance(one, Failed)]
    print(f"{sum(a != b for a, b in zip(tokens.tolist(), expected, strict=True))} of {len(expected)} tokens differ")
    assert tokens.tolist() == expected


@settings(max_examples=15, deadline=None)
@given(
    scores=st.lists(st.integers(-16, 16).map(lambda step: step / 4), min_size=1, max_size=24),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    top_k=st.integers(0, 25),
    top_p=st.floats(0.01, 1.0),
    min_p=st.sampled_from([0.0, 0.05, 0.3]),
    seed=st.integers(0, 2**64 - 1),
)
def test_ties_and_cuts_of_every_kind(
    scores: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    logits, one = torch.tensor([scores], device=device), make_sequence([0, 1, 2], params, prompt_len=1)
    expected = sample(logits.clone(), [one])[0]
    assert not isinstance(expected, Failed)
    assert choose(logits, [one]).tolist() == [expected.token_id]


def test_rows_without_a_choice_fail_alone(device: torch.device) -> None:
    logits = torch.zeros(4, 7, device=device)
    logits[0, 3] = torch.nan
    logits[1] = -torch.inf
    logits[2, 5] = torch.inf
    logits[3, [2, 4]] = 1.0
    one = make_sequence([0, 1], SamplingParams(temperature=0.0), prompt_len=1)
    warm = make_sequence([0, 1], SamplingParams(temperature=1.0), prompt_len=1)
    assert choose(logits, [one, warm, warm, one]).tolist() == [NO_CHOICE, NO_CHOICE, NO_CHOICE, 2]
    no_rows = torch.zeros(0, device=device)
    twin = choose_tokens_twin(
        logits[:1], torch.ones(1, device=device), Cuts(no_rows.long(), no_rows, no_rows), no_rows.long(), no_rows.long()
    )
    assert twin.tolist() == [NO_CHOICE]


def test_draws_follow_the_distribution(device: torch.device) -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125], device=device)
    draws = 150
    logits = probabilities.log().expand(draws, 4).contiguous()
    ones, zeros = torch.ones(draws, device=device), torch.zeros(draws, device=device)
    indexes = torch.arange(draws, device=device)
    tokens = choose_tokens(logits, ones, Cuts(zeros.long(), ones, zeros), zeros.long(), indexes)
    assert torch.equal(tokens, choose_tokens_twin(logits, ones, Cuts(zeros.long(), ones, zeros), zeros.long(), indexes))
    shares = tokens.bincount(minlength=4) / draws
    assert_close("shares", shares, probabilities, roundings=0.13 * 2**23)  # three standard deviations


def test_edits_equal_their_twin_and_the_edits_of_a_row(device: torch.device) -> None:
    torch.manual_seed(5)
    vocab_size, prompt = 1300, [3, 4, 3, 1299]
    params = [
        SamplingParams(),
        SamplingParams(repetition_penalty=1.7, presence_penalty=0.3, frequency_penalty=-0.1),
        SamplingParams(logit_bias={7: 2.5, 0: -100.0}, repetition_penalty=0.6),
        SamplingParams(stop_token_ids=(9, 5000), min_tokens=50, frequency_penalty=0.7),
    ]
    output = [5, 5, 3, 1024, 5]
    logits = torch.randn(4, vocab_size, device=device) * 4
    by_row, by_twin = logits.clone(), logits.clone()
    counts = torch.zeros(2 + len(params), vocab_size, dtype=torch.int32, device=device)
    count_rows: list[int] = []
    starts: list[int] = [0]
    ids: list[int] = []
    values: list[float] = []
    for row, one in enumerate(params):
        edit_row(by_row[row], one, [*prompt, *output], len(prompt))
        entries = dict(one.logit_bias)
        if len(output) < one.min_tokens:
            entries |= {token: -torch.inf for token in one.stop_token_ids if token < vocab_size}
        ids += entries.keys()
        values += entries.values()
        starts.append(len(ids))
        count_rows.append(-1 if row == 0 else 2 + row)
        for token in output:
            counts[2 + row, token] += 2
        counts[2 + row, prompt] |= 1
    bias = Bias(
        torch.tensor(starts, dtype=torch.int32, device=device),
        torch.tensor(ids, dtype=torch.int32, device=device),
        torch.tensor(values, device=device),
    )
    penalties = Penalties(
        torch.tensor(count_rows, dtype=torch.int32, device=device),
        counts,
        torch.tensor([one.repetition_penalty for one in params], device=device),
        torch.tensor([one.presence_penalty for one in params], dtype=torch.float64, device=device),
        torch.tensor([one.frequency_penalty for one in params], dtype=torch.float64, device=device),
    )
    edit_logits_twin(by_twin, bias, penalties)
    untouched = logits[0].clone()
    edit_logits(logits, bias, penalties)
    assert torch.equal(logits[0], untouched)
    assert logits[3, 9] == -torch.inf
    finite = torch.isfinite(logits)
    assert torch.equal(finite, torch.isfinite(by_row))
    assert_close("edits", logits[finite], by_twin[finite], roundings=0)
    assert_close("edits of a row", logits[finite], by_row[finite], roundings=1)
    for only in ((bias, None), (None, penalties), (None, None)):
        once, again = torch.ones(4, vocab_size, device=device), torch.ones(4, vocab_size, device=device)
        edit_logits(once, *only)
        edit_logits_twin(again, *only)
        assert torch.equal(once, again)


def test_other_logits_are_refused(device: torch.device) -> None:
    half = torch.zeros(1, 4, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match="cannot edit"):
        edit_logits(half, None, None)
    with pytest.raises(ValueError, match="cannot choose"):
        choose(half, [make_sequence([0, 1], SamplingParams(), prompt_len=1)])
