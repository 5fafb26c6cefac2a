"""Which candidates stay under top-k, top-p and min-p: `engine.candidates`, to the letter. Letters in `engine.kernels`.

A candidate's score is held as its distance below the best, whose bits, as those of floats of one sign, rise as it does.
Weights are whole numbers, made rounding by rounding as they are specified: launches must not fuse products with sums
(`enable_fp_fusion=False`). What adds up to a number or a mass may then be added in any order, by any programs.
"""
# ruff: noqa: N803

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from engine.candidates import EXPONENT_OF_UNIT, LN2_HIGH, LN2_LOW, LOG2_E, LOWEST, ROUNDER, SERIES, UNIT_BITS, Cuts
from engine.kernels.jit import kernel, varying
from engine.kernels.row_logits import line_of, values_of

DIGIT_BITS = 3
NUM_DIGITS = 11  # of the 32 bits of a distance

_DIGITS, _BITS = tl.constexpr(1 << DIGIT_BITS), tl.constexpr(DIGIT_BITS)
_HIGHEST, _ALL_DIGITS = tl.constexpr(DIGIT_BITS * (NUM_DIGITS - 1)), tl.constexpr(NUM_DIGITS)
_TINIEST = tl.constexpr(torch.finfo(torch.float32).tiny)
_NO_LIMIT = tl.constexpr(0x7FFFFFFF)  # above the bits of every distance, infinity included
_LOWEST, _LOG2_E, _ROUNDER = tl.constexpr(LOWEST), tl.constexpr(LOG2_E), tl.constexpr(ROUNDER)
_LN2_HIGH, _LN2_LOW = tl.constexpr(LN2_HIGH), tl.constexpr(LN2_LOW)
_C6, _C5, _C4, _C3, _C2, _C1, _C0 = (tl.constexpr(coefficient) for coefficient in SERIES)
_EXPONENT_OF_UNIT, _UNIT = tl.constexpr(EXPONENT_OF_UNIT), tl.constexpr(2.0**UNIT_BITS)


class Draws(NamedTuple):
    """How R rows draw, and what launches leave for each other on the way.

    Attributes:
        temperatures: [R] float32.
        top_k, top_p, min_p: as `engine.candidates.Cuts`.
        tops: [R, S] float32, the best of each share of a row; infinity where a logit is NaN.
        sums: [2, NUM_DIGITS, R, 8] int64, of the searches by number and by mass: what candidates with each digit add
            up to, among those with the digits found before. Zeros before the searches.
        states: [2, NUM_DIGITS, R, 2] int64, before each digit: those found, and the number or mass still needed.
    """

    temperatures: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    tops: torch.Tensor
    sums: torch.Tensor
    states: torch.Tensor

    @classmethod
    def of(cls, temperatures: torch.Tensor, cuts: Cuts, num_shares: int) -> Draws:
        """With room for the rest."""
        device, num_rows = temperatures.device, temperatures.shape[0]
        return cls(
            temperatures,
            *cuts,
            tops=torch.empty((num_rows, num_shares), dtype=torch.float32, device=device),
            sums=torch.empty((2, NUM_DIGITS, num_rows, 1 << DIGIT_BITS), dtype=torch.int64, device=device),
            states=torch.empty((2, NUM_DIGITS, num_rows, 2), dtype=torch.int64, device=device),
        )


@kernel
def best_of(draws: tl.tuple, num_shares: tl.tensor, SHARES: tl.constexpr) -> tl.tensor:
    """The best logit of this program's row; not finite if there is nothing to choose."""
    shares = tl.arange(0, SHARES)
    tops = tl.load(draws.tops + tl.program_id(0) * num_shares + shares, mask=shares < num_shares, other=float("-inf"))
    return tl.max(tops, axis=0)


@kernel
def distances_of(
    line: tl.tuple, ids: tl.tensor, best: tl.tensor, temperature: tl.tensor, VOCAB: tl.constexpr
) -> tl.tensor:
    """How far candidates lie below the best, over the temperature: 0 to infinity, the latter past the end."""
    divisor = tl.broadcast_to(tl.maximum(temperature, _TINIEST), ids.shape)
    return tl.math.div_rn(best - values_of(line, ids, VOCAB), divisor)


@kernel
def weights_of(distances: tl.tensor, limit: tl.tensor, least: tl.tensor) -> tl.tensor:
    """`engine.candidates.whole_weights`; 0 beyond a distance (its bits) and below a weight."""
    clamped = tl.maximum(-distances, _LOWEST)
    shifted = clamped * _LOG2_E + _ROUNDER
    whole = shifted - _ROUNDER
    rest = (clamped - whole * _LN2_HIGH) - whole * _LN2_LOW
    series = ((((_C6 * rest + _C5) * rest + _C4) * rest + _C3) * rest + _C2) * rest + _C1
    power = ((shifted.to(tl.int32, bitcast=True) << 23) + _EXPONENT_OF_UNIT).to(tl.float32, bitcast=True)
    weights = ((series * rest + _C0) * power).to(tl.int64)
    return tl.where((distances.to(tl.int32, bitcast=True) <= limit) & (weights >= least), weights, 0)


