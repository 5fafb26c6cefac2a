"""The choice of tokens, without a word from the host. Letters in `engine.kernels`.

`choose_tokens` means what its twin `engine.choice.choose_tokens` means: the same order of cuts, the same limits with
ties, the same noise, the same inversion in vocabulary order. It sums probabilities in float64 where the twin adds whole
numbers, and `exp` may differ in its last bits, so the tokens agree except where a draw or a cut falls into a sliver of
about 1e-7 of the mass.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton.language as tl

from engine.candidates import Cuts
from engine.kernels.jit import kernel, power_of_two

_TILE = 1024
# SplitMix64, as in `engine.noise`.
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = tl.constexpr(0x94D049BB133111EB)
_TINIEST = tl.constexpr(torch.finfo(torch.float32).tiny)
_ALL = tl.constexpr(0x7FFFFFFF)  # above the bits of every magnitude, infinity included


def choose_tokens(
    logits: torch.Tensor, temperatures: torch.Tensor, cuts: Cuts, seeds: torch.Tensor, indexes: torch.Tensor
) -> torch.Tensor:
    """Choose one token per row, in one launch. Graph-safe.

    A row is read once if greedy, four times if it draws without cuts, and 16 times more for each of top-k and top-p.

    Args:
        logits: [R, V] float32, edited, columns contiguous; not mutated.
        temperatures: [R] float32; 0 takes the likeliest, the lowest id among equals.
        cuts: of the R rows.
        seeds: [R] int64.
        indexes: [R] int64, of the output token; the noise is that of `engine.noise.uniforms(seeds, indexes)`.

    Returns:
        [R] int64 token ids; `NO_CHOICE` for a row whose best logit is not finite.
    """
    num_rows, vocab_size = logits.shape
    if logits.dtype is not torch.float32 or logits.stride(1) != 1:
        raise ValueError(f"cannot choose from {logits.dtype} logits of strides {list(logits.stride())}")
    chosen = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows:
        _choose[(num_rows,)](
            logits,
            temperatures,
            cuts.top_k,
            cuts.top_p,
            cuts.min_p,
            seeds,
            indexes,
            chosen,
            logits.stride(0),
            VOCAB=vocab_size,
            TILE=min(_TILE, power_of_two(vocab_size)),
            num_warps=8,
        )
    return chosen


@kernel
def _choose(
    logits: tl.tensor,
    temperatures: tl.tensor,
    top_ks: tl.tensor,
    top_ps: tl.tensor,
    min_ps: tl.tensor,
    seeds: tl.tensor,
    indexes: tl.tensor,
    chosen: tl.tensor,
    row_stride: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program: one row. Candidates are handled as distances below the best, whose bits rise as they do."""
    row = tl.program_id(0)
    line = logits + row.to(tl.int64) * row_stride
    best, likeliest, sound = _best(line, VOCAB, TILE)
    temperature = tl.load(temperatures + row)
    result = likeliest.to(tl.int64)
    if sound & (temperature > 0):
        divisor = tl.maximum(temperature, _TINIEST)
        limit = tl.full([], _ALL, tl.uint32)
        top_k = tl.load(top_ks + row)
        if (top_k > 0) & (top_k < VOCAB):
            limit = _limit(line, best, divisor, limit, top_k.to(tl.float64), False, VOCAB, TILE)
        top_p = tl.load(top_ps + row)
        if top_p < 1:
            needed = top_p.to(tl.float64) * _mass(line, best, divisor, limit, float("inf"), VOCAB, TILE)
            limit = tl.minimum(limit, _limit(line, best, divisor, limit, needed, True, VOCAB, TILE))
        min_p = tl.load(min_ps + row)
        farthest = tl.where(min_p > 0, -tl.log(tl.where(min_p > 0, min_p, 1.0)), float("inf"))
        total = _mass(line, best, divisor, limit, farthest, VOCAB, TILE)
        target = total * _uniform(tl.load(seeds + row), tl.load(indexes + row))
        drawn = _invert(line, best, divisor, limit, farthest, target, VOCAB, TILE)
        result = tl.where(drawn >= 0, drawn, likeliest).to(tl.int64)
    tl.store(chosen + row, tl.where(sound, result, -1))


