"""`engine.choice.choose_tokens` as one compiled kernel for CPUs: the same tokens, to the letter.

A row is read once if greedy, twice if not; each of top-k and top-p adds a search for its limit among what stays, by the
bits of the scores. Rows are dealt out to torch's threads.

Letters: R rows, V vocab_size.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, njit

from engine.candidates import EXPONENT_OF_UNIT, LN2_HIGH, LN2_LOW, LOG2_E, LOWEST, ROUNDER, SERIES, UNIT_BITS
from engine.choice import NO_CHOICE, ChoiceRows
from engine.cpu.jit import Team, bits_of, float_of, kernel, num_threads, pointer, thread_num

_RUN = 512  # ids per partial sum and partial maximum
_NO_CHOICE = np.int64(NO_CHOICE)
_LOWEST, _LOG2_E, _ROUNDER = np.float32(LOWEST), np.float32(LOG2_E), np.float32(ROUNDER)
_LN2_HIGH, _LN2_LOW = np.float32(LN2_HIGH), np.float32(LN2_LOW)
_TINIEST = np.float32(torch.finfo(torch.float32).tiny)
_C6, _C5, _C4, _C3, _C2, _C1, _C0 = (np.float32(coefficient) for coefficient in SERIES)
_EXPONENT_OF_UNIT = np.int64(EXPONENT_OF_UNIT)
_UNIT = 2.0**UNIT_BITS
_MAGNITUDE, _INFINITY = np.int64(0x7FFFFFFF), np.int64(0x7F800000)
_GAMMA, _ONE = np.uint64(0x9E3779B97F4A7C15), np.uint64(1)  # SplitMix64, as in `engine.noise`
_MULTIPLIER_1, _MULTIPLIER_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_BY_30, _BY_27, _BY_31, _BY_16 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(16)


class TokenChoice:
    """A `Choose` for logits on a CPU. Raises: NoKernels where there are no threads of torch's to run it on."""

    def __init__(self) -> None:
        self._team = Team()
        self._kernel = _token_choice()

    def __call__(self, logits: torch.Tensor, rows: ChoiceRows) -> list[int]:
        """See `engine.choice.choose_tokens`; columns of `logits` are contiguous, and it is not mutated."""
        num_rows, vocab_size = logits.shape
        if logits.dtype is not torch.float32 or logits.device.type != "cpu" or logits.stride(1) != 1:
            raise ValueError(f"cannot choose from {logits.dtype} on {logits.device}, strides {logits.stride()}")
        chosen = np.empty(num_rows, dtype=np.int64)
        arrays = [each.ctypes.data for each in rows]
        words = (logits.data_ptr(), logits.stride(0), num_rows, vocab_size, *arrays, chosen.ctypes.data)
        self._team.run(self._kernel, words)
        return chosen.tolist()


@njit(inline="always")
def _whole_weight(score: Any) -> Any:
    """As `engine.candidates.whole_weights`, of one score."""
    clamped = max(score, _LOWEST)
    shifted = clamped * _LOG2_E + _ROUNDER
    whole = shifted - _ROUNDER
    rest = (clamped - whole * _LN2_HIGH) - whole * _LN2_LOW
    series = ((((_C6 * rest + _C5) * rest + _C4) * rest + _C3) * rest + _C2) * rest + _C1
    return np.int64((series * rest + _C0) * float_of((bits_of(shifted) << 23) + _EXPONENT_OF_UNIT))


