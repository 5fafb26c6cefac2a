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
from engine.choice import NO_CHOICE, ChoiceRows
from engine.choice import choose_tokens as choose_tokens_twin
from engine.cpu.choice import TokenChoice
from engine.kernels import sampling
from engine.kernels.penalties import Bias, Penalties, edit_logits, edit_logits_twin, note_chosen, note_chosen_twin
from engine.kernels.row_logits import RowLogits, row_logits_twin
from engine.kernels.sampling import choose_tokens
from engine.logit_edits import edit_row
from engine.noise import as_int64
from engine.plan import Failed
from engine.sampler import sample
from engine.sequence import Sequence
from fleet.types import SamplingParams

Rows = tuple[torch.Tensor, Cuts, torch.Tensor, torch.Tensor]  # temperatures, cuts, seeds, indexes

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
        RowLogits.plain(logits),
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
    assert tokens.tolist() == expected
    alone = [choose(logits[at : at + 1], sequences[at : at + 1]).item() for at in range(len(sequences))]
    assert alone == expected, "a row's token depends on its company"


def random_rows(num_rows: int, vocab_size: int, device: torch.device) -> tuple[torch.Tensor, Rows]:
    """Logits in bfloat16, some rows with many ties, some nearly flat, some with bans; parameters of every kind."""
    draw = torch.Generator().manual_seed(num_rows + vocab_size)
    spread = torch.tensor([0.01, 0.5, 3.0, 30.0])[torch.randint(4, (num_rows, 1), generator=draw)]
    logits = torch.randn(num_rows, vocab_size, generator=draw) * spread
    logits[1::4] = logits[1::4].round()
    logits[torch.rand(num_rows, vocab_size, generator=draw) < 0.05] = -torch.inf

    def one_of(*values: float) -> torch.Tensor:
        return torch.tensor(values)[torch.randint(len(values), (num_rows,), generator=draw)].to(device)

    temperatures = one_of(0.0, 1e-38, 0.3, 1.0, 1.0, 2.5)
    cuts = Cuts(
        one_of(0, 0, 1, 2, 40, vocab_size - 1, 10 * vocab_size).to(torch.int64),
        one_of(1.0, 1.0, 0.999, 0.9, 0.3, 1e-6),
        one_of(0.0, 0.0, 1e-9, 0.02, 0.5, 1.0),
    )
    for column, value in zip((temperatures, *cuts), (1.0, vocab_size // 2, 0.9, 1e-9), strict=True):
        column[0] = value  # everything at once
    seeds, indexes = (torch.randint(-(2**62), 2**62, (num_rows,), generator=draw).to(device) for _ in range(2))
    return logits.to(device, torch.bfloat16), (temperatures, cuts, seeds, indexes)


@pytest.mark.parametrize(("num_rows", "vocab_size"), [(64, 37), (32, 1500), (1, 151_936)])
def test_every_row_gets_the_very_token_of_the_specification(
    num_rows: int, vocab_size: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU by the compiled kernel too: a seed says one token, wherever it is drawn, by however many programs."""
    monkeypatch.setattr(sampling, "_TILE", 8192 if vocab_size > 100_000 else 512)
    monkeypatch.setattr(sampling, "_PROGRAMS", 5 * num_rows)
    logits, rows = random_rows(num_rows, vocab_size, device)
    tokens = choose_tokens(RowLogits.plain(logits), *rows)
    assert torch.equal(tokens, choose_tokens_twin(logits.float(), *rows))
    temperatures, cuts, seeds, indexes = rows
    columns = ChoiceRows(*(one.cpu().numpy() for one in (temperatures, *cuts, seeds, indexes)))
    assert tokens.tolist() == TokenChoice()(logits.float().cpu(), columns)
    uncut = Cuts(torch.zeros_like(cuts.top_k), torch.ones_like(cuts.top_p), cuts.min_p)
    plain = choose_tokens(RowLogits.plain(logits), temperatures, uncut, seeds, indexes, searches=False)
    assert torch.equal(plain, choose_tokens_twin(logits.float(), temperatures, uncut, seeds, indexes))
    assert torch.equal(tokens, choose_tokens_twin(logits.float(), *rows)), "and nothing was written"


def test_edited_rows_and_masks_take_the_place_of_raw_logits(device: torch.device) -> None:
    num_rows, vocab_size = 24, 300
    raw, rows = random_rows(num_rows, vocab_size, device)
    draw = torch.Generator().manual_seed(1)
    places = torch.tensor([-1, 2, -1, 0, 1, -1], dtype=torch.int32).repeat(4).to(device)
    edited = torch.randn(3, vocab_size, generator=draw).to(device)
    mask_rows = torch.tensor([0, -1, 1, 2, -1, -1, 3, 4], dtype=torch.int32).repeat(3).to(device)
    masks = torch.randint(-(2**31), 2**31 - 1, (5, 10), generator=draw, dtype=torch.int32).to(device)
    masks[3] = 0  # nothing is allowed
    logits = RowLogits(raw, places, edited, mask_rows, masks)
    chosen = torch.zeros(num_rows, dtype=torch.int64, device=device)
    assert choose_tokens(logits, *rows, chosen=chosen) is chosen
    assert torch.equal(chosen, choose_tokens_twin(row_logits_twin(logits), *rows))
    assert chosen[6::8].tolist() == [NO_CHOICE] * 3
    words = masks[mask_rows.clamp(min=0).long(), chosen.clamp(min=0) // 32]
    allowed = (words >> (chosen.clamp(min=0) % 32).int()) & 1
    assert bool((allowed[(mask_rows >= 0) & (chosen >= 0)] == 1).all())


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
    tokens = choose_tokens(RowLogits.plain(logits), ones, Cuts(zeros.long(), ones, zeros), zeros.long(), indexes)
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
    by_row = logits.clone()
    by_kernel, by_twin = (torch.full((4, vocab_size), 7.0, device=device) for _ in range(2))
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
    counts_before = counts.clone()
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
    places = torch.tensor([-1, 3, 0, 2], dtype=torch.int32, device=device)
    raw = logits.clone()
    ours, twins = (RowLogits.plain(raw)._replace(edited_rows=places, edited=one) for one in (by_kernel, by_twin))
    edit_logits(ours, bias, penalties)
    edit_logits_twin(twins, bias, penalties)
    assert torch.equal(raw, logits)
    assert torch.equal(by_kernel, by_twin)
    assert bool((by_kernel[1] == 7).all()), "a place that no row has"
    edited = by_kernel[places[1:].long()]
    assert edited[2, 9] == -torch.inf
    finite = torch.isfinite(edited)
    assert torch.equal(finite, torch.isfinite(by_row[1:]))
    assert_close("edits of a row", edited[finite], by_row[1:][finite], roundings=1)
    chosen = torch.tensor([4, 5, -1, 5], device=device)
    after = penalties.counts.clone()
    note_chosen(penalties, chosen)
    note_chosen_twin(penalties._replace(counts=after), chosen)
    assert torch.equal(penalties.counts, after)
    assert int((after - counts_before).sum()) == 4, "the first row has no counts, and the third chose nothing"


def test_other_logits_are_refused(device: torch.device) -> None:
    plain = RowLogits.plain(torch.zeros(2, 40, device=device))
    one = make_sequence([0, 1], SamplingParams(), prompt_len=1)
    with pytest.raises(ValueError, match="cannot choose"):
        choose(torch.zeros(1, 4, dtype=torch.int32, device=device), [one])
    for wrong in (
        plain._replace(raw=plain.raw.T),
        plain._replace(edited=torch.zeros(1, 41, device=device)),
        plain._replace(edited=plain.edited.bfloat16()),
        plain._replace(masks=plain.masks[:, :1]),
        plain._replace(mask_rows=plain.mask_rows[:1]),
    ):
        with pytest.raises(ValueError, match="cannot choose"):
            wrong.check()
