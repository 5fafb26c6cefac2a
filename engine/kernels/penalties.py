"""Bias and penalties on logits, into a copy of the rows that have any. Letters in `engine.kernels`."""
# ruff: noqa: N803

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from engine.kernels.jit import kernel, power_of_two, tiles
from engine.kernels.row_logits import RowLogits

_TILE = 1024
_BIAS_TILE = 128


class Bias(NamedTuple):
    """Additions to single logits of R rows. A ban is a bias of minus infinity.

    Attributes:
        starts: [R + 1] int32; row r has the entries `[starts[r], starts[r + 1])`.
        ids: [m] int32 token ids inside the vocabulary, each once per row.
        amounts: [m] float32, not called values, a name that Triton keeps for itself.
    """

    starts: torch.Tensor
    ids: torch.Tensor
    amounts: torch.Tensor


class Penalties(NamedTuple):
    """Repetition, presence and frequency penalties of R rows, and the counts that they follow.

    Attributes:
        count_rows: [R] int32, each row's row of `counts`; -1 for a row without penalties.
        counts: [Q, V] int32: twice the token's count in the output, plus 1 if it is in the prompt. A sampled token
            is noted by adding 2.
        repetition: [R] float32, 1 is off.
        presence, frequency: [R] float64, 0 is off.
    """

    count_rows: torch.Tensor
    counts: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor


def edit_logits(logits: RowLogits, bias: Bias, penalties: Penalties) -> None:
    """Bias, then repetition, then presence and frequency penalty, as `engine.logit_edits`. Graph-safe.

    Args:
        logits: mutated in `edited`: rows that have a place there are written, from their raw logits.
        bias: of the R rows; entries of rows without a place are left out.
        penalties: of the R rows; those with counts have a place.
    """
    logits.check()
    num_rows, vocab_size = logits.raw.shape
    if num_rows == 0:
        return
    tile = min(_TILE, power_of_two(vocab_size))
    grid = (num_rows, tiles(vocab_size, tile))
    _widen[grid](logits, logits.raw.stride(0), VOCAB=vocab_size, TILE=tile)
    _add_bias[(num_rows,)](logits, bias, VOCAB=vocab_size, TILE=_BIAS_TILE)
    _penalise[grid](logits, penalties, VOCAB=vocab_size, TILE=tile, enable_fp_fusion=False)


def edit_logits_twin(logits: RowLogits, bias: Bias, penalties: Penalties) -> None:
    """Specification of `edit_logits`."""
    for row, place in enumerate(logits.edited_rows.tolist()):
        if place < 0:
            continue
        line = logits.edited[place]
        line.copy_(logits.raw[row])
        span = slice(int(bias.starts[row]), int(bias.starts[row + 1]))
        line[bias.ids[span].to(torch.int64)] += bias.amounts[span]
        if penalties.count_rows[row] >= 0:
            counts = penalties.counts[penalties.count_rows[row]]
            repetition = penalties.repetition[row]
            repeated = torch.where(line > 0, line / repetition, line * repetition)
            line.copy_(torch.where(counts > 0, repeated, line))
            amounts = penalties.presence[row] + penalties.frequency[row] * (counts // 2)
            line.copy_(torch.where(counts >= 2, line - amounts.to(torch.float32), line))


def note_chosen(penalties: Penalties, chosen: torch.Tensor) -> None:
    """Count what rows with counts have chosen, `[R]` int64; ids below 0 are none. Graph-safe.

    Args:
        penalties: mutated in `counts`.
        chosen: ids inside the vocabulary.
    """
    if chosen.shape[0]:
        _note[(chosen.shape[0],)](penalties, chosen, VOCAB=penalties.counts.shape[1], num_warps=1)


def note_chosen_twin(penalties: Penalties, chosen: torch.Tensor) -> None:
    """Specification of `note_chosen`."""
    for place, token in zip(penalties.count_rows.tolist(), chosen.tolist(), strict=True):
        if place >= 0 and token >= 0:
            penalties.counts[place, token] += 2


@kernel
def _widen(logits: tl.tuple, stride: tl.tensor, VOCAB: tl.constexpr, TILE: tl.constexpr) -> None:
    """One program: TILE ids of one row, from raw to edited."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(logits.edited_rows + row).to(tl.int64)
    if place >= 0:
        ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
        inside = ids < VOCAB
        values = tl.load(logits.raw + row * stride + ids, mask=inside, other=0.0)
        tl.store(logits.edited + place * VOCAB + ids, values.to(tl.float32), mask=inside)


@kernel
def _add_bias(logits: tl.tuple, bias: tl.tuple, VOCAB: tl.constexpr, TILE: tl.constexpr) -> None:
    """One program: one row's entries."""
    row = tl.program_id(0)
    place = tl.load(logits.edited_rows + row).to(tl.int64)
    if place >= 0:
        end = tl.load(bias.starts + row + 1)
        for begin in tl.range(tl.load(bias.starts + row), end, TILE):
            entries = begin + tl.arange(0, TILE)
            inside = entries < end
            target = logits.edited + place * VOCAB + tl.load(bias.ids + entries, mask=inside, other=0)
            added = tl.load(bias.amounts + entries, mask=inside, other=0.0)
            tl.store(target, tl.load(target, mask=inside, other=0.0) + added, mask=inside)


@kernel
def _penalise(logits: tl.tuple, penalties: tl.tuple, VOCAB: tl.constexpr, TILE: tl.constexpr) -> None:
    """One program: TILE ids of one row."""
    row = tl.program_id(0)
    count_row = tl.load(penalties.count_rows + row).to(tl.int64)
    if count_row >= 0:
        ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
        inside = ids < VOCAB
        count = tl.load(penalties.counts + count_row * VOCAB + ids, mask=inside, other=0)
        target = logits.edited + tl.load(logits.edited_rows + row).to(tl.int64) * VOCAB + ids
        before = tl.load(target, mask=inside & (count > 0), other=0.0)
        factor = tl.load(penalties.repetition + row)
        divided = tl.math.div_rn(before, tl.broadcast_to(factor, (TILE,)))
        after = tl.where(before > 0, divided, before * factor)
        frequency = tl.load(penalties.frequency + row) * (count // 2).to(tl.float64)
        amount = tl.load(penalties.presence + row) + frequency
        after -= tl.where(count >= 2, amount.to(tl.float32), 0.0)
        tl.store(target, after, mask=inside & (count > 0))


@kernel
def _note(penalties: tl.tuple, chosen: tl.tensor, VOCAB: tl.constexpr) -> None:
    """One program: one row. No two share counts."""
    row = tl.program_id(0)
    count_row, token = tl.load(penalties.count_rows + row).to(tl.int64), tl.load(chosen + row)
    if (count_row >= 0) & (token >= 0):
        target = penalties.counts + count_row * VOCAB + token
        tl.store(target, tl.load(target) + 2)
