"""The choice of tokens, without a word from the host. Letters in `engine.kernels`; S programs share a row.

`choose_tokens` says what its twin `engine.choice.choose_tokens` says, to the letter. A row is cut into S shares, so
that a single row is not left to one multiprocessor; between launches its programs meet in memory: the best of each
share, the digits of the limits (`engine.kernels.draw_limits`), the mass of each share, the token.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton.language as tl

from engine.candidates import Cuts
from engine.kernels.draw_limits import NUM_DIGITS, Draws, best_of, distances_of, kept_by, search_limits, weights_of
from engine.kernels.jit import kernel, power_of_two, tiles, varying
from engine.kernels.row_logits import RowLogits, line_of, values_of

_TILE = 512
_PROGRAMS = 1024  # of a launch, about: some for each multiprocessor there is
# SplitMix64, as in `engine.noise`.
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = tl.constexpr(0x94D049BB133111EB)


def choose_tokens(
    logits: RowLogits,
    temperatures: torch.Tensor,
    cuts: Cuts,
    seeds: torch.Tensor,
    indexes: torch.Tensor,
    *,
    searches: bool = True,
    chosen: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose one token per row. Graph-safe.

    Rows are read once if greedy, three times if they draw, and NUM_DIGITS times more for each of top-k and top-p.

    Args:
        logits: not mutated.
        temperatures: [R] float32; 0 takes the likeliest, the lowest id among equals.
        cuts: of the R rows.
        seeds: [R] int64.
        indexes: [R] int64, of the output token; the noise is that of `engine.noise.uniforms(seeds, indexes)`.
        searches: False leaves out top-k and top-p, and the launches that search for their limits.
        chosen: [R] int64 that takes the result; None: new memory.

    Returns:
        [R] int64 token ids; `NO_CHOICE` for a row whose best logit is not finite or that holds NaN.
    """
    logits.check()
    num_rows, vocab_size = logits.raw.shape
    if chosen is None:
        chosen = torch.empty(num_rows, dtype=torch.int64, device=logits.raw.device)
    if num_rows == 0:
        return chosen
    tile = min(_TILE, power_of_two(vocab_size))
    num_tiles = tiles(vocab_size, tile)
    share = tiles(num_tiles, max(1, _PROGRAMS // num_rows)) * tile
    num_shares = tiles(vocab_size, share)
    grid = (num_rows, num_shares)
    draws = Draws.of(temperatures, cuts, num_shares)
    likeliest = torch.empty(grid, dtype=torch.int32, device=chosen.device)
    masses = torch.empty(grid, dtype=torch.int64, device=chosen.device)
    source, sizes = (logits, logits.raw.stride(0), draws), (num_rows, num_shares, share)
    how = {"VOCAB": vocab_size, "TILE": tile, "num_warps": 8, "enable_fp_fusion": False}
    _survey[grid](*source, num_shares, share, likeliest, **how)
    how["SHARES"] = power_of_two(num_tiles)
    if searches:
        draws.sums.zero_()
        for by_mass in (False, True):
            for digit in range(NUM_DIGITS):
                search_limits[grid](*source, *sizes, digit, BY_MASS=by_mass, **how)
    _weigh[grid](*source, *sizes, masses, SEARCHED=searches, **how)
    _pick[(num_rows,)](*source, *sizes, likeliest, masses, seeds, indexes, chosen, SEARCHED=searches, **how)
    return chosen


@varying("num_shares", "share")
def _survey(
    logits: tl.tuple,
    stride: tl.tensor,
    draws: tl.tuple,
    num_shares: tl.tensor,
    share: tl.tensor,
    likeliest: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program: one share's best logit, and the lowest id that has it."""
    line = line_of(logits, stride, VOCAB)
    highest = tl.full((TILE,), float("-inf"), tl.float32)
    where = tl.full((TILE,), VOCAB, tl.int32)
    undefined = tl.zeros((TILE,), tl.int32)
    first = tl.program_id(1) * share
    for begin in tl.range(first, first + share, TILE):
        ids = begin + tl.arange(0, TILE)
        values = values_of(line, ids, VOCAB)
        where = tl.where(values > highest, ids, where)
        highest = tl.maximum(highest, values)
        undefined |= (values != values).to(tl.int32)  # noqa: PLR0124 - how NaN shows itself
    best = tl.max(highest, axis=0)
    lowest = tl.min(tl.where(highest == best, where, VOCAB), axis=0)
    place = tl.program_id(0) * num_shares + tl.program_id(1)
    tl.store(draws.tops + place, tl.where(tl.max(undefined, axis=0) == 0, best, float("inf")))
    tl.store(likeliest + place, lowest)


@varying("num_rows", "num_shares", "share")
def _weigh(
    logits: tl.tuple,
    stride: tl.tensor,
    draws: tl.tuple,
    num_rows: tl.tensor,
    num_shares: tl.tensor,
    share: tl.tensor,
    masses: tl.tensor,
    SEARCHED: tl.constexpr,
    SHARES: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program: the mass that the cuts leave of one share."""
    temperature = tl.load(draws.temperatures + tl.program_id(0))
    if temperature > 0:
        line, best = line_of(logits, stride, VOCAB), best_of(draws, num_shares, SHARES)
        limit, least = kept_by(draws, num_rows, SEARCHED, VOCAB)
        mass = tl.zeros((TILE,), tl.int64)
        first = tl.program_id(1) * share
        for begin in tl.range(first, first + share, TILE):
            distances = distances_of(line, begin + tl.arange(0, TILE), best, temperature, VOCAB)
            mass += weights_of(distances, limit, least)
        tl.store(masses + tl.program_id(0) * num_shares + tl.program_id(1), tl.sum(mass, axis=0))


@varying("num_rows", "num_shares", "share")
def _pick(
    logits: tl.tuple,
    stride: tl.tensor,
    draws: tl.tuple,
    num_rows: tl.tensor,
    num_shares: tl.tensor,
    share: tl.tensor,
    likeliest: tl.tensor,
    masses: tl.tensor,
    seeds: tl.tensor,
    indexes: tl.tensor,
    chosen: tl.tensor,
    SEARCHED: tl.constexpr,
    SHARES: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program: one row's token, the likeliest or the first id where the running sum of weights passes a target."""
    row = tl.program_id(0)
    temperature, best = tl.load(draws.temperatures + row), best_of(draws, num_shares, SHARES)
    shares = tl.arange(0, SHARES)
    is_share = shares < num_shares
    tops = tl.load(draws.tops + row * num_shares + shares, mask=is_share, other=float("-inf"))
    lowest = tl.load(likeliest + row * num_shares + shares, mask=is_share, other=VOCAB)
    token = tl.min(tl.where(tops == best, lowest, VOCAB), axis=0)
    sound = (best > float("-inf")) & (best < float("inf"))
    if sound & (temperature > 0):
        line = line_of(logits, stride, VOCAB)
        limit, least = kept_by(draws, num_rows, SEARCHED, VOCAB)
        mass = tl.load(masses + row * num_shares + shares, mask=is_share, other=0)
        noise = _uniform(tl.load(seeds + row), tl.load(indexes + row))
        target = (noise * tl.sum(mass, axis=0).to(tl.float64)).to(tl.int64)
        skipped = tl.cumsum(mass, axis=0) <= target
        target -= tl.sum(tl.where(skipped, mass, 0), axis=0)
        first = tl.sum(skipped.to(tl.int32), axis=0) * share
        token = tl.full([], -1, tl.int32)
        for begin in tl.range(first, first + share, TILE):
            distances = distances_of(line, begin + tl.arange(0, TILE), best, temperature, VOCAB)
            ends = tl.cumsum(weights_of(distances, limit, least), axis=0)
            within = tl.max(ends, axis=0)
            here = begin + tl.sum((ends <= target).to(tl.int32), axis=0)
            token = tl.where((token < 0) & (target < within), here, token)
            target -= within
    tl.store(chosen + row, tl.where(sound, token, -1).to(tl.int64))


@kernel
def _uniform(seed: tl.tensor, index: tl.tensor) -> tl.tensor:
    """`engine.noise.uniforms`, to the bit."""
    state = _mix(seed.to(tl.uint64, bitcast=True)) + (index.to(tl.uint64, bitcast=True) + 1) * _GAMMA
    return ((_mix(state) >> 16).to(tl.float64) + 0.5) * 2.0**-48


@kernel
def _mix(bits: tl.tensor) -> tl.tensor:
    """SplitMix64's finalizer on uint64."""
    bits = (bits ^ (bits >> 30)) * _MULTIPLIER_1
    bits = (bits ^ (bits >> 27)) * _MULTIPLIER_2
    return bits ^ (bits >> 31)
