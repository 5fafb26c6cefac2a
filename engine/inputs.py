"""The one translator from a step plan to tensors: ids, positions, slots, page tables; attention rows by the backend.

Letters: T tokens of the step, R rows that sample, P page_size.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from engine.attention_inputs import InputShape, TableRow
from engine.page_tables import PageArray
from engine.pages import pages_for
from engine.plan import Row


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Everything that one forward pass reads besides weights and pages.

    Attributes:
        token_ids, positions: [T] int64.
        rope_lengths: [T] int64, the length that a token's rotary base follows: the prompt's for a token of the
            prompt, else the length that ends with the token.
        page_ids, offsets, slots: [T] int64, the slot that takes each token's keys and values: its page, its place in
            it, and both in one number.
        attention: by window, what the backend's `plan_attention` made of the rows.
        sampled_tokens: [R] int64, index among T of the last token of each sampling row.
        sampled_attention: what `plan_attention` made of the sampled tokens alone, for the last layer's window; None
            where all tokens are sampled at, or none is.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    rope_lengths: torch.Tensor
    page_ids: torch.Tensor
    offsets: torch.Tensor
    slots: torch.Tensor
    attention: dict[int | None, object]
    sampled_tokens: torch.Tensor
    sampled_attention: object | None


PlanAttention = Callable[[Many[TableRow], int | None, InputShape], object]
"""Turns a step's rows into what one backend's attention reads, for one window."""


def build_inputs(
    rows: Many[Row], shape: InputShape, plan_attention: PlanAttention, tables: Many[PageArray] | None = None
) -> StepInputs:
    """Translate rows in order.

    Args:
        rows: of the step.
        shape: of model and pool.
        plan_attention: the backend's.
        tables: of the rows' sequences, as `engine.page_tables` keeps them; without, page tables are read anew.

    Requires: at least one row, counts of at least 1, page tables that cover `start + count` tokens (`row_error` says).
    """
    if tables is None:
        tables = [PageArray(row.sequence.page_table) for row in rows]
    page_size = shape.page_size
    starts = [row.start for row in rows]
    counts = [row.count for row in rows]
    pages = [table.first(pages_for(row.start + row.count, page_size)) for row, table in zip(rows, tables, strict=True)]
    *begins, num_tokens = accumulate(counts, initial=0)
    columns = (
        _decode_columns(rows, page_size) if num_tokens == len(rows) else _columns(rows, pages, num_tokens, page_size)
    )
    tensors = torch.from_numpy(columns).to(shape.device).unbind()
    table_rows = list(map(TableRow, begins, starts, counts, pages))
    num_sampled = sum(row.sample for row in rows)
    sampled_attention = None
    if 0 < num_sampled < num_tokens:
        sampled = (one for row, one in zip(rows, table_rows, strict=True) if row.sample)
        last_tokens = [TableRow(at, one.start + one.count - 1, 1, one.table) for at, one in enumerate(sampled)]
        sampled_attention = plan_attention(last_tokens, shape.last_window, shape)
    return StepInputs(
        token_ids=tensors[0],
        positions=tensors[1],
        rope_lengths=tensors[2],
        page_ids=tensors[3],
        offsets=tensors[4],
        slots=tensors[5],
        attention={window: plan_attention(table_rows, window, shape) for window in shape.windows},
        sampled_tokens=tensors[6][:num_sampled],
        sampled_attention=sampled_attention,
    )


# The columns of a step, `[7, T]` int64 in one piece, which a device gets by one copy: token ids, positions, rope
# lengths, page ids, offsets, slots, and the tokens that are sampled at, filled up with anything.


def _decode_columns(rows: Many[Row], page_size: int) -> np.ndarray:
    """Of rows of one token each.

    By lists and one array: what runs once between two forward passes finds the caches cold, and then each further kind
    of array operation costs 5 to 20 us, as much as a list of some hundred numbers.
    """
    starts = [row.start for row in rows]
    page_ids = [row.sequence.page_table[row.start // page_size] for row in rows]
    offsets = [start % page_size for start in starts]
    sampled = [at for at, row in enumerate(rows) if row.sample]
    return np.array(
        (
            [row.sequence.token_ids[row.start] for row in rows],
            starts,
            [max(row.sequence.prompt_len, row.start + 1) for row in rows],
            page_ids,
            offsets,
            [page * page_size + offset for page, offset in zip(page_ids, offsets, strict=True)],
            sampled + [0] * (len(rows) - len(sampled)),
        ),
        dtype=np.int64,
    )


def _columns(rows: Many[Row], pages: Many[np.ndarray], num_tokens: int, page_size: int) -> np.ndarray:
    """Of any rows."""
    columns = np.empty((7, num_tokens), dtype=np.int64)
    token_ids, positions, rope_lengths, page_ids, offsets, slots, sampled = columns
    begin = num_sampled = 0
    for row, table in zip(rows, pages, strict=True):
        end = row.start + row.count
        span = slice(begin, begin + row.count)
        token_ids[span] = row.sequence.token_ids[row.start : end]
        positions[span] = np.arange(row.start, end)
        rope_lengths[span] = row.sequence.prompt_len
        page_ids[span] = table[positions[span] // page_size]
        begin += row.count
        if row.sample:
            sampled[num_sampled] = begin - 1
            num_sampled += 1
    np.maximum(rope_lengths, positions + 1, out=rope_lengths)
    np.remainder(positions, page_size, out=offsets)
    np.add(page_ids * page_size, offsets, out=slots)
    return columns


def row_error(row: Row, table: PageArray, *, vocab_size: int, page_size: int, num_pages: int) -> str | None:
    """Why this row cannot be computed, as a sentence, or None. A bad row is left out so that others go on.

    `table` is that of the row's sequence.
    """
    end = row.start + row.count
    ids = row.sequence.token_ids[row.start : end]
    if row.count < 1 or len(ids) != row.count:
        return f"tokens {row.start} to {end} are not in a sequence of {len(row.sequence.token_ids)}"
    if min(ids) < 0 or max(ids) >= vocab_size:
        worst = next(token for token in ids if not 0 <= token < vocab_size)
        return f"token id {worst} is outside the vocabulary of {vocab_size}"
    if len(table) * page_size < end:
        return f"{len(table)} pages do not hold {end} tokens"
    if table.lowest < 0 or table.highest >= num_pages:
        return f"the page table leaves the pool of {num_pages} pages"
    return None