@kernel
def _best(line: tl.tensor, VOCAB: tl.constexpr, TILE: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The best logit, the lowest id that has it, and whether it is finite and no logit is NaN."""
    highest = tl.full((TILE,), float("-inf"), tl.float32)
    where = tl.zeros((TILE,), tl.int32)
    undefined = tl.zeros((TILE,), tl.int32)
    for begin in tl.range(0, VOCAB, TILE):
        ids = begin + tl.arange(0, TILE)
        values = tl.load(line + ids, mask=ids < VOCAB, other=float("-inf"))
        where = tl.where(values > highest, ids, where)
        highest = tl.maximum(highest, values)
        undefined |= (values != values).to(tl.int32)  # noqa: PLR0124 - how NaN shows itself
    best = tl.max(highest, axis=0)
    lowest = tl.min(tl.where(highest == best, where, VOCAB), axis=0)
    sound = (best > float("-inf")) & (best < float("inf")) & (tl.max(undefined, axis=0) == 0)
    return best, lowest, sound


@kernel
def _distances(line: tl.tensor, ids: tl.tensor, best: tl.tensor, divisor: tl.tensor, VOCAB: tl.constexpr) -> tl.tensor:
    """How far each candidate lies below the best, over the temperature; from 0 to infinity, the latter past the end."""
    values = tl.load(line + ids, mask=ids < VOCAB, other=float("-inf"))
    return tl.math.div_rn(best - values, tl.broadcast_to(divisor, ids.shape))


@kernel
def _weights(distances: tl.tensor, limit: tl.tensor, farthest: tl.tensor) -> tl.tensor:
    """Unnormalised probabilities in float64; 0 for candidates beyond either limit."""
    kept = (distances.to(tl.uint32, bitcast=True) <= limit) & (distances <= farthest)
    return tl.where(kept, tl.exp(-distances), 0.0).to(tl.float64)


@kernel
def _mass(
    line: tl.tensor,
    best: tl.tensor,
    divisor: tl.tensor,
    limit: tl.tensor,
    farthest: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Sum of the weights within the limits, tile by tile as `_invert` adds them."""
    total = tl.full([], 0.0, tl.float64)
    for begin in tl.range(0, VOCAB, TILE):
        distances = _distances(line, begin + tl.arange(0, TILE), best, divisor, VOCAB)
        total += tl.sum(_weights(distances, limit, farthest), axis=0)
    return total


@kernel
def _limit(
    line: tl.tensor,
    best: tl.tensor,
    divisor: tl.tensor,
    ceiling: tl.tensor,
    needed: tl.tensor,
    BY_MASS: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Bits of the least distance within which the candidates reach `needed`, by number or by mass.

    A search from the highest bits down, two bits per reading of the row. What lies beyond `ceiling` has no mass.
    """
    digits = tl.arange(0, 4).to(tl.uint32)
    found = tl.full([], 0, tl.uint32)
    for step in tl.range(0, 16):
        shift = tl.full([], 30, tl.uint32) - 2 * step
        lows = (tl.full([], 1, tl.uint32) << shift) - 1
        tops = found | (digits << shift) | lows  # the highest bits under each digit
        reached = tl.zeros((4,), tl.float64)
        for begin in tl.range(0, VOCAB, TILE):
            ids = begin + tl.arange(0, TILE)
            distances = _distances(line, ids, best, divisor, VOCAB)
            if BY_MASS:  # noqa: SIM108 - a branch that the compiler takes, not a value
                amounts = _weights(distances, ceiling, float("inf"))
            else:
                amounts = (ids < VOCAB).to(tl.float64)
            within = distances.to(tl.uint32, bitcast=True)[:, None] <= tops[None, :]
            reached += tl.sum(tl.where(within, amounts[:, None], 0.0), axis=0)
        short = (reached < needed) & (digits < 3)
        found |= tl.sum(short.to(tl.int32), axis=0).to(tl.uint32) << shift
    return found


@kernel
def _invert(
    line: tl.tensor,
    best: tl.tensor,
    divisor: tl.tensor,
    limit: tl.tensor,
    farthest: tl.tensor,
    target: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """The first id, in vocabulary order, at which the running sum of weights exceeds `target`; -1 for none."""
    before = tl.full([], 0.0, tl.float64)
    found = tl.full([], -1, tl.int32)
    for begin in tl.range(0, VOCAB, TILE):
        weights = _weights(_distances(line, begin + tl.arange(0, TILE), best, divisor, VOCAB), limit, farthest)
        mass = tl.sum(weights, axis=0)
        if (found < 0) & (before + mass > target):
            ends = tl.cumsum(weights, axis=0)
            # A running sum may round apart from the sum by a hair: stay before the very end.
            inside = tl.minimum(tl.maximum(target - before, 0.0), tl.max(ends, axis=0) * (1 - 2.0**-50))
            found = begin + tl.sum((ends <= inside).to(tl.int32), axis=0)
        before += mass
    return found


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