@functools.cache
def _token_choice() -> Any:  # noqa: C901, PLR0915 - as below
    """The kernel.

    Words: address of the logits, their stride from row to row, R, V, then the addresses of the six `ChoiceRows` and of
    the chosen ids `[R]` int64.
    """

    def run(words: Any) -> None:  # noqa: C901, PLR0912, PLR0915 - one function, or numba could not keep it on disk
        num_rows, vocab_size = words[2], words[3]
        temperatures = carray(pointer(words[4]), num_rows, np.float32)
        top_ks = carray(pointer(words[5]), num_rows, np.int64)
        top_ps = carray(pointer(words[6]), num_rows, np.float32)
        min_ps = carray(pointer(words[7]), num_rows, np.float32)
        seeds = carray(pointer(words[8]), num_rows, np.uint64)
        indexes = carray(pointer(words[9]), num_rows, np.uint64)
        chosen = carray(pointer(words[10]), num_rows, np.int64)
        num_runs = (vocab_size + _RUN - 1) // _RUN
        tops = np.empty(num_runs, np.float32)
        sums = np.empty(num_runs, np.int64)
        scores = np.empty(vocab_size, np.float32)
        weights = np.empty(vocab_size, np.int64)
        members = np.empty(vocab_size, np.int64)
        reached = np.empty(2048, np.int64)
        for row in range(thread_num(), num_rows, num_threads()):
            logits = carray(pointer(words[0] + 4 * row * words[1]), vocab_size, np.float32)

            # The best, run by run, as whole numbers that rise with the floats: their maxima vectorize.
            best, magnitude = np.float32(-np.inf), np.int64(0)
            for run in range(num_runs):
                top = np.int64(-(1 << 40))
                line = logits[run * _RUN : (run + 1) * _RUN]
                for at in range(len(line)):
                    bits = bits_of(line[at])
                    magnitude = max(magnitude, bits & _MAGNITUDE)
                    top = max(top, bits ^ ((bits >> 63) & _MAGNITUDE))
                tops[run] = float_of(top ^ ((top >> 63) & _MAGNITUDE))
                best = max(best, tops[run])
            if magnitude > _INFINITY or not np.isfinite(best):  # NaN is above infinity
                chosen[row] = _NO_CHOICE
                continue
            if not temperatures[row] > 0:
                run = 0
                while tops[run] != best:
                    run += 1
                at = run * _RUN
                while logits[at] != best:
                    at += 1
                chosen[row] = at
                continue

            temperature = max(temperatures[row], _TINIEST)
            cuts = 0 < top_ks[row] < vocab_size or top_ps[row] < 1 or min_ps[row] > 0
            for run in range(num_runs):
                total = np.int64(0)
                line = logits[run * _RUN : (run + 1) * _RUN]
                if cuts:
                    ours, whole = scores[run * _RUN :], weights[run * _RUN :]
                    for at in range(len(line)):
                        ours[at] = (line[at] - best) / temperature
                        whole[at] = _whole_weight(ours[at])
                        total += whole[at]
                else:
                    for at in range(len(line)):
                        total += _whole_weight((line[at] - best) / temperature)
                sums[run] = total

            # What stays, in order of the ids. A cut is the least distance from the best within which candidates reach a
            # number (top-k) or a mass (top-p), found by its bits, the highest first.
            num_members, mass, all_in = vocab_size, sums.sum(), True
            for cut in range(3):
                if cut == 0:
                    if not 0 < top_ks[row] < vocab_size:
                        continue
                    needed = top_ks[row]
                elif cut == 1:
                    if not top_ps[row] < 1:
                        continue
                    needed = max(np.int64(np.ceil(np.float64(top_ps[row]) * np.float64(mass))), np.int64(1))
                elif not min_ps[row] > 0:
                    continue
                found, before = np.int64(0), np.int64(0)
                for level in range(3 if cut < 2 else 0):
                    shift, width = 20 - 10 * level, 11 if level == 0 else 10
                    reached[: 1 << width] = 0
                    for member in range(num_members):
                        at = member if all_in else members[member]
                        distance = bits_of(scores[at]) & _MAGNITUDE
                        if distance >> (shift + width) == found:
                            reached[(distance >> shift) & ((1 << width) - 1)] += weights[at] if cut else 1
                    digit = 0
                    while before + reached[digit] < needed:
                        before += reached[digit]
                        digit += 1
                    found = (found << width) | digit
                    if level == 0:  # what is farther by the first digit is out; few are left to search
                        num_kept = 0
                        for member in range(num_members):
                            at = member if all_in else members[member]
                            members[num_kept] = at
                            num_kept += (bits_of(scores[at]) & _MAGNITUDE) >> shift <= found
                        num_members, all_in = num_kept, False
                limit = -float_of(found) if cut < 2 else np.float32(-np.inf)
                least = np.int64(np.ceil(np.float64(min_ps[row]) * _UNIT)) if cut == 2 else np.int64(0)
                num_kept, mass = 0, np.int64(0)
                for member in range(num_members):
                    at = member if all_in else members[member]
                    members[num_kept] = at
                    kept = scores[at] >= limit and weights[at] >= least
                    num_kept += kept
                    mass += weights[at] if kept else 0
                num_members, all_in = num_kept, False

            mixed = seeds[row]
            mixed = (mixed ^ (mixed >> _BY_30)) * _MULTIPLIER_1
            mixed = (mixed ^ (mixed >> _BY_27)) * _MULTIPLIER_2
            mixed = (mixed ^ (mixed >> _BY_31)) + (indexes[row] + _ONE) * _GAMMA
            mixed = (mixed ^ (mixed >> _BY_30)) * _MULTIPLIER_1
            mixed = (mixed ^ (mixed >> _BY_27)) * _MULTIPLIER_2
            mixed = (mixed ^ (mixed >> _BY_31)) >> _BY_16
            target = np.int64((np.float64(mixed) + 0.5) * 2.0**-48 * np.float64(mass))
            if cuts:
                member = 0
                while weights[members[member]] <= target:
                    target -= weights[members[member]]
                    member += 1
                chosen[row] = members[member]
                continue
            run = 0
            while sums[run] <= target:
                target -= sums[run]
                run += 1
            at = run * _RUN
            weight = _whole_weight((logits[at] - best) / temperature)
            while weight <= target:
                target -= weight
                at += 1
                weight = _whole_weight((logits[at] - best) / temperature)
            chosen[row] = at

    return kernel(run, exact=True)
