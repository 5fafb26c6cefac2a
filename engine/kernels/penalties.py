"""Bias and penalties on logits, in place. Letters in `engine.kernels`."""
# ruff: noqa: N803

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from engine.kernels.jit import kernel, power_of_two, tiles

_TILE = 1024
_BIAS_TILE = 128


class Bias(NamedTuple):
    """Additions to single logits of R rows. A ban is a bias of minus infinity.

    Attributes:
        starts: [R + 1] int32; row r has the entries `[starts[r], starts[r + 1])`.
        ids: [m] int32 token ids inside the vocabulary, each once per row.
        values: [m] float32.
    """

    starts: torch.Tensor
    ids: torch.Tensor
    values: torch.Tensor


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


def edit_logits(logits: torch.Tensor, bias: Bias | None, penalties: Penalties | None) -> None:
    """Bias, then repetition, then presence and frequency penalty, as `engine.logit_edits`. Graph-safe.

    Args:
        logits: [R, V] float32, columns contiguous; mutated.
        bias: of the R rows, or None.
        penalties: of the R rows, or None; rows without penalties cost a launch of idle programs only.
    """
    num_rows, vocab_size = logits.shape
    if logits.dtype is not torch.float32 or logits.stride(1) != 1:
        raise ValueError(f"cannot edit {logits.dtype} logits of strides {list(logits.stride())}")
    if num_rows == 0:
        return
    if bias is not None:
        _add_bias[(num_rows,)](logits, *bias, logits.stride(0), TILE=_BIAS_TILE)
    if penalties is not None:
        tile = min(_TILE, power_of_two(vocab_size))
        _penalise[(num_rows, tiles(vocab_size, tile))](
            logits, *penalties, logits.stride(0), VOCAB=vocab_size, TILE=tile
        )


def edit_logits_twin(logits: torch.Tensor, bias: Bias | None, penalties: Penalties | None) -> None:
    """Specification of `edit_logits`."""
    for row in range(logits.shape[0]):
        line = logits[row]
        if bias is not None:
            span = slice(int(bias.starts[row]), int(bias.starts[row + 1]))
            line[bias.ids[span].to(torch.int64)] += bias.values[span]
        if penalties is not None and penalties.count_rows[row] >= 0:
            counts = penalties.counts[penalties.count_rows[row]]
            repetition = penalties.repetition[row]
            repeated = torch.where(line > 0, line / repetition, line * repetition)
            line.copy_(torch.where(counts > 0, repeated, line))
            amounts = penalties.presence[row] + penalties.frequency[row] * (counts // 2)
            line.copy_(torch.where(counts >= 2, line - amounts.to(torch.float32), line))


@kernel
def _add_bias(
    logits: tl.tensor, starts: tl.tensor, ids: tl.tensor, values: tl.tensor, row_stride: tl.tensor, TILE: tl.constexpr
) -> None:
    """One program: one row's entries."""
    row = tl.program_id(0)
    line = logits + row.to(tl.int64) * row_stride
    end = tl.load(starts + row + 1)
    for begin in tl.range(tl.load(starts + row), end, TILE):
        entries = begin + tl.arange(0, TILE)
        inside = entries < end
        target = line + tl.load(ids + entries, mask=inside, other=0)
        changed = tl.load(target, mask=inside, other=0.0) + tl.load(values + entries, mask=inside, other=0.0)
        tl.store(target, changed, mask=inside)


@kernel
def _penalise(
    logits: tl.tensor,
    count_rows: tl.tensor,
    counts: tl.tensor,
    repetition: tl.tensor,
    presence: tl.tensor,
    frequency: tl.tensor,
    row_stride: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program: TILE ids of one row."""
    row = tl.program_id(0)
    count_row = tl.load(count_rows + row).to(tl.int64)
    if count_row >= 0:
        ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
        inside = ids < VOCAB
        count = tl.load(counts + count_row * VOCAB + ids, mask=inside, other=0)
        target = logits + row.to(tl.int64) * row_stride + ids
        before = tl.load(target, mask=inside & (count > 0), other=0.0)
        factor = tl.load(repetition + row)
        divided = tl.math.div_rn(before, tl.broadcast_to(factor, (TILE,)))
        after = tl.where(before > 0, divided, before * factor)
        amount = tl.load(presence + row) + tl.load(frequency + row) * (count // 2).to(tl.float64)
        after -= tl.where(count >= 2, amount.to(tl.float32), 0.0)
        tl.store(target, after, mask=inside & (count > 0))
