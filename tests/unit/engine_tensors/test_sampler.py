"""The sampler against naive Python, against the distribution it should draw from, and row against row."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine_driver import make_sequence

from engine.candidates import UNIT_BITS, Cuts, beyond, draw, whole_weights
from engine.choice import ChoiceRows, choice_for, choose_in_torch
from engine.cpu.choice import TokenChoice
from engine.logprobs import LOGPROB_FLOOR
from engine.noise import uniforms
from engine.plan import Failed, Sampled
from engine.sampler import sample
from engine.sequence import Sequence
from fleet.types import SamplingParams

VOCAB = 24
MASK = 2**64 - 1


def sequence(*, output: tuple[int, ...] = (), prompt: tuple[int, ...] = (3, 4), **params: Any) -> Sequence:
    return make_sequence([*prompt, *output], SamplingParams(**params), prompt_len=len(prompt))


def choose(logits: torch.Tensor, *sequences: Sequence) -> list[int]:
    results = sample(logits.clone(), sequences)
    assert all(isinstance(result, Sampled) for result in results), results
    return [result.token_id for result in results if isinstance(result, Sampled)]


def naive_scores(logits: list[float], one: Sequence) -> list[float]:
    """Bias, ban and penalties as their definitions read."""
    params, scores = one.params, list(logits)
    output = Counter(one.token_ids[one.prompt_len :])
    for token in range(len(scores)):
        scores[token] += params.logit_bias.get(token, 0.0)
        if one.num_output_tokens < params.min_tokens and token in params.stop_token_ids:
            scores[token] = -math.inf
        if token in one.token_ids:
            penalty = params.repetition_penalty
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        if token in output:
            scores[token] -= params.presence_penalty + params.frequency_penalty * output[token]
    return scores


def naive_kept(scores: list[float], params: SamplingParams) -> set[int]:
    """Top-k, top-p and min-p as sets; ties with the last one kept stay."""
    kept = {token for token, score in enumerate(scores) if score > -math.inf}
    if params.top_k:
        floor = sorted((scores[token] for token in kept), reverse=True)[: params.top_k][-1]
        kept = {token for token in kept if scores[token] >= floor}
    if params.top_p < 1:
        total = sum(math.exp(scores[token]) for token in kept)
        mass, floor = 0.0, math.inf
        for token in sorted(kept, key=lambda one: -scores[one]):
            if mass / total >= params.top_p:
                break
            mass += math.exp(scores[token])
            floor = scores[token]
        kept = {token for token in kept if scores[token] >= floor}
    if params.min_p:
        best = max(scores[token] for token in kept)
        kept = {token for token in kept if scores[token] >= best + math.log(params.min_p)}
    return kept


grid = st.integers(-24, 24).map(lambda step: step / 4)  # exact in float32, ties are common
rows_of_logits = st.lists(grid, min_size=VOCAB, max_size=VOCAB)
tokens = st.integers(0, VOCAB - 1)


@settings(max_examples=150, deadline=None)
@given(
    logits=rows_of_logits,
    prompt=st.lists(tokens, min_size=1, max_size=6),
    output=st.lists(tokens, max_size=8),
    bias=st.dictionaries(tokens, st.sampled_from([-4.0, 0.5, 6.0]), max_size=3),
    stops=st.lists(tokens, max_size=3),
    min_tokens=st.integers(0, 9),
    repetition=st.sampled_from([1.0, 2.0, 0.5]),
    presence=st.sampled_from([0.0, 0.5, -1.0]),
    frequency=st.sampled_from([0.0, 0.25, -0.5]),
)
def test_greedy_takes_the_lowest_id_among_the_best_after_all_edits(
    logits: list[float],
    prompt: list[int],
    output: list[int],
    bias: dict[int, float],
    stops: list[int],
    min_tokens: int,
    repetition: float,
    presence: float,
    frequency: float,
) -> None:
    one = sequence(
        prompt=tuple(prompt),
        output=tuple(output),
        temperature=0.0,
        logit_bias=bias,
        stop_token_ids=tuple(stops),
        min_tokens=min_tokens,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    scores = naive_scores(logits, one)
    assert choose(torch.tensor([logits]), one) == [scores.index(max(scores))]


def cuts_of(*params: SamplingParams) -> Cuts:
    return Cuts(
        torch.tensor([one.top_k for one in params]),
        torch.tensor([one.top_p for one in params]),
        torch.tensor([one.min_p for one in params]),
    )


@settings(max_examples=150, deadline=None)
@given(
    logits=rows_of_logits,
    top_k=st.integers(0, VOCAB + 3),
    top_p=st.sampled_from([0.05, 0.3, 0.71, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.03, 0.4, 1.0]),
)
def test_the_kept_candidates_are_those_of_the_definitions(
    logits: list[float], top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    scores = torch.tensor([logits])
    scores -= scores.max()
    kept = ~beyond(scores, whole_weights(scores), cuts_of(params))
    assert set(torch.nonzero(kept[0]).flatten().tolist()) == naive_kept(scores[0].tolist(), params)


def test_weights_are_exponentials_in_whole_numbers() -> None:
    scores = -torch.cat((torch.linspace(0, 33, 200_001), torch.tensor([0.0, 1e-38, 700.0, math.inf])))
    exact = scores.double().exp() * 2.0**UNIT_BITS
    weights = whole_weights(scores.unsqueeze(0))[0]
    assert int(weights[0]) == 2**UNIT_BITS
    error = ((weights.double() - exact).abs() - 1).clamp(min=0) / exact.clamp(min=1e-300)
    print(f"largest relative error {float(error.max()):.2e}")
    assert float(error.max()) < 2**-22
    assert weights[-2:].tolist() == [0, 0]


fused_rows = st.lists(
    st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 1e-45, 0.3, 1.0, 2.5]),
            "top_k": st.sampled_from([0, 0, 1, 7, 900, 5000]),
            "top_p": st.sampled_from([1.0, 1.0, 0.9, 0.3, 1e-6, 0.9999999]),
            "min_p": st.sampled_from([0.0, 0.0, 0.05, 1.0]),
            "seed": st.integers(0, 2**64 - 1),
            "output": st.lists(tokens, max_size=3).map(tuple),
        }
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=150, deadline=None)
@given(
    rows=fused_rows,
    vocab_size=st.sampled_from([1, 5, 511, 512, 513, 1500]),
    spread=st.sampled_from([0.0, 0.01, 3.0, 300.0]),
    step=st.sampled_from([0.0, 0.5]),
    numbers=st.integers(0, 2**32),
    threads=st.sampled_from([1, 3]),
)
def test_the_compiled_choice_is_the_specification_to_the_letter(
    rows: list[dict[str, Any]], vocab_size: int, spread: float, step: float, numbers: int, threads: int
) -> None:
    logits = torch.randn(len(rows), vocab_size, generator=torch.Generator().manual_seed(numbers)) * spread
    logits = (logits / step).round() * step if step else logits  # many ties, zeros of both signs
    banned = torch.rand(logits.shape, generator=torch.Generator().manual_seed(numbers + 1)) < 0.1
    logits[banned] = -torch.inf
    if numbers % 3 == 0:
        logits[0, numbers % vocab_size] = (-torch.tensor(math.nan), torch.tensor(math.nan), torch.inf)[numbers % 9 // 3]
    choice_rows = ChoiceRows.of([sequence(**row) for row in rows])
    torch.set_num_threads(threads)
    try:
        assert TokenChoice()(logits, choice_rows) == choose_in_torch(logits.clone(), choice_rows)
    finally:
        torch.set_num_threads(1)


def test_without_the_compiler_the_specification_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("No module named 'numba'")

    cpu = torch.device("cpu")
    assert isinstance(choice_for(cpu), TokenChoice)
    monkeypatch.setattr("engine.cpu.choice.TokenChoice", missing)
    assert choice_for(cpu) is choose_in_torch


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=20, top_p=0.8),
        SamplingParams(top_k=700),
        SamplingParams(top_p=0.6),
        SamplingParams(min_p=0.5),
        SamplingParams(top_k=3000, top_p=0.9, min_p=0.4),
        SamplingParams(top_k=10, top_p=0.99999, min_p=0.0001),
    ],
)
@pytest.mark.parametrize("spread", [0.1, 4.0])  # nearly flat rows need more than the likeliest few
def test_draws_under_cuts_are_those_of_a_plain_inversion(params: SamplingParams, spread: float) -> None:
    scores = (torch.randn(5000, generator=torch.Generator().manual_seed(1)) * spread * 8).round() / 8  # with ties
    scores -= scores.max()
    kept = torch.zeros(5000, dtype=torch.bool)
    kept[list(naive_kept(scores.tolist(), params))] = True
    ends = scores.double().exp().masked_fill(~kept, 0.0).cumsum(0)
    noise = torch.linspace(0.001, 0.999, 200, dtype=torch.float64)
    expected = torch.searchsorted(ends, noise * ends[-1], right=True)
    drawn = draw(scores.repeat(200, 1), cuts_of(*[params] * 200), noise)
    assert bool(kept[drawn].all())
    assert int((drawn != expected).sum()) <= 1  # a boundary may round to either side


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = torch.randn(1500, generator=torch.Generator().manual_seed(2)) * 3
    num_draws = 20_000
    expected = (logits / temperature).softmax(-1).double()
    sequences = [sequence(temperature=temperature, seed=seed) for seed in range(num_draws)]
    chosen: list[int] = []
    for start in range(0, num_draws, 2000):
        chosen += choose(logits.expand(2000, -1).contiguous(), *sequences[start : start + 2000])
    counts = torch.bincount(torch.tensor(chosen), minlength=1500).double()
    often = expected * num_draws >= 10
    observed = torch.cat((counts[often], counts[~often].sum().view(1)))
    predicted = torch.cat((expected[often], expected[~often].sum().view(1))) * num_draws
    chi_square = float(((observed - predicted) ** 2 / predicted).sum())
    freedom = observed.numel() - 1
    print(f"temperature {temperature}: chi-square {chi_square:.1f} with {freedom} degrees of freedom")
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_successive_draws_of_one_seed_are_uniform_and_unrelated() -> None:
    draws = uniforms(torch.full((50_000,), 42), torch.arange(50_000))
    neighbours = uniforms(torch.full((50_000,), 43), torch.arange(50_000))
    assert abs(float(draws.mean()) - 0.5) < 0.01
    assert abs(float(draws.var()) - 1 / 12) < 0.01
    for other in (neighbours[:-1], draws[1:]):
        assert abs(float(torch.corrcoef(torch.stack((draws[:-1], other)))[0, 1])) < 0.02
    assert float(draws.min()) > 0
    assert float(draws.max()) < 1


@given(seed=st.integers(-(2**63), 2**63 - 1), index=st.integers(0, 2**31))
def test_noise_is_splitmix64_on_any_seed(seed: int, index: int) -> None:
    def mix(word: int) -> int:
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
        return word ^ (word >> 31)

    word = mix((mix(seed & MASK) + (index + 1) * 0x9E3779B97F4A7C15) & MASK)
    expected = ((word >> 16) + 0.5) / 2**48
    assert uniforms(torch.tensor([seed]), torch.tensor([index])).item() == expected


def test_seeds_beyond_int64_are_folded_and_not_refused() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    assert choose(logits, sequence(seed=2**63 + 5)) == choose(logits, sequence(seed=5 - 2**63))


def test_every_draw_lands_on_a_kept_candidate_even_at_the_ends() -> None:
    scores = torch.full((4, 2000), -torch.inf)
    scores[:, 700] = 0.0
    scores[:, 1900] = -30.0
    edges = torch.tensor([2.0**-49, 0.5, 1 - 2.0**-49, 0.25], dtype=torch.float64)
    uncut = Cuts(torch.zeros(4, dtype=torch.int64), torch.ones(4), torch.zeros(4))
    assert draw(scores, uncut, edges).tolist() == [700, 700, 1900, 700]


def test_a_row_is_the_same_alone_and_in_any_company() -> None:
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(6, 3000, generator=generator) * 2
    sequences = [
        sequence(temperature=0.0),
        sequence(seed=1),
        sequence(seed=2, top_k=5, output=(9, 9)),
        sequence(seed=3, top_p=0.8, repetition_penalty=1.3, output=(5, 6, 7)),
        sequence(seed=4, min_p=0.2, temperature=0.3, logprobs=2),
        sequence(seed=5, logit_bias={7: 100.0}),
    ]
    together = sample(logits.clone(), sequences)
    for row, one in enumerate(sequences):
        assert sample(logits[row : row + 1].clone(), [one]) == [together[row]]
    backwards = sample(logits.flip(0), sequences[::-1])
    assert backwards[::-1] == together
    assert choose(logits, *sequences)[5] == 7


def test_seed_and_index_make_the_stream() -> None:
    logits = torch.zeros(1, 50_000)
    seeds = {choose(logits, sequence(seed=seed))[0] for seed in range(20)}
    indexes = {choose(logits, sequence(seed=1, output=(5,) * length))[0] for length in range(20)}
    assert len(seeds) > 18
    assert len(indexes) > 18
    # The index counts output tokens, so a replayed prompt of the same ids goes on alike.
    assert choose(logits, sequence(seed=1, output=(8, 8))) == choose(logits, sequence(seed=1, output=(7, 7)))


def test_a_tiny_temperature_is_greedy_and_never_overflows() -> None:
    logits = torch.tensor([[1e4, -1e4, 9_999.0]])
    for temperature in (1e-3, 1e-30, 1e-45):
        assert choose(logits, sequence(temperature=temperature)) == [0]


def test_stop_ids_cannot_be_drawn_before_min_tokens() -> None:
    logits = torch.zeros(1, 3)
    logits[0, 1] = 50.0
    early = sequence(prompt=(0,), stop_token_ids=(1, 99), min_tokens=2, output=(2,))
    late = sequence(prompt=(0,), stop_token_ids=(1, 99), min_tokens=2, output=(2, 2))
    assert choose(logits, early) != [1]
    assert choose(logits, late) == [1]


def test_logprobs_are_the_models_own_whatever_was_edited() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(4))
    logits[0, 6] = -torch.inf
    one = sequence(temperature=0.7, logprobs=4, logit_bias={6: 1.0, 2: 80.0}, presence_penalty=1.0, output=(1,))
    raw = logits[0].log_softmax(-1)
    (result,) = sample(logits.clone(), [one])
    assert isinstance(result, Sampled)
    assert result.logprob is not None
    assert result.token_id == 2
    assert result.logprob.logprob == pytest.approx(float(raw[2]), abs=1e-5)
    values, ids = raw.topk(4)
    assert [top.token_id for top in result.logprob.top] == ids.tolist()
    assert [top.logprob for top in result.logprob.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_logprobs_have_a_floor_and_ties_go_by_id() -> None:
    logits = torch.full((1, 4), -torch.inf)
    logits[0, 1] = logits[0, 3] = 0.0
    (result,) = sample(logits, [sequence(temperature=0.0, logprobs=9, prompt=(0,))])
    assert isinstance(result, Sampled)
    assert result.logprob is not None
    assert [top.token_id for top in result.logprob.top] == [1, 3, 0, 2]
    assert result.logprob.top[-1].logprob == LOGPROB_FLOOR


def test_no_logprobs_unless_asked_and_none_on_top_for_zero() -> None:
    logits = torch.zeros(2, VOCAB)
    plain, chosen_only = sample(logits, [sequence(), sequence(logprobs=0)])
    assert isinstance(plain, Sampled)
    assert plain.logprob is None
    assert isinstance(chosen_only, Sampled)
    assert chosen_only.logprob is not None
    assert chosen_only.logprob.top == []
    assert chosen_only.logprob.logprob == pytest.approx(-math.log(VOCAB), abs=1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_without_finite_scores_fails_alone(poison: float) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(8))
    healthy = [sequence(seed=1), sequence(seed=2), sequence(temperature=0.0, logprobs=1)]
    expected = sample(logits.clone(), healthy)
    logits[1, 5] = poison
    results = sample(logits, healthy)
    assert isinstance(results[1], Failed)
    assert [results[0], results[2]] == [expected[0], expected[2]]


def test_bad_parameters_fail_their_row_alone() -> None:
    logits = torch.zeros(3, 2)
    everything_banned = sequence(prompt=(0,), stop_token_ids=(0, 1), min_tokens=1)
    outside = sequence(prompt=(0,), logit_bias={2: 1.0})
    results = sample(logits, [everything_banned, outside, sequence(prompt=(0,), temperature=0.0)])
    assert isinstance(results[0], Failed)
    assert isinstance(results[1], Failed)
    assert "token id 2" in results[1].message
    assert results[2] == Sampled(0)
