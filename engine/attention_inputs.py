"""What attention by gathered copies and attention straight from the pages read: a step's rows, group by group.

Letters: T tokens of the step, P page_size, B rows of a decode group, n pages of its longest row, S = n * P.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

# A decode group's keys and values are gathered into one buffer before attention. One that fits the caches is read
# back from there; past this size, rows of their own are faster than a batch (measured on a 2 MB-L2 server core).
GROUP_BYTES = 3 * 2**20
# A shorter row in a group is padded to the longest: more than this share of padding costs more than a further call.
_MAX_PADDING = 0.25


@dataclass(frozen=True, slots=True)
class InputShape:
    """What translation needs to know of model and pool: page size, windows in use, bytes per token and layer.

    Attributes:
        windows: of all layers, each once; None sees everything.
        last_window: of the last layer.
    """

    page_size: int
    windows: tuple[int | None, ...]
    last_window: int | None
    layer_token_bytes: int
    device: torch.device


class TableRow(msgspec.Struct, frozen=True, gc=False):
    """One row as attention sees it: `count` tokens from position `start` on, the first of them `begin` among T.

    `table` holds the pages that cover the row's tokens, earlier ones included: int64, from position 0 on.
    """

    begin: int
    start: int
    count: int
    table: np.ndarray


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows of one new token each that attend together, padded to the longest.

    Attributes:
        tokens: [B] int64, index of each row's token among T.
        page_ids: [B * n] int64, pages that hold what a row may see; padding repeats a page of the row itself.
        visible: [B, 1, 1, S] bool, or None where B is 1 and `first`/`end` say it.
        hidden_rows, hidden_slots: [M] int64, where `visible` is false: what lies there is not the row's and may be
            anything, NaN included, so it is zeroed in the gathered copy.
        first, end: slots `[first, end)` of the gathered pages are visible, where B is 1.
    """

    tokens: torch.Tensor
    page_ids: torch.Tensor
    visible: torch.Tensor | None
    hidden_rows: torch.Tensor | None
    hidden_slots: torch.Tensor | None
    first: int
    end: int

    @property
    def size(self) -> int:
        """B."""
        return self.tokens.shape[0]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Several consecutive tokens of one sequence.

    Attributes:
        begin, end: the tokens `[begin, end)` among T.
        start: position of the first one.
        page_ids: [n] int64, pages from the one that holds position `first_position`; None where `start` is 0, when
            all keys are in this step's own tensors.
        first_position: position that the first gathered slot holds, a multiple of P.
        window: how many latest tokens a query sees, None for all.
    """

    begin: int
    end: int
    start: int
    page_ids: torch.Tensor | None
    first_position: int
    window: int | None


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """Who attends to what, for all layers of one window. Every token of the step is in exactly one of both.

    Attributes:
        groups: rows of one token, in padded batches.
        chunks: rows of several.
    """

    groups: tuple[DecodeGroup, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class _Single:
    """A row of one token: its index, the pages it sees, and which of their slots."""

    token: int
    pages: np.ndarray
    first: int
    end: int


def gather_plan(rows: Many[TableRow], window: int | None, shape: InputShape) -> AttentionInputs:
    """Single tokens into groups, longer rows into chunks: what attention by gathered copies reads."""
    chunks: list[Chunk] = []
    singles: list[_Single] = []
    for row in rows:
        begin, start, count, table = row.begin, row.start, row.count, row.table
        end_position = start + count
        first_seen = 0 if window is None else max(0, start + 1 - window)
        first_page = first_seen // shape.page_size
        seen = table[first_page:] if first_page else table
        if count == 1:
            offset = first_page * shape.page_size
            singles.append(_Single(begin, seen, first_seen - offset, end_position - offset))
            continue
        chunks.append(
            Chunk(
                begin=begin,
                end=begin + count,
                start=start,
                page_ids=_tensor(seen, shape) if start else None,
                first_position=first_page * shape.page_size,
                window=window if window is not None and window < end_position else None,
            )
        )
    return AttentionInputs(tuple(_groups(singles, shape)), tuple(chunks))


def _groups(singles: list[_Single], shape: InputShape) -> list[DecodeGroup]:
    """Batch rows of like length while padding and buffer stay small."""
    groups: list[DecodeGroup] = []
    waiting: list[_Single] = []
    used = 0
    for single in sorted(singles, key=lambda one: len(one.pages), reverse=True):
        if waiting:
            longest = len(waiting[0].pages)
            slots = (len(waiting) + 1) * longest
            too_big = slots * shape.page_size * shape.layer_token_bytes > GROUP_BYTES
            too_loose = (slots - used - len(single.pages)) > _MAX_PADDING * slots + len(waiting)
            if too_big or too_loose:
                groups.append(_group(waiting, shape))
                waiting, used = [], 0
        waiting.append(single)
        used += len(single.pages)
    if waiting:
        groups.append(_group(waiting, shape))
    return groups


def _group(singles: list[_Single], shape: InputShape) -> DecodeGroup:
    """Pad to the longest, which comes first."""
    num_pages = len(singles[0].pages)
    tokens = _tensor(np.array([single.token for single in singles]), shape)
    if len(singles) == 1:
        (single,) = singles
        return DecodeGroup(tokens, _tensor(single.pages, shape), None, None, None, first=single.first, end=single.end)
    table = np.empty((len(singles), num_pages), dtype=np.int64)
    for at, single in enumerate(singles):
        table[at, : len(single.pages)] = single.pages
        table[at, len(single.pages) :] = single.pages[0]
    slots = np.arange(num_pages * shape.page_size)
    firsts = np.array([single.first for single in singles])[:, None]
    ends = np.array([single.end for single in singles])[:, None]
    visible = (slots >= firsts) & (slots < ends)
    hidden_rows, hidden_slots = np.nonzero(~visible)
    return DecodeGroup(
        tokens=tokens,
        page_ids=_tensor(table.reshape(-1), shape),
        visible=torch.from_numpy(visible).to(shape.device)[:, None, None, :],
        hidden_rows=_tensor(hidden_rows, shape),
        hidden_slots=_tensor(hidden_slots, shape),
        first=0,
        end=num_pages * shape.page_size,
    )


def _tensor(array: np.ndarray, shape: InputShape) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(shape.device)