@kernel
def kept_by(
    draws: tl.tuple, num_rows: tl.tensor, SEARCHED: tl.constexpr, VOCAB: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """What all cuts of this program's row leave, as `weights_of` takes it."""
    limit = tl.full([], _NO_LIMIT, tl.int32)
    if SEARCHED:
        limit = tl.minimum(_limit(draws, num_rows, False, VOCAB), _limit(draws, num_rows, True, VOCAB))
    least = tl.ceil(tl.load(draws.min_p + tl.program_id(0)).to(tl.float64) * _UNIT).to(tl.int64)
    return limit, least


@varying("num_rows", "num_shares", "share", "at")
def search_limits(
    logits: tl.tuple,
    stride: tl.tensor,
    draws: tl.tuple,
    num_rows: tl.tensor,
    num_shares: tl.tensor,
    share: tl.tensor,
    at: tl.tensor,
    BY_MASS: tl.constexpr,
    SHARES: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program: one share's number (top-k) or mass (top-p) by digit `at`. The search by number comes first."""
    row = tl.program_id(0)
    if _is_cut(draws, BY_MASS, VOCAB):
        line = line_of(logits, stride, VOCAB)
        best, temperature = best_of(draws, num_shares, SHARES), tl.load(draws.temperatures + row)
        found, needed = _state(draws, num_rows, at, BY_MASS)
        place = _place(num_rows, at, BY_MASS)
        if tl.program_id(1) == 0:
            tl.store(draws.states + place * 2, found)
            tl.store(draws.states + place * 2 + 1, needed)
        limit = tl.full([], _NO_LIMIT, tl.int32)
        if BY_MASS:
            limit = _limit(draws, num_rows, False, VOCAB)
        digits = tl.arange(0, _DIGITS)
        wanted = ((found << _BITS) | digits).to(tl.int32)
        # Digits along the first axis: a thread then holds all digits of its candidates, and weighs each just once.
        reached = tl.zeros((_DIGITS, TILE), tl.int64 if BY_MASS else tl.int32)
        first = tl.program_id(1) * share
        for begin in tl.range(first, first + share, TILE):
            ids = begin + tl.arange(0, TILE)
            distances = distances_of(line, ids, best, temperature, VOCAB)
            if BY_MASS:  # noqa: SIM108 - a branch that the compiler takes, not a value
                amounts = weights_of(distances, limit, 0)
            else:
                amounts = (ids < VOCAB).to(tl.int32)
            bits = distances.to(tl.int32, bitcast=True) >> (_HIGHEST - _BITS * at)
            reached += tl.where(wanted[:, None] == bits[None, :], amounts[None, :], 0)
        total = tl.sum(reached, axis=1).to(tl.int64)
        tl.atomic_add(draws.sums + place * _DIGITS + digits, total, sem="relaxed")


@kernel
def _is_cut(draws: tl.tuple, BY_MASS: tl.constexpr, VOCAB: tl.constexpr) -> tl.tensor:
    """Whether this program's row draws under top-p, or else under top-k."""
    row = tl.program_id(0)
    if BY_MASS:
        active = tl.load(draws.top_p + row) < 1
    else:
        top_k = tl.load(draws.top_k + row)
        active = (top_k > 0) & (top_k < VOCAB)
    return active & (tl.load(draws.temperatures + row) > 0)


@kernel
def _place(num_rows: tl.tensor, at: tl.tensor, BY_MASS: tl.constexpr) -> tl.tensor:
    """Index of this program's row, one search and one digit, of the sums and states."""
    cut: tl.constexpr = 1 if BY_MASS else 0
    return (cut * _ALL_DIGITS + at) * num_rows + tl.program_id(0)


@kernel
def _state(draws: tl.tuple, num_rows: tl.tensor, at: tl.tensor, BY_MASS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Before digit `at` of a search: the digits found, and the number or mass needed beyond what they skip."""
    row = tl.program_id(0)
    found, needed = tl.full([], 0, tl.int64), tl.full([], 1, tl.int64)
    if not BY_MASS:
        needed = tl.load(draws.top_k + row)
    if at > 0:
        before = _place(num_rows, at - 1, BY_MASS)
        digits = tl.arange(0, _DIGITS)
        amounts = tl.load(draws.sums + before * _DIGITS + digits)
        if at > 1:
            found, needed = tl.load(draws.states + before * 2), tl.load(draws.states + before * 2 + 1)
        elif BY_MASS:  # the first sums are of all that top-k left
            share = tl.load(draws.top_p + row).to(tl.float64) * tl.sum(amounts, axis=0).to(tl.float64)
            needed = tl.maximum(tl.ceil(share).to(tl.int64), 1)
        skipped = tl.cumsum(amounts, axis=0) < needed
        found = (found << _BITS) | tl.sum(skipped.to(tl.int64), axis=0)
        needed -= tl.sum(tl.where(skipped, amounts, 0), axis=0)
    return found, needed


@kernel
def _limit(draws: tl.tuple, num_rows: tl.tensor, BY_MASS: tl.constexpr, VOCAB: tl.constexpr) -> tl.tensor:
    """Bits of the least distance within which this program's row reaches the number or mass, all digits found."""
    limit = tl.full([], _NO_LIMIT, tl.int32)
    if _is_cut(draws, BY_MASS, VOCAB):
        found, _ = _state(draws, num_rows, _ALL_DIGITS, BY_MASS)
        limit = found.to(tl.int32)
    return limit
